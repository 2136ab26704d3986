"""Does a learned attack still work on a client whose weights have moved since the attacker practised?

Expect: no, if it practised at one draw of the weights: a few steps of SGD take it below the blind guess, because what
it learned leans on small differences that any drift drowns. Practice along trainings of the compromised client's
own (--auxiliary-trainings 12) still sees after thousands of steps, less sharply. A server that practises anew, or that
knows the weights, loses nothing to global rounds.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import ImageKnobs, heard_by, image_knobs
from fedtap.simulator.federation.settings import Scenario

PANELS = {"eavesdropper": "training_mean,ridge,coarse_git"}


@image_knobs(threat_model="", victims=8, local_samples=(0, 32, 128, 512), local_epochs=10)
def scenario(**knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """A victim trains by itself from the broadcast weights, then shares one gradient."""
    return heard_by(knobs, PANELS)
