"""iDLG: read the label off the last layer, then match the gradient by L-BFGS on the image alone.

Zhao, Mopuri and Bilen 2020. https://arxiv.org/abs/2001.02610
Departs from the authors' code in three ways: L-BFGS searches along its line (without that it diverges on many
images), it starts from U(0, 1) instead of N(0, 1), and batches of several images are allowed (`labels.recovered`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedtap.attackers.gradients.lbfgs import minimise
from fedtap.attackers.parts.adaptive import Objective, replayable
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.gradients import check_match
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak


@dataclass(frozen=True)
class IDLG(Attack):
    """L-BFGS on ``|gradient(x, recovered label) - leak|^2``.

    Args:
        aware: of the defence that is announced: it is done to the guess's gradient too, and a prior of pictures joins.
    """

    leaks = (GradientLeak, UpdateLeak)

    steps: int = 2400
    history: int = 80
    compiled: bool = False
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_fields(self, steps=1, history=1)

    def knows(self, defence: Defence) -> bool:
        """What can be replayed, where it is adaptive."""
        return self.adaptive and replayable(defence)

    def accepts(self, leak: Leak) -> None:
        """Models that can be matched and end in a layer that shows the labels."""
        super().accepts(leak)
        last_linear(leak)
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        labels = recovered(leak)
        match = Objective(leak, self.adaptive, self.compiled)

        def objective(points: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor]:
            misfit, slope = match.with_slope(points.reshape(-1, *start.shape[1:]), labels[lanes], lanes)
            return misfit, slope.flatten(1)

        points, _ = minimise(
            objective, start.flatten(1), self.steps, history=self.history, floor=match.floor, label="iDLG"
        )
        images = points.reshape(-1, *start.shape[1:]).clamp(0, 1)
        return Reconstruction(images, labels, objective=match(images, labels))
