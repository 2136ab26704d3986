"""A clip of the whole gradient.

McMahan, Ramage, Talwar and Zhang 2018, https://arxiv.org/abs/1710.06963 (flat clipping).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import (
    EVERYTHING,
    FALLING,
    Error,
    Exchange,
    Range,
    Replay,
    Trace,
    UpdateDefence,
)
from fedtap.simulator.defences.source import Source
from fedtap.simulator.defences.stacks import along
from fedtap.simulator.leaks import Tensors


@dataclass(frozen=True, repr=False)
class Clip(UpdateDefence):
    """Shortens the whole gradient to an L2 norm: ``g min(1, norm / |g|)``, |g| its length.

    McMahan, Ramage, Talwar and Zhang 2018, https://arxiv.org/abs/1710.06963 (flat clipping).

    Args:
        norm: the most that is sent, in the gradient's units: times the learning rate it is that of the weights' change.
    """

    norm: Annotated[float, Range(strengths=FALLING[6:])]

    survives = EVERYTHING - {Trace.SCALE}

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        length = sum(tensor.double().square().flatten(1).sum(1) for tensor in gradients.values()) ** 0.5
        factor = (self.norm / torch.as_tensor(length).clamp_min(1e-300)).clamp_max(1)
        return {name: tensor * along(factor, tensor).to(tensor.dtype) for name, tensor in gradients.items()}

    def error(self, batch: int) -> Error | None:
        return None

    def replay(self, exchange: Exchange) -> Replay | None:
        return Replay(lambda dummy, sent: shortened(dummy, self.norm / exchange.steps), exact=True, prior=0.0)

    def averaged(self, times: int) -> Clip:
        return self

    def bound(self, norm: float) -> float:
        return min(norm, self.norm)

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return None

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """It fits every network."""


def shortened(gradients: Tensors, norm: float) -> dict[str, Tensor]:
    """Each gradient of a stack clipped, with a slope everywhere, in its own precision."""
    squares = torch.stack([tensor.flatten(1).square().sum(1) for tensor in gradients.values()]).sum(0)
    length = squares.clamp_min(1e-30).sqrt()
    return {name: tensor * along((norm / length).clamp_max(1), tensor) for name, tensor in gradients.items()}
