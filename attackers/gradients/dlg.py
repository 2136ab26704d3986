"""DLG, deep leakage from gradients: match the gradient by L-BFGS on the image and its label together.

Zhu, Liu and Han, NeurIPS 2019. https://arxiv.org/abs/1906.08935
Departs from the authors' code in three ways: L-BFGS searches along its line (without that it diverges on many
images), images start from U(0, 1) instead of N(0, 1), and label logits start at zero, which favours no class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtap.attackers.gradients.lbfgs import minimise
from fedtap.attackers.gradients.matching import MATCHED
from fedtap.attackers.parts.adaptive import MatchingObjective, replayable
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.gradients import check_match
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak


@dataclass(frozen=True)
class DLG(Attack):
    """L-BFGS on ``|gradient(x, softmax(logits)) - leak|^2``; the label is the largest logit."""

    leaks = MATCHED

    steps: int = 2400
    """Evaluations of the matching loss and its gradient, at most, for each start."""
    history: int = 80
    """Pairs of (step, change of gradient) from which L-BFGS builds its inverse Hessian."""
    compiled: bool = False
    """Whether the matching loss runs through `torch.compile`: half a minute to start, then about twice as fast."""
    adaptive: bool = False
    """Whether the announced defence is applied to the reconstruction's gradient too, and an image prior is added."""

    def __post_init__(self) -> None:
        check_fields(self, steps=1, history=1)

    def knows(self, defence: Defence) -> bool:
        """Whether it is adaptive and can replay this defence."""
        return self.adaptive and replayable(defence)

    def accepts(self, leak: Leak) -> None:
        """Networks of two or more logits that torch.func can differentiate twice."""
        super().accepts(leak)
        if leak.protocol.classes == 1:
            raise FedtapError(
                "dlg seeks labels among several classes, and here is one logit: use idlg, which reads it."
            )
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        match = MatchingObjective(leak, self.adaptive, self.compiled)
        batch, classes = leak.protocol.batch, leak.protocol.classes

        def split(points: Tensor) -> tuple[Images, Tensor]:
            pixels, logits = points[:, : -batch * classes], points[:, -batch * classes :]
            return pixels.reshape(-1, *start.shape[1:]), logits.reshape(-1, batch, classes)

        def objective(points: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
            points = points.detach().requires_grad_()
            images, logits = split(points)
            # D = |∇W' - ∇W|² of the paper's equation 3, with y' = softmax(logits)
            matching_loss = match(images, logits.softmax(dim=-1), elements)
            (gradient,) = torch.autograd.grad(matching_loss.sum(), points)
            return matching_loss.detach(), gradient

        # logits of zero give every class the probability 1 / classes
        points = torch.cat([start.flatten(1), start.new_zeros(len(start), batch * classes)], dim=1)
        points, _ = minimise(
            objective,
            points,
            self.steps,
            history=self.history,
            tolerance=match.tolerance,
            label="DLG",
            image=start.shape[1:],
        )
        images, logits = split(points)
        images, labels = images.clamp(0, 1), logits.argmax(dim=-1)
        return Reconstruction(images, labels, objective=match(images, labels))
