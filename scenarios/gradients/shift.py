"""Does a learned attack see what it never practised on?

Expect: images of another world come back with less than twice the error. Of classes that were left out of the practice
little comes back, since the stages lean on a label that they never met; an adversary without images of those classes
mends that by calling what it has by their names. Read each row beside its own floor: the floors move too.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import ImageKnobs, heard_by, image_knobs
from fedtap.simulator.federation.settings import Scenario

PANELS = {"eavesdropper": "training_mean,ridge,coarse_git"}


@image_knobs(listener="", victims=8)
def scenario(**knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """Practice and victims alike; then of other classes, by their names or not; then, where one is named, worlds."""
    same, other, elsewhere = knobs.copy(), knobs.copy(), knobs.copy()
    same["victims_classes"], same["practice_classes"], same["victims_world"] = "low", "low", ""
    other["victims_classes"], other["practice_classes"], other["victims_world"] = "low", "high", ""
    called = other.copy()
    called["practice_labels"] = "random"
    parts = (*heard_by(same, PANELS), *heard_by(other, PANELS), *heard_by(called, PANELS))
    if not knobs["victims_world"]:
        return parts
    here = knobs.copy()
    here["victims_world"] = ""
    return (*parts, *heard_by(here, PANELS), *heard_by(elsewhere, PANELS))
