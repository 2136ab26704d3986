"""What does an attacker see who is wrong about the model's width or depth?

Expect: attacks that compute with the model's weights see nothing at all. What has practised on the gradient as a row of
numbers (ridge, LTI) does not notice. Coarse GIT, which lives on the last layer, bears a wrong depth, for that layer
still stands at the row's end, and not a wrong width.
"""

from __future__ import annotations

from typing import Annotated, Unpack

from fedtap import attackers
from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.gradients.image import ImageKnobs, attacks_named, heard_by, image_knobs
from fedtap.simulator.federation.settings import Scenario

PANELS = {
    "curious_server": "idlg(steps=300)",
    "eavesdropper": "training_mean,ridge,lti(width=250,epochs=30,rate=1e-3),coarse_git(epochs=3)",
}

ASSUMED = ("lenet", "lenet(width=11)", "lenet(width=16)", "lenet(depth=2)", "lenet(depth=4)")


@image_knobs(threat_model="", victims=4, assumed=ASSUMED)
def scenario(
    *,
    assumed: Annotated[str, Knob("the model that the attacker takes the victims' for")],
    **knobs: Unpack[ImageKnobs],
) -> tuple[Scenario, ...]:
    """Gradients of one model, read as if they were of another; auxiliary pairs likewise."""
    if named := attacks_named(knobs):
        knobs["attack"], knobs["trained_attack"] = _assuming(assumed, named), ""
    return heard_by(knobs, {threat_model: _assuming(assumed, panel) for threat_model, panel in PANELS.items()})


def _assuming(model: str, panel: str) -> str:
    return ",".join(f"assuming({model!r},{attack.written()})" for attack in attackers.parse(panel))
