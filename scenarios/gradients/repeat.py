"""How soon does a client that sends the same batch again and again wear out its noise?

Expect: the mean of n answers has noise of σ/√n, so a hundred repetitions give an attacker ten times less of it, and the
picture comes back; ε of all of them together grows about as n where it is large, which says the same. The server sends
the same weights again, which an honest one would not, and asks for no more than that.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import Delta, ImageKnobs, SuccessDb, image_knobs, promising
from fedtap.simulator.federation.settings import Scenario

ATTACK = "exact_git"


@image_knobs(repeats=(1, 3, 10, 30, 100), victims=4, defence="clip(10.0)+noise(0.002)", delta=1e-5, success_db=0.0)
def scenario(
    *,
    delta: Delta,
    success_db: SuccessDb,
    **knobs: Unpack[ImageKnobs],
) -> Scenario:
    """One batch, one set of weights, fresh noise in each round; the attacker averages what it hears."""
    return promising(knobs, ATTACK, delta, success_db)
