"""What does an eavesdropper with auxiliary pairs see in a gradient, and what a server that knows the weights?

Expect: the learned attacks turn a gradient into a likeness in a millisecond, above every floor; from the same practice
pairs the weights themselves can be read, and with them, or as the server that knows them, the image comes back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.images import ImageScenario


@dataclass(frozen=True)
class GIT(ImageScenario):
    """One gradient of one image a victim; the pairs come from the compromised client."""

    panels: ClassVar[Mapping[str, str]] = {
        "eavesdropper": "grey,training_mean,nearest,ridge,lti(width=250,epochs=150,rate=1e-3),flat_mlp,coarse_git,"
        "identified(exact_git)",
        "curious_server": "rgap,exact_git(weighted=False),exact_git,fused_git",
    }
    victims: int = 4
