"""Inverting Gradients: find images whose gradient points where the leaked one points.

Geiping, Bauermeister, Dröge and Moeller, NeurIPS 2020. https://arxiv.org/abs/2003.14053
Departs from the authors' code in three ways: 2,000 steps instead of 4,800; a step size of 0.03 and a smoothness of 0.01
instead of 0.1 and 0.2, which do better on LeNet (chosen on training images); a start from U(0, 1) instead of N(0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import MultiStepLR

from fedtap.attackers.gradients.matching import MATCHED, check_matching
from fedtap.attackers.parts.adaptive import informed, replayable
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.gradients import Match, cosine_distance
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.priors import total_variation
from fedtap.attackers.parts.repeated import Repeated, adam, capture_on
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.film import shown
from fedtap.simulator.leaks import Leak
from fedtap.simulator.progress import progress


@dataclass(frozen=True)
class InvertingGradients(Attack):
    """Signed Adam on ``1 - cos(gradient(x), leak) + smoothness * TV(x)``, keeping x in [0, 1]."""

    leaks = MATCHED

    steps: int = 2000
    """Iterations of Adam."""
    step_size: float = 0.03
    """Adam's learning rate, in units of the pixel range; it falls tenfold after 3/8, 5/8 and 7/8 of the steps."""
    smoothness: float = 0.01
    """Weight of the mean total variation against the cosine distance; the paper's alpha."""
    compiled: bool = False
    """Whether the matching loss runs through `torch.compile`: half a minute to start, then about twice as fast."""
    adaptive: bool = False
    """Whether the announced defence is applied to the reconstruction's gradient too, which also adds smoothness."""

    def __post_init__(self) -> None:
        check_fields(self, steps=1)

    def knows(self, defence: Defence) -> bool:
        """Whether it is adaptive and can replay this defence."""
        return self.adaptive and replayable(defence)

    def accepts(self, leak: Leak) -> None:
        """Networks that torch.func can differentiate twice and whose last layer shows the labels."""
        super().accepts(leak)
        check_matching(self, leak, signs=True)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        labels = recovered(leak)
        signs = leak.protocol.optimiser == "adam"  # one step of Adam sends g / (|g| + eps), the gradient's signs
        known = informed(leak, cosine_distance, weighed=False) if self.adaptive or signs else None
        match = Match(leak, known.distance if known else cosine_distance, compiled=self.compiled)
        # |g - leak|^2 / |leak|^2 = 2 (1 - cos) where |g| = |leak|, so a weight beside the former is halved here
        smoothness = self.smoothness + known.weights / 2 if known else self.smoothness
        x, capture = start.clone().requires_grad_(), capture_on(start.device)
        optimiser = adam(x, self.step_size, capture)
        decay = MultiStepLR(optimiser, [self.steps * eighths // 8 for eighths in (3, 5, 7)], gamma=0.1)

        losses = x.new_zeros(len(x))

        def descend() -> None:
            # equation 4 of the paper: 1 - <g, leak> / (|g| |leak|) + alpha TV(x)
            loss = match(x, labels) + smoothness * total_variation(x)
            losses.copy_(loss.detach())
            (input_gradient,) = torch.autograd.grad(loss.sum(), x)  # no victim's loss depends on another's image
            x.grad = input_gradient.sign()
            optimiser.step()
            x.data.clamp_(0, 1)

        step = Repeated(descend, capture)
        for _ in progress(self.steps, "Inverting Gradients"):
            step()
            decay.step()
            shown(lambda: (x[0], losses[0]))
        x = x.detach()
        return Reconstruction(x, labels, objective=match(x, labels) + smoothness * total_variation(x))
