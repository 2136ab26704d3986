"""Does a learned attack see what it never practised on?

Expect: images of another dataset come back with less than twice the error. Of classes that were left out of the
practice little comes back, since the stages lean on a label that they never met; an adversary without images of those
classes mends that by calling what it has by their names. Read each row beside its own floor: the floors move too.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import ImageKnobs, heard_by, image_knobs
from fedtap.simulator.federation.settings import Scenario

PANELS = {"eavesdropper": "training_mean,ridge,coarse_git"}


@image_knobs(threat_model="", victims=8)
def scenario(**knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """Practice and victims alike; then of other classes, by their names or not; then, where one is named, datasets."""
    same, other, elsewhere = knobs.copy(), knobs.copy(), knobs.copy()
    same["target_classes"], same["auxiliary_classes"], same["target_dataset"] = "low", "low", ""
    other["target_classes"], other["auxiliary_classes"], other["target_dataset"] = "low", "high", ""
    called = other.copy()
    called["auxiliary_labels"] = "random"
    parts = (*heard_by(same, PANELS), *heard_by(other, PANELS), *heard_by(called, PANELS))
    if not knobs["target_dataset"]:
        return parts
    here = knobs.copy()
    here["target_dataset"] = ""
    return (*parts, *heard_by(here, PANELS), *heard_by(elsewhere, PANELS))
