"""Does a defence hold in ordinary FedAvg, after training and with several local steps in a round?

Expect: training and local steps alone hide little, and so do pruning and little noise. Noise of a tenth of the clip
stops this attack, which does not know of it, and its ε is still no promise; every round of training is defended alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.promises import Promising
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class FedAvgDefended(Promising):
    """Rounds of FedAvg with local steps of plain SGD, all of them defended; the last one is attacked."""

    tried: ClassVar[str] = "inverting_gradients(steps=200),inverting_gradients(steps=200,adaptive=True)"
    model: str = "convnet"
    victims: int = 2
    clients: int = 8
    rounds: int = 10
    training_batch: int = 32
    local_steps: int = 4
    defence: str = sweep("none", "clip(1.0)+noise(0.001)", "clip(1.0)+noise(0.1)", "prune(0.9)")
