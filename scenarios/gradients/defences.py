"""Does a defence hold against an attacker that knows it?

Expect: not as it seems. Pruning, signs, Soteria, a clip or a little noise stop an attack that never heard of them, and
one that does to its own guess what the client did to the gradient sees far more. Beside each stands what it would have
guessed blind, and what it costs a client in time. With --accuracy-loss a model is trained with each, and of its
strengths the one is attacked that costs as much accuracy: then one can ask which hides most for the same price.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Delta, Option, sweep
from fedtap.simulator.scenario import Scenario

SLOW = (
    "Soteria is left out: it costs a client a backward pass for each feature of each image, so that training with it "
    "would take days. Without --accuracy-loss it is attacked untrained."
)


@dataclass(frozen=True)
class Defences(ImageScenario):
    """Each defence, and on the same victims each attack twice: as published, and adaptive to the defence."""

    victims: int = 4
    attack: str = (
        "idlg(steps=400),idlg(steps=400,adaptive=True),"
        "inverting_gradients(steps=300),inverting_gradients(steps=300,adaptive=True)"
    )
    defence: str = sweep(
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
    delta: Delta = 1e-5
    success_db: float | None = None
    accuracy_loss: Annotated[
        float,
        Option(
            "share of test images that each defence may cost the trained model: sets its strength; 0: as written", 0, 1
        ),
    ] = 0.0

    def settings(self) -> Sequence[Scenario]:
        """The defence as it is written; where a loss of accuracy is agreed on, at each of its strengths."""
        from fedtap.simulator.defences.notation import strengths

        if self.accuracy_loss and not self.rounds:
            raise FedtapError("A defence costs accuracy where a model is trained, and here none is: add --rounds.")
        if self.accuracy_loss and "soteria" in self.defence:
            warnings.warn(SLOW, stacklevel=1)
            return ()
        texts = strengths(self.defence) if self.accuracy_loss else (self.defence,)
        return tuple(self.played(defence=text) for text in texts)
