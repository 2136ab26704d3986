"""How defences are written, and which there are: the files of this folder, and those of installed packages.

`clip(1.0)+noise(0.01)` is read from left to right: what is written first is done first.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Callable, Sequence

from fedtap.simulator.defences import DEFENCES
from fedtap.simulator.defences.defence import HOOKS, Argument, Defence
from fedtap.simulator.errors import FedtapError, short, unknown, why_not_read

HOW = "write none, or defences joined by +, as clip(1.0)+noise(0.01)"


def names() -> tuple[str, ...]:
    """Of all defences that can be written: fedtap's own, and those of installed packages."""
    return tuple(DEFENCES)


def kind_of(name: str) -> type[Defence]:
    """The defence of this name.

    Raises:
        FedtapError: there is none, or it is an installed package's that breaks the contract.
    """
    return _whole(DEFENCES[name])


def usage(name: str) -> str:
    """How the defence of this name is written."""
    return f"{name}({', '.join(argument.name for argument in kind_of(name).arguments())})"


def first_line(name: str) -> str:
    """What the defence of this name does, in a line."""
    return (inspect.getdoc(kind_of(name)) or "").partition("\n")[0]


def described(text: str) -> tuple[Defence, ...]:
    """The defences that the text names, in the order in which they are done; `none` names none.

    Raises:
        FedtapError: it cannot be read, a defence is unknown or told what it does not take, or it stands too late.
    """
    if text.strip() == "none":
        return ()
    try:
        parts = _parts(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise FedtapError(f"--defence {short(text)!r} cannot be read ({why_not_read(error)}): {HOW}.") from error
    for before, after in itertools.pairwise(parts):
        here, there = HOOKS.index(before.hook), HOOKS.index(after.hook)
        if there < here:
            raise FedtapError(
                f"{after.name} acts on the {HOOKS[there]}, before {before.name} can act on the {HOOKS[here]}: "
                f"write it first, {after}+{before}."
            )
        if here == there and before.hook != "update":
            raise FedtapError(f"{before.name} and {after.name} both act on the {HOOKS[here]}: keep one of them.")
    return parts


def written(parts: Sequence[Defence]) -> str:
    """As they are written: `described` reads it back."""
    return "+".join(map(str, parts)) or "none"


def strengths(text: str) -> tuple[str, ...]:
    """The same defence at each of its last part's strengths, the weakest first; as it is if that has but one."""
    parts = described(text)
    if not parts or (strong := strength_of(parts[-1])) is None:
        return (text,)
    place, last = parts[-1].arguments().index(strong), parts[-1]
    kind: Callable[..., Defence] = type(last)
    each = (kind(*last.values[:place], value, *last.values[place + 1 :]) for value in strong.range.strengths)
    return tuple(written((*parts[:-1], part)) for part in each)


def strength_of(part: Defence) -> Argument | None:
    """The argument by which it does more or less; None where it comes in one strength."""
    return next((argument for argument in part.arguments() if argument.range.strengths), None)


def averaged(text: str, times: int) -> str:
    """What the mean of so many answers of one client to the same question is defended by.

    Noise wears off where it comes last; what is done to an answer after it stays as it was announced.
    """
    parts = described(text)
    if times == 1 or not parts:
        return text
    last = parts[-1].averaged(times)
    return text if last == parts[-1] else written((*parts[:-1], last))


def _whole(kind: type[Defence]) -> type[Defence]:
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise FedtapError(
            f"{kind.__name__} in {short(kind.__module__)} does not say {short(', '.join(missing), 80)}, and a defence "
            "answers every question about it: write them, None where nothing is known."
        )
    kind.arguments()  # each has a range
    return kind


def _parts(node: ast.expr) -> tuple[Defence, ...]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left) + _parts(node.right)
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise ValueError("it holds something else than defences")
    name = call.func.id
    kind = kind_of(name)
    wanted = [argument.name for argument in kind.arguments()]
    given = dict(enumerate(call.args))
    for keyword in call.keywords:
        if keyword.arg not in wanted:
            raise unknown(f"argument of {name}", str(keyword.arg), wanted or ["none"])
        if wanted.index(keyword.arg) in given:
            raise ValueError(f"{keyword.arg} is given twice")
        given[wanted.index(keyword.arg)] = keyword.value
    if sorted(given) != list(range(len(wanted))):
        raise FedtapError(f"{name} is given {len(given)} values and takes {len(wanted)}: write {usage(name)}.")
    return (kind(*(ast.literal_eval(given[place]) for place in range(len(wanted)))),)
