"""Gaussian noise on what is sent.

Dwork and Roth 2014, appendix A, https://doi.org/10.1561/0400000042; against gradient inversion, Zhu, Liu and Han
2019, https://arxiv.org/abs/1906.08935.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import (
    EVERYTHING,
    FROM_0,
    RISING,
    Density,
    Error,
    Exchange,
    Range,
    Replay,
    UpdateDefence,
    unchanged,
)
from fedtap.simulator.defences.source import Source, gaussian
from fedtap.simulator.defences.stacks import each
from fedtap.simulator.leaks import Tensors


@dataclass(frozen=True, repr=False)
class Noise(UpdateDefence):
    """Adds Gaussian noise to each entry.

    By itself it gives no differential privacy: nothing bounds what it must hide. After a clip it does.
    Dwork and Roth 2014, appendix A, https://doi.org/10.1561/0400000042; against gradient inversion, Zhu, Liu and Han
    2019, https://arxiv.org/abs/1906.08935.

    Args:
        sigma: its standard deviation, in the gradient's units.
    """

    sigma: Annotated[float, Range(ends=FROM_0, strengths=RISING)]

    survives = EVERYTHING

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        def noisy(row: Tensor, source: Source) -> Tensor:
            return gaussian(row, self.sigma, source)

        return {name: each(noisy, gradients[name], draws) for name in sorted(gradients)}

    def error(self, batch: int) -> Error | None:
        return Error(Density.GAUSSIAN, self.sigma)

    def replay(self, exchange: Exchange) -> Replay | None:
        return Replay(unchanged, exact=True, prior=0.0)

    def averaged(self, times: int) -> Noise:
        return type(self)(self.sigma / math.sqrt(times))

    def bound(self, norm: float) -> float:
        return math.inf

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return Gaussian(self.sigma, clip, "client", adjacency, releases)

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """It fits every network."""
