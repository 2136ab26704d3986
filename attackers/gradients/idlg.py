"""iDLG: read the label off the last layer, then match the gradient by L-BFGS on the image alone.

Zhao, Mopuri and Bilen 2020. https://arxiv.org/abs/2001.02610
Departs from the authors' code in three ways: L-BFGS searches along its line (without that it diverges on many
images), it starts from U(0, 1) instead of N(0, 1), and batches of several images are allowed (`labels.recovered`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedtap.attackers.gradients.lbfgs import minimise
from fedtap.attackers.gradients.matching import MATCHED, check_matching
from fedtap.attackers.parts.adaptive import MatchingObjective, replayable
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.labels import recovered
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak
from fedtap.simulator.models.language import LanguageModel


@dataclass(frozen=True)
class IDLG(Attack):
    """L-BFGS on ``|gradient(x, recovered label) - leak|^2``."""

    leaks = MATCHED

    steps: int = 2400
    """Evaluations of the matching loss and its gradient, at most, for each start."""
    history: int = 80
    """Pairs of (step, change of gradient) from which L-BFGS builds its inverse Hessian."""
    compiled: bool = False
    """Whether the matching loss runs through `torch.compile`: half a minute to start, then about twice as fast."""
    adaptive: bool = False
    """Whether the announced defence is applied to the reconstruction's gradient too, and an image prior is added."""

    @classmethod
    def suits(cls, leak: Leak) -> bool:
        """Gradients and updates of models on images."""
        return isinstance(leak, GradientLeak | UpdateLeak) and not isinstance(leak.network, LanguageModel)

    def __post_init__(self) -> None:
        check_fields(self, steps=1, history=1)

    def knows(self, defence: Defence) -> bool:
        """Whether it is adaptive and can replay this defence."""
        return self.adaptive and replayable(defence)

    def accepts(self, leak: Leak) -> None:
        """Networks that torch.func can differentiate twice and whose last layer shows the labels."""
        super().accepts(leak)
        check_matching(self, leak, signs=True)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        labels = recovered(leak)  # the class c with dL/dz_c < 0, equation 5 of the paper
        match = MatchingObjective(leak, self.adaptive, self.compiled)

        def objective(points: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
            images = points.reshape(-1, *start.shape[1:])
            matching_loss, input_gradient = match.with_input_gradient(images, labels[elements], elements)
            return matching_loss, input_gradient.flatten(1)

        points, _ = minimise(
            objective,
            start.flatten(1),
            self.steps,
            history=self.history,
            tolerance=match.tolerance,
            label="iDLG",
            image=start.shape[1:],
        )
        images = points.reshape(-1, *start.shape[1:]).clamp(0, 1)
        return Reconstruction(images, labels, objective=match(images, labels))
