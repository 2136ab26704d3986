"""How many images must a client average over before its gradient hides them?

Expect: the closed form on an MLP's first layer reads off single images and loses more of a batch the larger it is;
gradient matching falls from a near-perfect picture at one image to little over the blind guess at sixteen.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import ImageKnobs, image_knobs, matching_and_reading
from fedtap.simulator.federation.settings import Scenario


@image_knobs(batch=(1, 2, 4, 8, 16), victims=4)
def scenario(**knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """One step of federated SGD on a batch, undefended."""
    return matching_and_reading(knobs, "idlg(steps=600),inverting_gradients(steps=600)")
