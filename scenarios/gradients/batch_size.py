"""How many images must a client average over before its gradient hides them?

Expect: the closed form on an MLP's first layer reads off single images and loses more of a batch the larger it is;
gradient matching falls from a near-perfect picture at one image to little over the blind guess at sixteen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class BatchSize(ImageScenario):
    """One step of federated SGD on a batch, undefended."""

    matching: ClassVar[str] = "idlg(steps=600),inverting_gradients(steps=600)"
    batch: int = sweep(1, 2, 4, 8, 16)
    victims: int = 4
