"""Does a learned attack see data unlike those that it was trained on?

Expect: images of another dataset come back with less than twice the error. Of classes that were left out of the
practice little comes back, since the stages lean on a label that they never met; an adversary without images of those
classes mends that by calling what it has by their names. Read each row beside its own floor: the floors move too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.scenario import Scenario


@dataclass(frozen=True)
class Shift(ImageScenario):
    """Auxiliary and target data alike; then of other classes, by their names or not; then, where named, of two
    datasets."""

    panels: ClassVar[Mapping[str, str]] = {"eavesdropper": "training_mean,ridge,coarse_git"}
    victims: int = 8

    def settings(self) -> Sequence[Scenario]:
        """Each shift under each threat model."""
        shifts: list[dict[str, str]] = [
            {"target_classes": "low", "auxiliary_classes": "low", "target_dataset": ""},
            {"target_classes": "low", "auxiliary_classes": "high", "target_dataset": ""},
            {"target_classes": "low", "auxiliary_classes": "high", "target_dataset": "", "auxiliary_labels": "random"},
        ]
        if self.target_dataset:
            shifts += [{"target_dataset": ""}, {}]
        return tuple(one.played(**shift) for shift in shifts for one in self.under_threat_models())
