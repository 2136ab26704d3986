"""A defence of another package, as its author writes it: one file.

Aji and Heafield 2017, https://arxiv.org/abs/1704.05021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import Error, Exchange, Range, Replay, Trace, UpdateDefence
from fedtap.simulator.defences.source import Source
from fedtap.simulator.leaks import Tensors


@dataclass(frozen=True, repr=False)
class TopK(UpdateDefence):
    """Keeps the k largest entries of each tensor.

    Aji and Heafield 2017, https://arxiv.org/abs/1704.05021.

    Args:
        k: entries that are kept.
    """

    k: Annotated[int, Range(1, ends=(True, False), strengths=(1000, 100, 10, 1))]

    survives = frozenset({Trace.SIZES, Trace.LAYERS})

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        sent = {}
        for name, tensor in gradients.items():
            rows = tensor.flatten(1)
            kept = rows.abs().topk(min(self.k, rows.shape[1])).indices
            sent[name] = torch.zeros_like(rows).scatter(1, kept, rows.gather(1, kept)).view_as(tensor)
        return sent

    def error(self, batch: int) -> Error | None:
        return None

    def replay(self, exchange: Exchange) -> Replay | None:
        return Replay(
            lambda guess, sent: {n: torch.where(sent[n] == 0, 0.0, tensor) for n, tensor in guess.items()},
            exact=True,
            prior=1e-3,
        )

    def averaged(self, times: int) -> TopK:
        return self

    def bound(self, norm: float) -> float:
        return norm

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return None

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """It fits every network."""
