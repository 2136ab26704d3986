"""One attack a file, named after its paper, in the folder of what it reads; `parts` holds what those folders share."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
import typing
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

from fedtap.simulator.errors import FedtapError, short, unknown, why_not_read
from fedtap.simulator.registry import ATTACK_GROUP, Registry

if TYPE_CHECKING:
    from fedtap.simulator.attack import Attack
    from fedtap.simulator.leaks import Leak

ATTACKS: Registry[Attack[Any]] = Registry("attack", "fedtap.attackers", ATTACK_GROUP, "fedtap.simulator.attack:Attack")
"""Name on the command line -> attack."""

_HOW = "write attacks as idlg,dlg(steps=300),restarts(dlg,8)"

_FORMER = {"panel": "best_of", "aware": "adaptive"}
"""Attacks and their fields of fedtap 0.1, and what they are called now."""

FILE_FIELDS = ("path", "documents", "captions", "encoder")
"""Fields of attacks that name a file."""

TEXT_FIELDS = ("prompt",)
"""Fields of attacks that hold a text."""

_OWN = "own_package_"
"""What an attack of a user's own package is called while its text is parsed."""

_CODE = re.compile(r"(?<![\w'\"./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""`package.module:Class`, outside quotes as far as can be told."""


def parse(text: str, trusted: bool = True) -> tuple[Attack, ...]:
    """The attacks named by ``--attack``: names or calls with constants and other attacks in them, comma between.

    Args:
        trusted: whether the text may name code, `package.module:Class`.

    Raises:
        FedtapError: not of that form, an unknown attack or field, a value of the wrong type or out of range, an attack
            named twice.
    """
    own: list[str] = []

    def kept(found: re.Match[str]) -> str:  # `package.module:Class` is no expression, and stands for one
        own.append(found[0])
        return f"{_OWN}{len(own) - 1}"

    try:
        tree = ast.parse(f"({_CODE.sub(kept, text.strip()) if trusted else text.strip()},)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FedtapError(f"--attack {short(text)!r} cannot be read ({why_not_read(error)}): {_HOW}.") from error
    if not isinstance(tree, ast.Tuple) or not tree.elts:
        raise FedtapError(f"--attack {short(text)!r} names no attack: {_HOW}.")
    attacks = tuple(_attack(node, own) for node in tree.elts)
    for place, attack in enumerate(attacks):
        if attack in attacks[:place]:
            raise FedtapError(
                f"--attack names {_said(tree.elts[place])} twice, and the same attack has the same result: "
                "keep one, or give them different values."
            )
    return attacks


def parse_saved(text: str) -> Attack[Any]:
    """The one attack that a file names, which may name no code to import and no other file to read, wherever nested.

    Raises:
        FedtapError: it does, or it is none that `parse` reads.
    """
    if named := code_named(text):
        raise FedtapError(
            f"{short(named[0], 40)} is code to import, which a file may not name: give it an entry point of the group "
            f"{ATTACK_GROUP}."
        )
    (attack,) = parse(text, trusted=False)
    for field, value in _settings(attack):
        if isinstance(value, str) and value and (":" in value or field in FILE_FIELDS):
            raise FedtapError(
                f"{short(text)!r} names {short(value)!r}, and what is read from a file may name no code to import and "
                "no other file: name it on the command line if you trust it."
            )
    return attack


def models_named(attack: Attack[Any]) -> list[str]:
    """The models that an attack takes for the victim's, wherever nested: each may be code to import."""
    return [
        value for field, value in _settings(attack) if isinstance(value, str) and field not in FILE_FIELDS + TEXT_FIELDS
    ]


def _settings(attack: Attack[Any]) -> Iterator[tuple[str, Any]]:
    """Field and value of all that an attack was told, and of what is nested in it."""
    from fedtap.simulator.attack import Attack

    for field in dataclasses.fields(attack):  # type: ignore[arg-type]
        value = getattr(attack, field.name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, Attack):
                yield from _settings(one)
            else:
                yield field.name, one


def loaded() -> dict[str, type[Attack[Any]]]:
    """Every attack that can be loaded, fedtap's own first; the kinds of leak that they are on can then be read."""
    found: dict[str, type[Attack[Any]]] = {}
    for name in sorted(ATTACKS, key=lambda name: ATTACKS.entries[name].file is None):
        with contextlib.suppress(FedtapError):
            found[name] = ATTACKS[name]
    return found


def suited(leak: Leak) -> str:
    """The attack that is tried on a leak where none is named.

    Raises:
        FedtapError: no attack is meant for it.
    """
    for name, attack in loaded().items():
        if attack.suits(leak):
            return name
    raise FedtapError(
        f"No attack is tried on its own on a {type(leak).__name__}: name one, --attack; `fedtap list` has them."
    )


def _whole(kind: type[Attack[Any]]) -> type[Attack[Any]]:
    """The class, unless it is not yet an attack."""
    missing = [*sorted(getattr(kind, "__abstractmethods__", ())), *(["leaks"] if not hasattr(kind, "leaks") else [])]
    if missing:
        raise FedtapError(
            f"{kind.__name__} in {short(kind.__module__)} does not say {short(', '.join(missing), 80)}, and an attack "
            "has its kinds of leak and its reconstruct: write them."
        )
    if not getattr(getattr(kind, "__dataclass_params__", None), "frozen", False):
        raise FedtapError(
            f"{kind.__name__} in {short(kind.__module__)} is no frozen dataclass, and an attack's fields are its "
            "hyper-parameters: write @dataclass(frozen=True) above the class."
        )
    return kind


def _attack(node: ast.expr, own: list[str]) -> Attack:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise FedtapError(f"{_said(node)!r} in --attack is not an attack: {_HOW}.")
    name = call.func.id
    _refuse_former(name, ATTACKS)
    kind = _whole(ATTACKS.own(own[int(name[len(_OWN) :])]) if name.startswith(_OWN) else ATTACKS[name])
    hints = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.repr]  # type: ignore[arg-type]
    placed = [field.name for field in fields if not field.kw_only]
    if len(call.args) > len(placed):
        raise FedtapError(f"{_said(node)} in --attack has {len(call.args)} values for {len(placed)} fields: {_HOW}.")
    given = dict(zip(placed, call.args, strict=False))
    for keyword in call.keywords:
        _refuse_former(str(keyword.arg), {field.name for field in fields})
        if keyword.arg not in {field.name for field in fields}:
            raise unknown(f"field of {call.func.id}", str(keyword.arg), (field.name for field in fields))
        if keyword.arg in given:
            raise FedtapError(f"{keyword.arg} in {_said(node)} is given twice: keep one.")
        given[str(keyword.arg)] = keyword.value
    for field in fields:
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise FedtapError(f"{call.func.id} in --attack needs its field {field.name}: {_HOW}.")
    attack: Attack = kind(
        **{field.name: _value(given[field.name], hints[field.name], own) for field in fields if field.name in given}
    )
    return attack


def _refuse_former(name: str, known: Container[str]) -> None:
    if name in _FORMER and name not in known:
        raise FedtapError(f"{name} in --attack is called {_FORMER[name]} since fedtap 0.2: write that.")


def _value(node: ast.expr, kind: Any, own: list[str]) -> Any:
    from fedtap.attackers.parts.checks import is_attack
    from fedtap.simulator.attack import Reconstruction

    if is_attack(kind):
        attack = _attack(node, own)
        if attack.reconstructs is not Reconstruction:
            raise FedtapError(f"{attack.name} in --attack brings back no images, and what wraps it needs some: {_HOW}.")
        return attack
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise FedtapError(f"{_said(node)!r} in --attack is not a constant: give a number, True or False.") from error


def _said(node: ast.expr) -> str:
    """A part of what was written, for the sentence that names it."""
    try:
        return short(ast.unparse(node))
    except RecursionError:
        return "what is nested too deep"


def code_named(text: str) -> list[str]:
    """The classes of users' own packages that an attack's text names, which parsing it would import."""
    return _CODE.findall(text)
