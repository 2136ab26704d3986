"""Does a defence hold in ordinary FedAvg, after training and with several local steps in a round?

Expect: training and local steps alone hide little, and so do pruning and little noise. Noise of a tenth of the clip
stops this attack, which does not know of it, and its ε is still no promise; every round of training is defended alike.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import Delta, ImageKnobs, SuccessDb, image_knobs, promising
from fedtap.simulator.federation.settings import Scenario

ATTACK = "inverting_gradients(steps=200),inverting_gradients(steps=200,adaptive=True)"
DEFENCES = ("none", "clip(1.0)+noise(0.001)", "clip(1.0)+noise(0.1)", "prune(0.9)")


@image_knobs(
    model="convnet",
    victims=2,
    clients=8,
    rounds=10,
    training_batch=32,
    local_steps=4,
    defence=DEFENCES,
    delta=1e-5,
    success_db=0.0,
)
def scenario(
    *,
    delta: Delta,
    success_db: SuccessDb,
    **knobs: Unpack[ImageKnobs],
) -> Scenario:
    """Rounds of FedAvg with local steps of plain SGD, all of them defended; the last one is attacked."""
    return promising(knobs, ATTACK, delta, success_db)
