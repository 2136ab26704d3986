"""Two records from their mean m and covariance C: with d their difference, ``C = d d^T / 4``, and they are m ± d / 2.

A baseline without a paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.simulator.attack import Attack, Reconstructed
from fedtap.simulator.leaks import Leak
from tests.support.moments.leak import MomentsLeak


@dataclass(frozen=True)
class Records(Reconstructed):
    """Records, in any order."""

    records: Float[Tensor, "victims batch features"]
    objective: Float[Tensor, "victims"]

    def columns(self, victim: int) -> dict[str, Any]:
        """Column `first`, a record."""
        return {"first": self.records[victim, 0].tolist()}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """The protocol's."""
        return {"records": (len(leak), leak.protocol.batch, *leak.protocol.shape)}


@dataclass(frozen=True)
class PairOfMoments(Attack[Records]):
    """The mean, plus and minus `scale` standard deviations along the first principal axis."""

    leaks = (MomentsLeak,)
    reconstructs = Records
    needs_weights = False

    scale: float = 1.0
    """Of the deviations; 1 is exact for two records."""

    @classmethod
    def suits(cls, leak: Leak) -> bool:
        """Any of its kind."""
        return isinstance(leak, MomentsLeak)

    def begin(self, leak: Leak, seed: int) -> Tensor:
        return torch.zeros(len(leak), 0)

    def reconstruct(self, leak: Leak, start: Tensor) -> Records:
        mean, covariance = leak.observed["mean"], leak.observed["covariance"]
        values, axes = torch.linalg.eigh(covariance)
        half = self.scale * values[:, -1:].clamp_min(0).sqrt() * axes[:, :, -1]
        signs = torch.arange(leak.protocol.batch, device=mean.device) % 2 * 2 - 1
        return Records(mean[:, None] + signs[:, None] * half[:, None], values[:, :-1].abs().sum(1))
