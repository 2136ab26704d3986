"""GradInversion: match the gradient under image priors, with several seeds that hold each other to their mean.

Yin, Mallya, Vahdat, Alvarez, Kautz and Molchanov, CVPR 2021. https://arxiv.org/abs/2104.07586
Departs from the paper, whose code is not public, in four ways: 2,000 steps instead of 20,000, no noise added to the
steps, seeds are not registered to each other before their mean is taken, and labels come from `labels.recovered`,
which finds repeated ones too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from fedtap.attackers.gradients.matching import MATCHED, check_matching
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.gradients import Match, squared_distance
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.priors import isotropic_variation, length, statistics_gap
from fedtap.attackers.parts.repeated import Repeated, adam, capture_on
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.film import shown
from fedtap.simulator.leaks import Leak, Tensors
from fedtap.simulator.progress import progress
from fedtap.simulator.wire.replay import BatchStatistics, stateless


@dataclass(frozen=True)
class GradInversion(Attack):
    """Adam on ``|gradient(x) - leak|^2 + priors(x) + consistency * |x - mean over seeds|^2``; the best seed wins."""

    leaks = MATCHED

    steps: int = 2000
    """Iterations of Adam."""
    step_size: float = 0.1
    """Adam's highest learning rate, in units of the pixel range; it falls to 0 along a cosine."""
    smoothness: float = 1e-4
    """Weight of total variation, a sum of l2 norms of pixel differences; the paper's alpha_TV."""
    shrinkage: float = 1e-6
    """Weight of the images' l2 norm; the paper's alpha_l2."""
    statistics: float = 0.1
    """Weight of the distance from BatchNorm's running statistics, where the network has any; the paper's alpha_BN."""
    consistency: float = 0.01
    """Weight of the squared distance from the mean over seeds; the paper's alpha_group."""
    seeds: int = 4
    """Starting points of each victim, optimised together."""
    compiled: bool = False
    """Whether the matching loss runs through `torch.compile`: half a minute to start, then about twice as fast."""

    def __post_init__(self) -> None:
        check_fields(self, steps=1, seeds=1)

    @property
    def starts(self) -> int:
        """Starting points for each victim: one for each seed."""
        return self.seeds

    def accepts(self, leak: Leak) -> None:
        """Networks that torch.func can differentiate twice and whose last layer shows the labels."""
        super().accepts(leak)
        check_matching(self, leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        labels = recovered(leak).repeat_interleave(self.seeds, dim=0)
        extra = _Statistics(self.statistics) if _has_statistics(leak) else None
        match = Match(leak.repeat(self.seeds), squared_distance, extra, self.compiled)

        def prior(x: Images) -> torch.Tensor:
            # R_group = |x - mean over seeds|^2, equation 11 of the paper, without registration
            group = x.reshape(-1, self.seeds, *x.shape[1:])
            apart = (group - group.mean(dim=1, keepdim=True).detach()).flatten(0, 1).flatten(1).square().sum(1)
            smooth = self.smoothness * isotropic_variation(x) + self.shrinkage * length(x)
            penalty: torch.Tensor = smooth + self.consistency * apart
            return penalty

        x, capture = start.clone().requires_grad_(), capture_on(start.device)
        optimiser = adam(x, self.step_size, capture)
        decay = CosineAnnealingLR(optimiser, self.steps)

        losses = x.new_zeros(len(x))

        def descend() -> None:
            loss = match(x, labels) + prior(x)
            losses.copy_(loss.detach())
            # no start's loss depends on another's images: its group's mean is detached
            (x.grad,) = torch.autograd.grad(loss.sum(), x)
            optimiser.step()
            x.data.clamp_(0, 1)

        step = Repeated(descend, capture)
        for _ in progress(self.steps, "GradInversion"):
            step()
            decay.step()
            shown(lambda: (x[0], losses[0]))
        x = x.detach()
        # the seed with the lowest objective is kept: nothing here knows the truth
        objective = (match(x, labels) + prior(x)).reshape(-1, self.seeds)
        best = objective.nan_to_num(nan=float("inf")).argmin(dim=1)
        rows = torch.arange(len(leak), device=x.device)
        chosen = rows * self.seeds + best
        return Reconstruction(x[chosen], labels[chosen], objective[rows, best])


@dataclass(frozen=True)
class _Statistics:
    """``weight * sum over BatchNorm layers (|mean - running mean| + |variance - running variance|)``."""

    weight: float
    """Factor of the penalty, from 0."""

    def __call__(
        self, network: torch.nn.Module, weights: Tensors, buffers: Tensors, images: torch.Tensor
    ) -> torch.Tensor:
        return self.weight * statistics_gap(network, weights, buffers, images)


def _has_statistics(leak: Leak) -> bool:
    return any(
        isinstance(module, BatchStatistics) and module.running_mean is not None
        for module in stateless(leak.network).modules()
    )
