"""What an attack refuses: hyper-parameters that are not of their type or range, and a leak of signs alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from fedtap.simulator.attack import Attack
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Leak

LARGEST = 2**63
"""What no number of a hyper-parameter reaches."""


def check_fields(attack: Attack[Any], **least: float) -> None:
    """Each number at least what is given here for its field; numbers, whole numbers and flags of their own type.

    Raises:
        FedtapError: naming the field, what it is and what it may be.
    """
    for field in dataclasses.fields(attack):  # type: ignore[arg-type]
        value = getattr(attack, field.name)
        told = repr(value) if isinstance(value, str) else value
        where = f"{field.name} of {type(attack).__name__} is {short(told)}, and it is"
        if field.type == "Attack":
            if not isinstance(value, Attack):
                raise FedtapError(f"{where} an attack to run, such as idlg: give that.")
        elif field.type == "str":
            if not isinstance(value, str):
                raise FedtapError(f"{where} text: write it between quotes.")
        elif field.type == "bool":
            if not isinstance(value, bool):
                raise FedtapError(f"{where} a switch: give True or False.")
        elif field.type in ("int", "float"):
            whole, low = field.type == "int", least.get(field.name, 0)
            fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not (fits and low <= value < LARGEST):  # nor NaN
                raise FedtapError(f"{where} a {'whole number' if whole else 'number'} from {low:g}: give such a one.")


def check_slopes(attack: Attack[Any], leak: Leak) -> None:
    """Refuse an update by Adam.

    Raises:
        FedtapError: naming the attack, and those that go by signs.
    """
    if leak.protocol.optimiser == "adam":
        raise FedtapError(
            f"{attack.name} needs how large the gradient's entries are, and after a step of Adam only their signs are "
            "left: use idlg, dlg or inverting_gradients, which match signs."
        )
