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

from fedtap.attackers.parts.checks import check_fields, check_slopes
from fedtap.attackers.parts.gradients import Match, check_match, squared_distance
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.priors import isotropic_variation, length, statistics_gap
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.leaks import GradientLeak, Leak, Tensors, UpdateLeak
from fedtap.simulator.progress import progress
from fedtap.simulator.wire.replay import BatchStatistics, stateless


@dataclass(frozen=True)
class GradInversion(Attack):
    """Adam on ``|gradient(x) - leak|^2 + priors(x) + consistency * |x - mean over seeds|^2``; the best seed wins."""

    leaks = (GradientLeak, UpdateLeak)

    steps: int = 2000
    step_size: float = 0.1
    smoothness: float = 1e-4
    shrinkage: float = 1e-6
    statistics: float = 0.1
    consistency: float = 0.01
    seeds: int = 4
    compiled: bool = False

    def __post_init__(self) -> None:
        check_fields(self, steps=1, seeds=1)

    @property
    def starts(self) -> int:
        """One for each seed."""
        return self.seeds

    def accepts(self, leak: Leak) -> None:
        """Models that can be matched and end in a layer that shows the labels."""
        super().accepts(leak)
        check_slopes(self, leak)
        last_linear(leak)
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        labels = recovered(leak).repeat_interleave(self.seeds, dim=0)
        extra = _Statistics(self.statistics) if _has_statistics(leak) else None
        match = Match(leak.repeat(self.seeds), squared_distance, extra, self.compiled)

        def prior(x: Images) -> torch.Tensor:
            group = x.reshape(-1, self.seeds, *x.shape[1:])
            apart = (group - group.mean(dim=1, keepdim=True).detach()).flatten(0, 1).flatten(1).square().sum(1)
            smooth = self.smoothness * isotropic_variation(x) + self.shrinkage * length(x)
            penalty: torch.Tensor = smooth + self.consistency * apart
            return penalty

        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=self.step_size)
        decay = CosineAnnealingLR(adam, self.steps)
        for _ in progress(self.steps, "GradInversion"):
            loss = match(x, labels) + prior(x)
            (x.grad,) = torch.autograd.grad(loss.sum(), x)
            adam.step()
            decay.step()
            x.data.clamp_(0, 1)
        x = x.detach()
        objective = (match(x, labels) + prior(x)).reshape(-1, self.seeds)
        best = objective.nan_to_num(nan=float("inf")).argmin(dim=1)
        rows = torch.arange(len(leak), device=x.device)
        chosen = rows * self.seeds + best
        return Reconstruction(x[chosen], labels[chosen], objective[rows, best])


@dataclass(frozen=True)
class _Statistics:
    weight: float

    def __call__(
        self, network: torch.nn.Module, weights: Tensors, buffers: Tensors, images: torch.Tensor
    ) -> torch.Tensor:
        return self.weight * statistics_gap(network, weights, buffers, images)


def _has_statistics(leak: Leak) -> bool:
    return any(
        isinstance(module, BatchStatistics) and module.running_mean is not None
        for module in stateless(leak.network).modules()
    )
