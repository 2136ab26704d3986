"""Does a learned attack see data unlike those that it was trained on?

Expect: images of another dataset come back with less than twice the error. The stages of a trained attack lean on the
label, and fail on one that they never met: where auxiliary images keep their own labels and a class has none, the
attack falls back to its ridge regression for that class. Random labels, the default, meet every class whatever the
images are, and cost nothing. Read each row beside its own blind guess, which moves too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.scenario import Scenario


@dataclass(frozen=True)
class Shift(ImageScenario):
    """Auxiliary and target data of the same classes; of other classes, whose images keep their labels or get random
    ones; then, where named, of two datasets."""

    panels: ClassVar[Mapping[str, str]] = {"eavesdropper": "training_mean,ridge,coarse_git"}
    victims: int = 8

    def settings(self) -> Sequence[Scenario]:
        """Each shift under each threat model."""
        shifts: list[dict[str, str]] = [
            {"target_classes": "low", "auxiliary_classes": "low", "target_dataset": ""},
            {"target_classes": "low", "auxiliary_classes": "high", "target_dataset": "", "auxiliary_labels": "own"},
            {"target_classes": "low", "auxiliary_classes": "high", "target_dataset": "", "auxiliary_labels": "random"},
        ]
        if self.target_dataset:
            shifts += [{"target_dataset": ""}, {}]
        return tuple(one.played(**shift) for shift in shifts for one in self.under_threat_models())
