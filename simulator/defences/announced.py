"""What an attack knows of the defence: what the protocol announces."""

from __future__ import annotations

import math

from fedtap.simulator.defences.accountant import flower_local_dp
from fedtap.simulator.defences.notation import Part, described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Protocol

NOISY = frozenset({"noise", "laplace"})
"""Defences of which all that matters is how loud their noise is, which `sigma` says."""


def sigma(protocol: Protocol) -> float:
    """Standard deviation of the noise that is announced, on an entry of the gradient; 0 where none is.

    Each client of a sum adds its own, and the mean of n of them has it less by √n.
    The noise of all parts of a chain adds up by its variances; what a clip after it may take away is not taken off.
    Nothing else that is done to the gradient is modelled, nor is a defence that is not fedtap's: an attack that knows
    the defence by this alone goes on as if there were no more to it, and accepts the leak. Exact-GIT loses nothing to a
    clip, since a layer's input is a ratio of gradients.
    """
    try:
        parts = described(protocol.defence)
    except FedtapError:
        return 0.0
    own = protocol.batch // protocol.summed
    return math.sqrt(sum(_spread(part, own) ** 2 for part in parts) / protocol.summed)


def _spread(part: Part, batch: int) -> float:
    match part.name:
        case "noise":
            return part["sigma"]
        case "laplace":
            return math.sqrt(2) * part["scale"]
        case "dp_sgd":
            return part["noise_multiplier"] * part["clip"] / batch
        case "local_dp":
            clip, sensitivity, epsilon, delta = part.values
            return flower_local_dp(clip, sensitivity, epsilon, delta, "add/remove").sigma
    return 0.0
