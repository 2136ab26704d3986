"""Pruning of what is sent.

Aji and Heafield 2017, https://arxiv.org/abs/1704.05021; against gradient inversion, Zhu, Liu and Han 2019,
https://arxiv.org/abs/1906.08935.
Departs from both in one way: one threshold for all layers, none for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import (
    DROPPED,
    FROM_0,
    Error,
    Exchange,
    Range,
    Replay,
    Trace,
    UpdateDefence,
)
from fedtap.simulator.defences.source import Source
from fedtap.simulator.defences.stacks import flat, unflat
from fedtap.simulator.leaks import Tensors


@dataclass(frozen=True, repr=False)
class Prune(UpdateDefence):
    """Sets a share of the entries to 0, the smallest of the whole gradient.

    Aji and Heafield 2017, https://arxiv.org/abs/1704.05021; against gradient inversion, Zhu, Liu and Han 2019,
    https://arxiv.org/abs/1906.08935. Departs from both in one way: one threshold for all layers, none for each.

    Args:
        share: of the entries that are dropped, rounded to whole ones; one at least is kept. Of equals, those that come
            first in the order of the names are dropped first.
    """

    share: Annotated[float, Range(high=1, ends=FROM_0, strengths=DROPPED)]

    survives = frozenset({Trace.SIZES})

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        rows = flat(gradients)
        dropped = min(round(self.share * rows.shape[1]), rows.shape[1] - 1)
        smallest = rows.abs().sort(dim=1, stable=True).indices[:, :dropped]
        return unflat(rows.scatter(1, smallest, 0.0), gradients)

    def error(self, batch: int) -> Error | None:
        return None

    def replay(self, exchange: Exchange) -> Replay | None:
        """What was sent shows which entries were kept."""
        return Replay(_kept, exact=True, prior=1e-3)

    def averaged(self, times: int) -> Prune:
        return self

    def bound(self, norm: float) -> float:
        return norm  # it shortens

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return None

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """It fits every network."""


def _kept(dummy: Tensors, sent: Tensors) -> dict[str, Tensor]:
    return {name: torch.where(sent[name] == 0, 0.0, tensor) for name, tensor in dummy.items()}
