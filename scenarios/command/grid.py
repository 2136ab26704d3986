"""The grid of `fedtap tune`: from an attack, and values to try for some of its fields, to an attack a combination."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import typing
from collections.abc import Sequence
from typing import Any

from fedtap.attackers import parse
from fedtap.scenarios.command.options import MOST_SETTINGS, between_commas
from fedtap.simulator.errors import FedtapError, short, unknown

_HOW = "write --try 'rate=1e-3,4e-3', of an attack that is wrapped --try 'prior.epochs=4,8'"


def attack_grid(text: str, tries: Sequence[str]) -> tuple[str, ...]:
    """The attacks of every combination of values, as `--attack` takes them, the last field's values varying fastest.

    Args:
        text: one attack, as `--attack` takes it.
        tries: `FIELD=VALUE,VALUE`, one a field; the field of an attack within it is `FIELD.FIELD`.

    Raises:
        FedtapError: it is not one attack, a field is none of its own or given twice, or a value none that it takes.
    """
    attacks = parse(text)
    if len(attacks) > 1:
        raise FedtapError(f"{short(text)!r} names {len(attacks)} attacks, and one is tuned at a time: name one.")
    if not tries:
        raise FedtapError(f"There is nothing to try of {short(text)}: {_HOW}.")
    choices: dict[str, list[str]] = {}
    for one in tries:
        field, equals, words = one.partition("=")
        values = [word.strip() for word in between_commas(words)]
        if not (field.strip() and equals and all(values)):
            raise FedtapError(f"--try {short(one)!r} is not a field and its values: {_HOW}.")
        if choices.setdefault(field.strip(), values) is not values:
            raise FedtapError(f"--try has {short(field)} twice: join its values by commas.")
    if (many := math.prod(map(len, choices.values()))) > MOST_SETTINGS:
        raise FedtapError(
            f"--try makes {many:,} combinations, and at most {MOST_SETTINGS:,} are tried: give fewer values."
        )
    found = []
    for combination in itertools.product(*choices.values()):
        attack = attacks[0]
        for field, word in zip(choices, combination, strict=True):
            attack = _with(attack, field, word)
        found.append(attack.written())
    return tuple(dict.fromkeys(found))  # 0.001 and 1e-3 are one value


def _with(attack: Any, field: str, word: str) -> Any:
    """The attack with this value of a field, or of a field of an attack within it."""
    from fedtap.attackers.parts.checks import is_attack

    name, _, inner = field.partition(".")
    names = [known.name for known in dataclasses.fields(attack) if known.repr]
    if name not in names:
        raise unknown(f"field of {attack.name}", name, names)
    wraps = is_attack(typing.get_type_hints(type(attack))[name])
    if inner and not wraps:
        raise FedtapError(f"{name} of {attack.name} is no attack, so it has no field {short(inner)}: {_HOW}.")
    if inner:
        value = _with(getattr(attack, name), inner, word)
    elif wraps:
        (value,) = parse(word)
    else:
        try:
            value = ast.literal_eval(word)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise FedtapError(
                f"{short(word)!r} in --try is not a value of {name}: give a number, True, False, or quoted text."
            ) from error
    return dataclasses.replace(attack, **{name: value})
