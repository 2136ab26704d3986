"""How much practice does an attack need that learns?

Expect: the floors settle at once, the learned attacks gain with every doubling of the pairs, and the closed form that
reads the weights from the pairs goes from nothing to everything where the pairs outnumber a layer's inputs.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import ImageKnobs, heard_by, image_knobs
from fedtap.simulator.federation.settings import Scenario

PANELS = {"eavesdropper": "training_mean,nearest,ridge,coarse_git,identified(exact_git)"}


@image_knobs(threat_model="", victims=8, pairs=(100, 200, 400, 900))
def scenario(**knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """The same victims, attacked after more and more practice."""
    return heard_by(knobs, PANELS)
