"""Options of scenarios whose rows say what a defence promises, and how often an attack succeeded against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.options import Delta, Option
from fedtap.simulator.scenario import Scenario


@dataclass(frozen=True)
class Promising(ImageScenario):
    """An image scenario with ε in its rows."""

    tried: ClassVar[str] = ""
    """The attacks that run where none is named."""

    delta: Delta = 1e-5
    success_db: Annotated[
        float, Option("PSNR from which an image is a success; 0: a recognisable one is", 0.0, 100.0, "attack")
    ] = 0.0

    def settings(self) -> Sequence[Scenario]:
        """This setting, with attacks."""
        return (self.played(attack=self.named or self.tried, trained_attack=""),)
