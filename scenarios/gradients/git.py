"""What does an eavesdropper who has practised see in a gradient, and what a server that knows the weights?

Expect: the learned attacks turn a gradient into a likeness in a millisecond, above every floor; from the same practice
pairs the weights themselves can be read, and with them, or as the server that knows them, the image comes back exactly.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import ImageKnobs, heard_by, image_knobs
from fedtap.simulator.federation.settings import Scenario

PANELS = {
    "eavesdropper": "grey,training_mean,nearest,ridge,lti(width=250,epochs=150,rate=1e-3),flat_mlp,coarse_git,"
    "identified(exact_git)",
    "curious_server": "rgap,exact_git(weighted=False),exact_git,fused_git",
}


@image_knobs(threat_model="", victims=4)
def scenario(**knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """One gradient of one image a victim; the pairs come from the compromised client."""
    return heard_by(knobs, PANELS)
