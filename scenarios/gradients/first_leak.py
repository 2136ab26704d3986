"""Does a photograph come back out of the gradient that a client sends?

Expect: yes. From one image's gradient on an untrained LeNet, iDLG rebuilds it almost to the bit, DLG most of them
without being told the label, and a short Inverting Gradients a blurred likeness; from an MLP's first layer it can
simply be read off. The blind guess beside them shows what would be seen without the gradient.
"""

from __future__ import annotations

from typing import Unpack

from fedtap.scenarios.gradients.image import ImageKnobs, image_knobs, matching_and_reading
from fedtap.simulator.federation.settings import Scenario


@image_knobs(victims=6)
def scenario(**knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """One step of federated SGD on one image, undefended."""
    return matching_and_reading(knobs, "idlg,dlg(steps=1200),inverting_gradients(steps=500)")
