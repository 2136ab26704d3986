"""What all attacks that match gradients ask of a leak before they begin."""

from __future__ import annotations

from typing import Any

from fedtap.attackers.parts.checks import check_magnitudes
from fedtap.attackers.parts.gradients import check_match
from fedtap.attackers.parts.labels import last_linear
from fedtap.simulator.attack import Attack
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak

MATCHED = (GradientLeak, UpdateLeak)
"""Kinds of leak whose gradient can be recomputed for candidate images: one gradient, or an update of local steps."""


def check_matching(attack: Attack[Any], leak: Leak, *, signs: bool = False) -> None:
    """Refuse a leak whose labels cannot be read off its last layer, or whose network cannot be differentiated twice.

    Args:
        signs: whether the attack can work with the signs that a step of Adam leaves of a gradient.

    Raises:
        FedtapError: with the reason and the attack to use instead.
    """
    if not signs:
        check_magnitudes(attack, leak)
    last_linear(leak)
    check_match(leak)
