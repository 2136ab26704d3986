"""Do several local steps of FedAvg hide a client's images from the server?

Expect: hardly. The attacker unrolls the steps it knows were prescribed, and matches the whole update: each step costs
it time, but the pictures come back.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class LocalSteps(ImageScenario):
    """FedAvg with local steps of plain SGD, each on the client's whole batch, undefended."""

    local_steps: int = sweep(1, 2, 4, 8)
    victims: int = 4
    attack: str = "idlg(steps=900)"
