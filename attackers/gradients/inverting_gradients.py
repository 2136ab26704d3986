"""Inverting Gradients: find images whose gradient points where the leaked one points.

Geiping, Bauermeister, Dröge and Moeller, NeurIPS 2020. https://arxiv.org/abs/2003.14053
Departs from the authors' code in three ways: 2,000 steps instead of 4,800; a step size of 0.03 and a smoothness of 0.01
instead of 0.1 and 0.2, which do better on LeNet (chosen on training images); a start from U(0, 1) instead of N(0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import MultiStepLR

from fedtap.attackers.parts.adaptive import informed, replayable
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.gradients import Match, check_match, cosine_distance
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.priors import total_variation
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak
from fedtap.simulator.progress import progress


@dataclass(frozen=True)
class InvertingGradients(Attack):
    """Signed Adam on ``1 - cos(gradient(x), leak) + smoothness * TV(x)``, keeping x in [0, 1].

    Args:
        aware: of the defence that is announced: it is done to the guess's gradient too, and adds to the smoothness.
    """

    leaks = (GradientLeak, UpdateLeak)

    steps: int = 2000
    step_size: float = 0.03
    smoothness: float = 0.01
    compiled: bool = False
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_fields(self, steps=1)

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
        signs = leak.protocol.optimiser == "adam"
        known = informed(leak, cosine_distance, weighed=False) if self.adaptive or signs else None
        match = Match(leak, known.misfit if known else cosine_distance, compiled=self.compiled)
        # |d|^2 / |leak|^2 is 2 (1 - cos) where the lengths are right
        smoothness = self.smoothness + known.weights / 2 if known else self.smoothness
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=self.step_size)
        decay = MultiStepLR(adam, [self.steps * eighths // 8 for eighths in (3, 5, 7)], gamma=0.1)
        for _ in progress(self.steps, "Inverting Gradients"):
            loss = match(x, labels) + smoothness * total_variation(x)
            (slope,) = torch.autograd.grad(loss.sum(), x)  # victims do not touch: their sum splits cleanly
            x.grad = slope.sign()
            adam.step()
            decay.step()
            x.data.clamp_(0, 1)
        x = x.detach()
        return Reconstruction(x, labels, objective=match(x, labels) + smoothness * total_variation(x))
