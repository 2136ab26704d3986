"""What does an attacker see who is wrong about the model's width or depth?

Expect: attacks that compute with the model's weights see nothing at all. What was trained on the gradient as a row of
numbers (ridge, LTI) does not notice. Coarse GIT, which lives on the last layer, bears a wrong depth, for that layer
still stands at the row's end, and not a wrong width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.scenario import Scenario


@dataclass(frozen=True)
class WrongArchitecture(ImageScenario):
    """Gradients of one model, read as if they were of another; auxiliary pairs too."""

    spent: ClassVar[tuple[str, ...]] = ("assumed",)
    panels: ClassVar[Mapping[str, str]] = {
        "curious_server": "idlg(steps=300)",
        "eavesdropper": "training_mean,ridge,lti(width=250,epochs=30,rate=1e-3),coarse_git(epochs=3)",
    }
    victims: int = 4
    assumed: Annotated[str, Option("the model that the attacker takes the victims' for", group="attack")] = sweep(
        "lenet", "lenet(width=11)", "lenet(width=16)", "lenet(depth=2)", "lenet(depth=4)"
    )

    def settings(self) -> Sequence[Scenario]:
        """Every attack takes the victims' model for the assumed one."""
        from fedtap.attackers import parse

        return tuple(
            one.played(
                attack=",".join(f"assuming({self.assumed!r},{attack.written()})" for attack in parse(one.named)),
                trained_attack="",
            )
            for one in self.under_threat_models()
        )
