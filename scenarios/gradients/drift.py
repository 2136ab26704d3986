"""Does a learned attack still work on a client whose weights have moved since the attack was trained?

Expect: no, if it was trained at one draw of the weights: a few steps of SGD take it below the blind guess, because what
it learned leans on small differences that any drift drowns. Practice along trainings of the compromised client's
own (--auxiliary-trainings 12) still sees after thousands of steps, less sharply. A server that trains its attack anew,
or that knows the weights, loses nothing to global rounds. A server that knows the broadcast weights alone estimates the
victim's together with the image (--attack drift_git), and sees more than an attack that was trained before the drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class Drift(ImageScenario):
    """A victim trains by itself from the broadcast weights, then shares one gradient."""

    panels: ClassVar[Mapping[str, str]] = {"eavesdropper": "training_mean,ridge,coarse_git"}
    victims: int = 8
    local_samples: int = sweep(0, 32, 128, 512)
    local_epochs: int = 10
