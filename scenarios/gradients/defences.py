"""Does a defence hold against an attacker that knows it?

Expect: not as it seems. Pruning, signs, Soteria, a clip or a little noise stop an attack that never heard of them, and
one that does to its own guess what the client did to the gradient sees far more. Beside each stands what it would have
guessed blind, and what it costs a client in time. With --accuracy-loss a model is trained with each, and of its
strengths the one is attacked that costs as much accuracy: then one can ask which hides most for the same price.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Annotated, Unpack

from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.gradients.image import Delta, ImageKnobs, image_knobs, image_scenario
from fedtap.simulator.defences.notation import strengths
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import Scenario

DEFENCES = (
    "none",
    "clip(1.0)",
    "noise(0.01)",
    "laplace(0.01)",
    "prune(0.9)",
    "sign()",
    "quantise(4)",
    "clip(1.0)+noise(0.01)",
    "soteria(0.4)",
    "dp_sgd(1.0, 0.01)",
    "local_dp(1.0, 2.0, 8.0, 1e-05)",
    "precode(64)",
)

ATTACKS = (
    "idlg(steps=400),idlg(steps=400,adaptive=True),"
    "inverting_gradients(steps=300),inverting_gradients(steps=300,adaptive=True)"
)


SLOW = (
    "Soteria is left out: it costs a client a backward pass for each feature of each image, so that training with it "
    "would take days. Without --accuracy-loss it is attacked untrained."
)

AccuracyLoss = Annotated[
    float,
    Knob("share of test images that each defence may cost the trained model: sets its strength; 0: as written", 0, 1),
]


@image_knobs(victims=4, defence=DEFENCES, attack=ATTACKS, delta=1e-5, accuracy_loss=0.0)
def scenario(*, delta: Delta, accuracy_loss: AccuracyLoss, **knobs: Unpack[ImageKnobs]) -> tuple[Scenario, ...]:
    """Each defence, and on the same victims each attack twice: as published, and aware of the defence."""
    if accuracy_loss and not knobs["rounds"]:
        raise FedtapError("A defence costs accuracy where a model is trained, and here none is: add --rounds.")
    if accuracy_loss and "soteria" in knobs["defence"]:
        warnings.warn(SLOW, stacklevel=1)
        return ()
    parts = []
    for text in strengths(knobs["defence"]) if accuracy_loss else (knobs["defence"],):
        knobs["defence"] = text
        part = image_scenario(**knobs)
        parts.append(dataclasses.replace(part, delta=delta, success_db=None, accuracy_loss=accuracy_loss))
    return tuple(parts)
