"""PRECODE: a variational bottleneck before the last layer, so that what flows back depends on what the client drew.

Scheliga, Mäder and Seeland 2022, https://arxiv.org/abs/2108.04725; the bottleneck is that of Alemi et al. 2017,
https://arxiv.org/abs/1612.00410.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import (
    EVERYTHING,
    Error,
    Exchange,
    ModelDefence,
    Range,
    Replay,
    Trace,
)
from fedtap.simulator.defences.layers import Inserted

BETA = 1e-3
"""Weight of the bottleneck's own loss; the paper's."""


@dataclass(frozen=True, repr=False)
class Precode(ModelDefence):
    """Puts a variational bottleneck before the last layer.

    Scheliga, Mäder and Seeland 2022, https://arxiv.org/abs/2108.04725.

    Args:
        features: between the bottleneck's encoder and its decoder.
    """

    features: Annotated[int, Range(1, 65536, ends=(True, True), strengths=(512, 256, 128, 64, 32, 16, 8, 4, 2, 1))]

    # it is a gradient of the model as announced, at a draw of the client's own
    survives = EVERYTHING - {Trace.SCALE, Trace.RATIOS}

    def install(self, network: nn.Module, last: str | None) -> nn.Module:
        if last is None:
            raise ValueError("precode stands before the linear layer that yields the logits, and there is none")
        parent, _, name = last.rpartition(".")
        layer = network.get_submodule(last)
        assert isinstance(layer, nn.Linear)
        bottleneck = Bottleneck(layer.in_features, self.features)
        setattr(network.get_submodule(parent), name, nn.Sequential(bottleneck, layer))
        return network

    def error(self, batch: int) -> Error | None:
        return None  # what the draw does to the gradient has no size that is announced

    def replay(self, exchange: Exchange) -> Replay | None:
        return None  # its draw is the client's own, and no part of what is sent shows it

    def averaged(self, times: int) -> Precode:
        return self

    def bound(self, norm: float) -> float:
        return math.inf

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return None

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """A network that has it was found to have a place for it, when it was installed."""


class Bottleneck(Inserted):
    """``decoder(mean + spread e)`` with e from N(0, I), where (mean, spread) are the encoder's.

    Only clients draw e. To anybody else it is 0.

    Args:
        width: of what is fed to it, and of what it returns.
        features: between encoder and decoder.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, 2 * features)
        self.decoder = nn.Linear(features, width)

    def forward(self, hidden: Float[Tensor, "images width"]) -> Float[Tensor, "images width"]:
        mean, spread = halves(self.encoder(hidden))
        return self.decoder(mean + spread * torch.randn_like(mean) if self.draws else mean)  # type: ignore[no-any-return]

    @property
    def penalised(self) -> nn.Module:
        """The encoder."""
        return self.encoder

    def penalty(self, output: Tensor) -> Float[Tensor, ""]:
        """``BETA KL(N(mean, spread^2) || N(0, I))``, the mean over the images."""
        mean, spread = halves(output)
        return BETA * (0.5 * (mean.square() + spread.square() - 1) - spread.log()).sum(-1).mean()


def halves(encoded: Float[Tensor, "images twice"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, the latter small to begin with: softplus(. - 5)."""
    mean, spread = encoded.chunk(2, dim=-1)
    return mean, F.softplus(spread - 5)
