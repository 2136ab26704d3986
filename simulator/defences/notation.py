"""What a defence is called and what it was told: words and numbers without code, for clients and attackers alike.

`clip(1.0)+noise(0.01)` is read from left to right: what is written first is done first.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedtap.simulator.errors import FedtapError, short, unknown

HOOKS = ("model", "step", "update", "server")
"""Where a defence acts, in the order in which things happen: on the model before it is trained, on each local step, on
what the client sends, on the server's average."""


@dataclass(frozen=True)
class Number:
    """One argument: its name, and the values it takes."""

    name: str
    low: float = 0.0
    high: float = math.inf
    ends: tuple[bool, bool] = (False, False)
    """Whether `low` and `high` are among the values."""
    whole: bool = False

    def __str__(self) -> str:
        low = f"{'from' if self.ends[0] else 'above'} {self.low:g}"
        high = "" if self.high == math.inf else f" {'to' if self.ends[1] else 'and below'} {self.high:g}"
        return f"a {'whole ' if self.whole else ''}number {low}{high}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of them."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        try:
            over = value >= self.low if self.ends[0] else value > self.low
            under = value <= self.high if self.ends[1] else value < self.high
            return math.isfinite(value) and over and under
        except OverflowError:
            return False


@dataclass(frozen=True)
class Kind:
    """A defence in words: where it acts, what it does, and what it is told."""

    hook: str
    about: str
    arguments: tuple[Number, ...] = ()
    strength: str = ""
    """The argument by which it does more or less."""
    strengths: tuple[float, ...] = ()
    """Values of it to choose from, the weakest first."""


SHARE, CLIP = Number("share", high=1, ends=(True, False)), Number("clip")
FEATURES, BITS = (Number(name, 1, most, (True, True), whole=True) for name, most in (("features", 65536), ("bits", 16)))
MULTIPLIER = Number("noise_multiplier", ends=(True, False))
RISING = tuple(digit * 10.0**power for power in (-3, -2, -1, 0) for digit in (1, 2, 5))
FALLING = tuple(digit * 10.0**power for power in (3, 2, 1, 0, -1, -2) for digit in (5, 2, 1))
DROPPED = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)

WORDS: Mapping[str, Kind] = {
    "precode": Kind(
        "model",
        "a variational bottleneck before the last layer",
        (FEATURES,),
        "features",
        (512, 256, 128, 64, 32, 16, 8, 4, 2, 1),
    ),
    "soteria": Kind(
        "step",
        "the last layer is not told of a share of its features, those that tell most",
        (SHARE,),
        "share",
        DROPPED,
    ),
    "dp_sgd": Kind(
        "step",
        "each example's gradient clipped, noise on their sum: Opacus",
        (CLIP, MULTIPLIER),
        "noise_multiplier",
        RISING,
    ),
    "clip": Kind("update", "the whole gradient is shortened to an L2 norm", (Number("norm"),), "norm", FALLING[6:]),
    "noise": Kind("update", "Gaussian noise on each entry", (Number("sigma", ends=(True, False)),), "sigma", RISING),
    "laplace": Kind("update", "Laplace noise on each entry", (Number("scale"),), "scale", RISING),
    "prune": Kind("update", "a share of the entries is set to 0, the smallest", (SHARE,), "share", DROPPED),
    "sign": Kind("update", "the sign of each entry, at the scale 1"),
    "quantise": Kind(
        "update", "each tensor in 2^bits values, rounded at random without bias", (BITS,), "bits", (8, 6, 5, 4, 3, 2, 1)
    ),
    "local_dp": Kind(
        "update",
        "clipping and Gaussian noise: Flower's LocalDpMod",
        (CLIP, Number("sensitivity"), Number("epsilon"), Number("delta", high=1)),
        "epsilon",
        FALLING[:12],
    ),
    "central_dp": Kind("server", "clipping and noise on the average: Flower's strategy wrapper", (CLIP, MULTIPLIER)),
}
"""Every defence by name."""


@dataclass(frozen=True)
class Part:
    """One defence: its name and the values of its arguments.

    Raises:
        FedtapError: there is no such defence, or it does not take these values.
    """

    name: str
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in WORDS:
            raise unknown("defence", self.name, WORDS)
        wanted = self.kind.arguments
        if len(self.values) != len(wanted):
            raise FedtapError(
                f"{self.name} is given {len(self.values)} values and takes {len(wanted)}: write {usage(self.name)}."
            )
        for number, value in zip(wanted, self.values, strict=True):
            if not number.fits(value):
                raise FedtapError(
                    f"{number.name} of {self.name} is {short(repr(value))}, and it is {number}: give such a one."
                )
        numbers = (value if number.whole else float(value) for number, value in zip(wanted, self.values, strict=True))
        object.__setattr__(self, "values", tuple(numbers))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.values))})"

    def __getitem__(self, argument: str) -> float:
        """The value of the argument of this name."""
        return self.values[[number.name for number in self.kind.arguments].index(argument)]

    @property
    def kind(self) -> Kind:
        """What it is in words."""
        return WORDS[self.name]


def usage(name: str) -> str:
    """How the defence of this name is written."""
    return f"{name}({', '.join(number.name for number in WORDS[name].arguments)})"


def strengths(text: str) -> tuple[str, ...]:
    """The same defence at each of its last part's strengths, the weakest first; as it is if that has but one."""
    parts = described(text)
    if not parts or not parts[-1].kind.strengths:
        return (text,)
    last = parts[-1]
    place = [number.name for number in last.kind.arguments].index(last.kind.strength)
    each = (Part(last.name, (*last.values[:place], value, *last.values[place + 1 :])) for value in last.kind.strengths)
    return tuple(written((*parts[:-1], part)) for part in each)


HOW = "write none, or defences joined by +, as clip(1.0)+noise(0.01)"


def described(text: str) -> tuple[Part, ...]:
    """The defences that the text names, in the order in which they are done; `none` names none.

    Raises:
        FedtapError: it cannot be read, a defence is unknown or told what it does not take, or it stands too late.
    """
    if text.strip() == "none":
        return ()
    try:
        parts = _parts(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise FedtapError(f"--defence {short(text)!r} cannot be read ({short(error)}): {HOW}.") from error
    for before, after in itertools.pairwise(parts):
        here, there = HOOKS.index(before.kind.hook), HOOKS.index(after.kind.hook)
        if there < here:
            raise FedtapError(
                f"{after.name} acts on the {HOOKS[there]}, before {before.name} can act on the {HOOKS[here]}: "
                f"write it first, {after}+{before}."
            )
        if here == there and before.kind.hook != "update":
            raise FedtapError(f"{before.name} and {after.name} both act on the {HOOKS[here]}: keep one of them.")
    return parts


def written(parts: tuple[Part, ...]) -> str:
    """As they are written: `described` reads it back."""
    return "+".join(map(str, parts)) or "none"


def averaged(text: str, times: int) -> str:
    """What the mean of so many answers of one client to the same question is defended by: Gaussian noise wears off.

    It holds where the noise comes last; any other defence is left as it was announced.
    """
    parts = described(text)
    if times == 1 or not parts or parts[-1].name != "noise":
        return text
    return written((*parts[:-1], Part("noise", (parts[-1]["sigma"] / math.sqrt(times),))))


def _parts(node: ast.expr) -> tuple[Part, ...]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left) + _parts(node.right)
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise ValueError("it holds something else than defences")
    name = call.func.id
    if name not in WORDS:
        raise unknown("defence", name, WORDS)
    names = [number.name for number in WORDS[name].arguments]
    given = dict(enumerate(call.args))
    for keyword in call.keywords:
        if keyword.arg not in names:
            raise unknown(f"argument of {name}", str(keyword.arg), names or ["none"])
        if names.index(keyword.arg) in given:
            raise ValueError(f"{keyword.arg} is given twice")
        given[names.index(keyword.arg)] = keyword.value
    if sorted(given) != list(range(len(names))):
        raise FedtapError(f"{name} is given {len(given)} values and takes {len(names)}: write {usage(name)}.")
    return (Part(name, tuple(ast.literal_eval(given[place]) for place in range(len(names)))),)
