"""One attack a file, named after its paper; `parts` holds the pure functions that several share."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

from fedtap.attackers.parts.checks import is_attack
from fedtap.simulator.attack import Attack, Reconstruction
from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.language import LanguageModel


def _scan() -> dict[str, type[Attack[Any]]]:
    """Every attack in this folder by the name of its file, which defines one public attack."""
    found: dict[str, type[Attack[Any]]] = {}
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if module.ispkg:
            continue
        for thing in vars(importlib.import_module(module.name)).values():
            if isinstance(thing, type) and issubclass(thing, Attack) and thing.__module__ == module.name:
                found[module.name.rpartition(".")[2]] = thing
    return found


ATTACKS: dict[str, type[Attack[Any]]] = _scan()
"""Name on the command line -> attack."""

_HOW = "write attacks as idlg,dlg(steps=300),restarts(dlg,8)"
"""Remedy in the errors of `parse`."""


def parse(text: str) -> tuple[Attack, ...]:
    """The attacks named by ``--attack``: names or calls with constants and other attacks in them, comma between.

    Raises:
        FedtapError: not of that form, an unknown attack or field, a value of the wrong type or out of range, an attack
            named twice.
    """
    try:
        tree = ast.parse(f"({text.strip()},)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FedtapError(f"--attack {short(text)!r} cannot be read ({short(error)}): {_HOW}.") from error
    if not isinstance(tree, ast.Tuple) or not tree.elts:
        raise FedtapError(f"--attack {short(text)!r} names no attack: {_HOW}.")
    attacks = tuple(_attack(node) for node in tree.elts)
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
    (attack,) = parse(text)
    for field, value in _settings(attack):
        if isinstance(value, str) and (":" in value or field == "path"):
            raise FedtapError(
                f"{short(text)!r} names {short(value)!r}, and what is read from a file may name no code to import and "
                "no other file: name it on the command line if you trust it."
            )
    return attack


def models_named(attack: Attack[Any]) -> list[str]:
    """The models that an attack takes for the victim's, wherever nested: each may be code to import."""
    return [value for field, value in _settings(attack) if isinstance(value, str) and field != "path"]


def _settings(attack: Attack[Any]) -> Iterator[tuple[str, Any]]:
    """Field and value of each hyper-parameter of an attack, and of the attacks nested in it."""
    for field in dataclasses.fields(attack):  # type: ignore[arg-type]
        value = getattr(attack, field.name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, Attack):
                yield from _settings(one)
            else:
                yield field.name, one


SUITED = {"posterior": "posterior_mmd", "attention": "attention_newton", "trained_weights": "stationary_mmd"}
"""Kind of leak -> the attack that is tried where none is named; of gradients, it depends on the model."""


def suited(leak: Leak) -> str:
    """The attack that is tried on a leak where none is named."""
    gradients = "dager" if isinstance(leak.network, LanguageModel) else "idlg"
    return SUITED.get(leak.kind, gradients)


def _attack(node: ast.expr) -> Attack:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise FedtapError(f"{_said(node)!r} in --attack is not an attack: {_HOW}.")
    if call.func.id not in ATTACKS:
        raise unknown("attack", call.func.id, ATTACKS)
    kind = ATTACKS[call.func.id]
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if len(call.args) > len(fields):
        raise FedtapError(f"{_said(node)} in --attack has {len(call.args)} values for {len(fields)} fields: {_HOW}.")
    given = dict(zip((field.name for field in fields), call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg not in {field.name for field in fields}:
            raise unknown(f"field of {call.func.id}", str(keyword.arg), (field.name for field in fields))
        if keyword.arg in given:
            raise FedtapError(f"{keyword.arg} in {_said(node)} is given twice: keep one.")
        given[str(keyword.arg)] = keyword.value
    for field in fields:
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise FedtapError(f"{call.func.id} in --attack needs its field {field.name}: {_HOW}.")
    kinds = typing.get_type_hints(kind)
    attack: Attack = kind(**{name: _value(node, kinds[name]) for name, node in given.items()})
    return attack


def _value(node: ast.expr, kind: Any) -> Any:
    if is_attack(kind):
        attack = _attack(node)
        if attack.reconstructs is not Reconstruction:
            raise FedtapError(
                f"{attack.name} in --attack brings back no images, and the attack around it needs some: {_HOW}."
            )
        return attack
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise FedtapError(f"{_said(node)!r} in --attack is not a constant: give a number, True or False.") from error


def _said(node: ast.expr) -> str:
    """Source text of an expression, shortened for an error message."""
    try:
        return short(ast.unparse(node))
    except RecursionError:
        return "what is nested too deep"
