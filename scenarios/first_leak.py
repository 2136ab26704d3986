"""Does a photograph come back out of the gradient that a client sends?

Expect: yes. From one image's gradient on an untrained LeNet, iDLG rebuilds it almost to the bit, DLG most of them
without being told the label, and a short Inverting Gradients a blurred likeness; from an MLP's first layer it can
simply be read off. The blind guess beside them shows what would be seen without the gradient.
"""

from __future__ import annotations

from typing import Unpack

from scenarios.image import ImageKnobs, image_knobs, image_scenario
from simulator.scenario import Scenario


@image_knobs(victims=6)
def scenario(**knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """Undefended federated SGD. Where no attack is named: three that match gradients, and the closed form on an MLP."""
    if knobs["attack"]:
        return (image_scenario(**knobs),)
    matching, reading = knobs.copy(), knobs.copy()
    matching["attack"] = "idlg,dlg,inverting_gradients(steps=400)"
    reading["attack"], reading["model"] = "linear", "mlp"
    return image_scenario(**matching), image_scenario(**reading)
