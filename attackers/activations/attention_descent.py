"""Plain gradient descent on attention: the baseline for Newton's method.

The loss of Deng, Song, Xie and Yang 2023, https://arxiv.org/abs/2310.12462: ``|F(X) - B|^2 + gamma |X|^2``.
Departs from textbook descent in one way: each start has a step of its own, which grows by a tenth while the loss falls
and is halved where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtap.attackers.activations.block import begun, float64_problem, lowest
from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import Attack, Inputs
from fedtap.simulator.leaks import AttentionLeak, Leak

_FIRST, _RISE, _FALL, _LEAST = 1e-3, 1.1, 0.5, 1e-16
"""First step size; its factor after a step that lowers the loss, and after one that does not; and the step size at
which a start ends."""

_CONVERGED = 1e-12
"""Norm of the residual, as a share of the output's, at which a start has converged."""


@dataclass(frozen=True)
class AttentionDescent(Attack[Inputs]):
    """Gradient descent with a step size for each start; the start of lowest loss is kept."""

    leaks = (AttentionLeak,)
    reconstructs = Inputs

    steps: int = 2000
    """Gradient steps, at most."""
    gamma: float = 0.0
    """Weight of ``|X|^2``; the paper's gamma."""
    restarts: int = 1
    """Starting points of each victim."""

    def __post_init__(self) -> None:
        check_fields(self, steps=1, restarts=1)

    @property
    def starts(self) -> int:
        """The restarts."""
        return self.restarts

    def begin(self, leak: Leak, seed: int) -> Tensor:
        return begun(leak, seed)

    def reconstruct(self, leak: Leak, start: Tensor) -> Inputs:
        block, target, x = float64_problem(leak, start, self.starts)
        size, elements = target.flatten(1).norm(dim=1), len(x)
        length, steps = x.new_full((elements,), _FIRST), torch.zeros(elements, dtype=torch.long, device=x.device)
        x = x.clone().requires_grad_()  # the start stays as it is
        for _ in range(self.steps):
            residual = (block(x) - target).flatten(1).square().sum(1)
            loss = residual + self.gamma * x.flatten(1).square().sum(1)
            # no start's loss depends on another's input, so the gradient of the sum is each one's own
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            going = (residual.detach().sqrt() > _CONVERGED * size) & (length > _LEAST)
            if not going.any():
                break
            with torch.no_grad():
                # x - t grad: a step of length t, taken where it lowers |F(X) - B|^2 + gamma |X|^2
                there = x - length[:, None, None] * gradient
                after = (block(there) - target).flatten(1).square().sum(1)
                kept = going & (after + self.gamma * there.flatten(1).square().sum(1) < loss)
                x[kept] = there[kept]
                # t grows by a tenth after a step that is kept, and is halved after one that is not
                length *= torch.where(kept, _RISE, torch.where(going, _FALL, 1.0))
                steps += going
        with torch.no_grad():
            residual = (block(x) - target).flatten(1).square().sum(1)
            loss = residual + self.gamma * x.flatten(1).square().sum(1)
        return lowest(self.starts, x.detach(), loss, steps, residual.sqrt() <= _CONVERGED * size)
