"""Do several local steps of FedAvg hide a client's images from the server?

Expect: hardly. The attacker unrolls the steps it knows were prescribed, and matches the whole update: each step costs
it time, but the pictures come back.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import ImageKnobs, image_knobs, image_scenario
from fedtap.simulator.federation.settings import Scenario


@image_knobs(local_steps=(1, 2, 4, 8), victims=4, attack="idlg(steps=900)")
def scenario(**knobs: Unpack[ImageKnobs]) -> Scenario:
    """FedAvg with local steps of plain SGD, each on the client's whole batch, undefended."""
    return image_scenario(**knobs)
