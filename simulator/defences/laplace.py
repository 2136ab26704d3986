"""Laplace noise on what is sent.

Dwork, McSherry, Nissim and Smith 2006, https://doi.org/10.1007/11681878_14; against gradient inversion, Zhu, Liu and
Han 2019, https://arxiv.org/abs/1906.08935.
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
    RISING,
    Density,
    Error,
    Exchange,
    Range,
    Replay,
    UpdateDefence,
    unchanged,
)
from fedtap.simulator.defences.source import Source, laplace
from fedtap.simulator.defences.stacks import each
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Tensors


@dataclass(frozen=True, repr=False)
class Laplace(UpdateDefence):
    """Adds Laplace noise to each entry: the difference of two exponential variables, of standard deviation √2 scale.

    Dwork, McSherry, Nissim and Smith 2006, https://doi.org/10.1007/11681878_14; against gradient inversion, Zhu, Liu
    and Han 2019, https://arxiv.org/abs/1906.08935.

    Args:
        scale: mean size of the noise on an entry, in the gradient's units.
    """

    scale: Annotated[float, Range(strengths=RISING)]

    survives = EVERYTHING

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        def noisy(row: Tensor, source: Source) -> Tensor:
            return laplace(row, self.scale, source)

        return {name: each(noisy, gradients[name], draws) for name in sorted(gradients)}

    def error(self, batch: int) -> Error | None:
        return Error(Density.LAPLACE, math.sqrt(2) * self.scale)

    def replay(self, exchange: Exchange) -> Replay | None:
        return Replay(unchanged, exact=True, prior=0.0)

    def averaged(self, times: int) -> Laplace:
        return self  # a mean of Laplace variables is no Laplace variable

    def bound(self, norm: float) -> float:
        return math.inf

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        raise FedtapError(
            "No ε is known here for Laplace noise after a clip of the L2 norm: it would need one of the L1 "
            "norm; use noise(...), which is Gaussian."
        )

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """It fits every network."""
