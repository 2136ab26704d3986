"""What an attack refuses: hyper-parameters that are not of their type or range, and a leak of signs alone."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from fedtap.simulator.attack import Attack
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Leak

_LARGEST = 2**63
"""Exclusive upper bound of every number, so that torch can hold it in 64 bits."""


def check_fields(attack: Attack[Any], **least: float) -> None:
    """Check each hyper-parameter against its annotation, and each number against its least value, 0 where none is
    given.

    Raises:
        FedtapError: naming the field, its value and the values that it may have.
    """
    kinds = typing.get_type_hints(type(attack))
    for field in dataclasses.fields(attack):  # type: ignore[arg-type]
        value, kind = getattr(attack, field.name), kinds[field.name]
        written = repr(value) if isinstance(value, str) else value
        where = f"{field.name} of {type(attack).__name__} is {short(written)}, and it is"
        if is_attack(kind):
            if not isinstance(value, Attack):
                raise FedtapError(f"{where} an attack to run, such as idlg: give that.")
        elif kind is str:
            if not isinstance(value, str):
                raise FedtapError(f"{where} text: write it between quotes.")
        elif kind is bool:
            if not isinstance(value, bool):
                raise FedtapError(f"{where} a switch: give True or False.")
        elif kind in (int, float):
            low = least.get(field.name, 0)
            fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
            if not (fits and low <= value < _LARGEST):  # False for NaN too
                number = "whole number" if kind is int else "number"
                raise FedtapError(f"{where} a {number} from {low:g}: give one of that range.")


def is_attack(kind: Any) -> bool:
    """Whether a resolved annotation (`typing.get_type_hints`) is `Attack`, `Attack[...]` or a subclass."""
    plain = typing.get_origin(kind) or kind
    return isinstance(plain, type) and issubclass(plain, Attack)


def check_magnitudes(attack: Attack[Any], leak: Leak) -> None:
    """Refuse an update by Adam, whose entries are the signs of the gradient and not its magnitudes.

    Raises:
        FedtapError: naming the attack, and those that match signs.
    """
    if leak.protocol.optimiser == "adam":
        raise FedtapError(
            f"{attack.name} needs how large the gradient's entries are, and after a step of Adam only their signs are "
            "left: use idlg, dlg or inverting_gradients, which match signs."
        )
