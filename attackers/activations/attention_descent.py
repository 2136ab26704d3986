"""Plain gradient descent on attention: what Newton's method is held against.

The loss of Deng, Song, Xie and Yang 2023, https://arxiv.org/abs/2310.12462: ``|F(X) - B|^2 + gamma |X|^2``.
Departs from textbook descent in one way: each start has a step of its own, which grows by a tenth while the loss falls
and is halved where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtap.attackers.activations.block import begun, lowest, prepared
from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import Attack, Inputs
from fedtap.simulator.leaks import AttentionLeak, Leak

FIRST, MORE, LESS, LEAST = 1e-3, 1.1, 0.5, 1e-16
"""A step's length per slope at first; its change after a step that lowers the loss, and after one that does not; and
where a start stops."""

SMALL = 1e-12
"""A residual that is this share of the output is as good as zero."""


@dataclass(frozen=True)
class AttentionDescent(Attack[Inputs]):
    """Steps down the slope, each start with its own length; of several starts the lowest loss.

    Args:
        steps: at most.
        gamma: the paper's regulariser.
        restarts: starting points for each victim.
    """

    leaks = (AttentionLeak,)
    guesses = Inputs

    steps: int = 2000
    gamma: float = 0.0
    restarts: int = 1

    def __post_init__(self) -> None:
        check_fields(self, steps=1, restarts=1)

    @property
    def starts(self) -> int:
        """As many as the restarts."""
        return self.restarts

    def begin(self, leak: Leak, seed: int) -> Tensor:
        return begun(leak, seed)

    def reconstruct(self, leak: Leak, start: Tensor) -> Inputs:
        block, target, x = prepared(leak, start, self.starts)
        size, lanes = target.flatten(1).norm(dim=1), len(x)
        length, steps = x.new_full((lanes,), FIRST), torch.zeros(lanes, dtype=torch.long, device=x.device)
        x = x.clone().requires_grad_()  # the start stays as it is
        for _ in range(self.steps):
            misfit = (block(x) - target).flatten(1).square().sum(1)
            loss = misfit + self.gamma * x.flatten(1).square().sum(1)
            (slope,) = torch.autograd.grad(loss.sum(), x)
            going = (misfit.detach().sqrt() > SMALL * size) & (length > LEAST)
            if not going.any():
                break
            with torch.no_grad():
                there = x - length[:, None, None] * slope
                after = (block(there) - target).flatten(1).square().sum(1)
                kept = going & (after + self.gamma * there.flatten(1).square().sum(1) < loss)
                x[kept] = there[kept]
                length *= torch.where(kept, MORE, torch.where(going, LESS, 1.0))
                steps += going
        with torch.no_grad():
            misfit = (block(x) - target).flatten(1).square().sum(1)
            loss = misfit + self.gamma * x.flatten(1).square().sum(1)
        return lowest(self.starts, x.detach(), loss, steps, misfit.sqrt() <= SMALL * size)
