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
from fedtap.attackers.parts.adaptive import Objective, replayable
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.gradients import check_match
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak


@dataclass(frozen=True)
class DLG(Attack):
    """L-BFGS on ``|gradient(x, softmax(logits)) - leak|^2``; the label is the largest logit.

    Args:
        aware: as of iDLG.
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
        """Models that can be matched."""
        super().accepts(leak)
        if leak.protocol.classes == 1:
            raise FedtapError(
                "dlg seeks labels among several classes, and here is one logit: use idlg, which reads it."
            )
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        match = Objective(leak, self.adaptive, self.compiled)
        batch, classes = leak.protocol.batch, leak.protocol.classes

        def split(points: Tensor) -> tuple[Images, Tensor]:
            pixels, logits = points[:, : -batch * classes], points[:, -batch * classes :]
            return pixels.reshape(-1, *start.shape[1:]), logits.reshape(-1, batch, classes)

        def objective(points: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor]:
            points = points.detach().requires_grad_()
            images, logits = split(points)
            misfit = match(images, logits.softmax(dim=-1), lanes)
            (slope,) = torch.autograd.grad(misfit.sum(), points)
            return misfit.detach(), slope

        points = torch.cat([start.flatten(1), start.new_zeros(len(start), batch * classes)], dim=1)
        points, _ = minimise(objective, points, self.steps, history=self.history, floor=match.floor, label="DLG")
        images, logits = split(points)
        images, labels = images.clamp(0, 1), logits.argmax(dim=-1)
        return Reconstruction(images, labels, objective=match(images, labels))
