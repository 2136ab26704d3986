"""What the noise that an audit sees is worth: ε at a δ, of which unit, over the rounds that are planned.

The mechanism is read from the objects that make the noise, Opacus's optimiser or Flower's `LocalDpMod`, and ε is the
accountant's and not the one that they announce. Noise that was measured in a reply, and of which no clip is known, has
no ε.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.clientapp.mod import LocalDpMod

from fedtap.scenarios.audit.observe import LocalTraining
from fedtap.simulator.defences.accountant import Gaussian, flower_local_dp

DELTA = 1e-5
"""δ at which ε is told."""

_ROUNDS = re.compile(r"(num|n)[-_]?(server[-_]?)?rounds|rounds", re.IGNORECASE)
"""Keys of a run config that say how many rounds are planned."""

_NOT_COVERED = "metrics and numbers of examples, which travel in the clear; other releases of the same data; the model"
"""What no ε of the updates covers."""


def planned_rounds(run_config: Mapping[str, Any], played: int) -> int:
    """Rounds that the app's run config plans, or else those that were played."""
    named = [value for key, value in run_config.items() if _ROUNDS.fullmatch(key)]
    return next((value for value in named if isinstance(value, int) and value > 0), played)


def privacy_of(
    training: LocalTraining, noise: float, rounds: int, mods: Sequence[object] = ()
) -> dict[str, Any] | None:
    """What is known of the noise in a client's replies, as audit.json has it; None where there is none.

    Args:
        noise: standard deviation that was measured in each weight; 0 for none.
        rounds: replies of the same client that are planned.
        mods: the app's own; a mod that another one calls is found among all objects of this process.
    """
    if (seen := training.dp_sgd) is not None:
        clip, multiplier = seen.max_grad_norm, seen.noise_multiplier
        steps = rounds * len(training.steps)
        once = Gaussian(multiplier * clip, clip, "example", "add/remove", len(training.steps))
        told = _told(once, rounds) | {
            "mechanism": f"DP-SGD by Opacus: each example's gradient clipped to {clip:g}, noise multiplier "
            f"{multiplier:g}, {len(training.steps)} steps a round"
        }
        if seen.sample_rate is not None and seen.sample_rate < 1:
            sampled = dataclasses.replace(once, releases=steps, rate=seen.sample_rate)
            told |= {"sample_rate": seen.sample_rate, "epsilon_sampled": sampled.guarantee(DELTA).epsilon}
        told["not_covered"] += (
            "; the number by which Opacus divides the noisy sum, which differs between neighbours (see `dp_sgd` in "
            "`fedtap list`)"
        )
        return told
    if not noise:
        return None
    for mod in (one for one in [*mods, *gc.get_objects()] if type(one) is LocalDpMod):
        once = flower_local_dp(mod.clipping_norm, mod.sensitivity, mod.epsilon, mod.delta, "add/remove")
        return _told(once, rounds) | {
            "mechanism": f"Flower's LocalDpMod: the update clipped to {mod.clipping_norm:g}, Gaussian noise of "
            f"{once.sigma:.3g}",
            "announced": f"ε = {mod.epsilon:g} at δ = {mod.delta:g} a round, sensitivity {mod.sensitivity:g}",
        }
    return {
        "mechanism": f"noise of standard deviation {noise:.3g} in each weight, as measured; no clip is known",
        "epsilon": None,
        "note": "ε = ∞: where nothing bounds an update, no noise hides it",
    }


def _told(once: Gaussian, rounds: int) -> dict[str, Any]:
    every = dataclasses.replace(once, releases=once.releases * rounds)
    first, all_rounds = once.guarantee(DELTA), every.guarantee(DELTA)
    return {
        "epsilon_of_one_round": first.epsilon if math.isfinite(first.epsilon) else None,
        "epsilon": all_rounds.epsilon if math.isfinite(all_rounds.epsilon) else None,
        "delta": DELTA,
        "unit": once.protects,
        "adjacency": once.adjacency,
        "rounds": rounds,
        "not_covered": _NOT_COVERED,
    }
