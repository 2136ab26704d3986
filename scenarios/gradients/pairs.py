"""How much practice does an attack need that learns?

Expect: the floors settle at once, the learned attacks gain with every doubling of the pairs, and the closed form that
reads the weights from the pairs goes from nothing to everything where the pairs outnumber a layer's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class Pairs(ImageScenario):
    """The same victims, attacked after training on more and more pairs."""

    panels: ClassVar[Mapping[str, str]] = {
        "eavesdropper": "training_mean,nearest,ridge,coarse_git,identified(exact_git)",
    }
    victims: int = 8
    pairs: int = sweep(100, 200, 400, 900)
