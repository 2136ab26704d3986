"""Quantisation of what is sent, rounded at random.

Suresh, Yu, Kumar and McMahan 2017, section 2.2, https://arxiv.org/abs/1611.00429. QSGD (Alistarh et al. 2017,
https://arxiv.org/abs/1610.02132) rounds at random too, on a grid from 0 to the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from torch import Tensor, nn

from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import (
    Density,
    Error,
    Exchange,
    Range,
    Replay,
    Trace,
    UpdateDefence,
    unchanged,
)
from fedtap.simulator.defences.source import Source, uniform
from fedtap.simulator.defences.stacks import along, each
from fedtap.simulator.leaks import Tensors


@dataclass(frozen=True, repr=False)
class Quantise(UpdateDefence):
    """Rounds each tensor to 2^bits equally spaced values from its least to its largest, at random and without bias.

    Suresh, Yu, Kumar and McMahan 2017, section 2.2, https://arxiv.org/abs/1611.00429.

    Args:
        bits: to an entry, 1 to 16. What is sent are still floating point numbers.
    """

    bits: Annotated[int, Range(1, 16, ends=(True, True), strengths=(8, 6, 5, 4, 3, 2, 1))]

    survives = frozenset({Trace.SIZES, Trace.LAYERS})

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        def drawn(row: Tensor, source: Source) -> Tensor:
            return uniform(row.shape, source)

        sent = {}
        for name in sorted(gradients):
            tensor = gradients[name]
            entries = tensor.flatten(1).double()
            low, high = along(entries.amin(1), tensor), along(entries.amax(1), tensor)
            step = ((high - low) / (2**self.bits - 1)).clamp_min(1e-300)
            place = (tensor.double() - low) / step
            place = (place + each(drawn, tensor, draws)).floor().clamp_max(2**self.bits - 1)
            sent[name] = (low + step * place).to(tensor.dtype)
        return sent

    def error(self, batch: int) -> Error | None:
        return Error(Density.ROUNDING, 0.0, self.steps)

    def steps(self, sent: Tensors) -> dict[str, Float[Tensor, "exchanges"]]:
        """Of each tensor's grid."""
        entries = {name: tensor.flatten(1) for name, tensor in sent.items()}
        return {name: (rows.amax(1) - rows.amin(1)) / (2**self.bits - 1) for name, rows in entries.items()}

    def replay(self, exchange: Exchange) -> Replay | None:
        return Replay(unchanged, exact=True, prior=0.0)

    def averaged(self, times: int) -> Quantise:
        return self

    def bound(self, norm: float) -> float:
        return math.inf

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return None

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """It fits every network."""
