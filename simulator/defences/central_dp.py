"""Central differential privacy by Flower's own strategy wrapper.

McMahan, Ramage, Talwar and Zhang 2018, https://arxiv.org/abs/1710.06963.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Strategy
from torch import nn

from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import (
    EVERYTHING,
    FROM_0,
    Error,
    Exchange,
    Range,
    Replay,
    ServerDefence,
)
from fedtap.simulator.defences.local_dp import check_only_weights
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Tensors

_TINY = 1e-18
"""Change of the weights whose square float32 rounds to zero, so that a clip of it divides by zero."""


@dataclass(frozen=True, repr=False)
class CentralDP(ServerDefence):
    """Clips what the server received and adds noise to the average: Flower's strategy wrapper.

    McMahan, Ramage, Talwar and Zhang 2018, https://arxiv.org/abs/1710.06963. It protects the model from those who are
    sent it, and nobody from the server, which receives what it clips. Where one client fails, Flower's wrapper leaves
    the weights as they are.

    Args:
        clip: L2 norm of a client's change, in the gradient's units, as the clients' defences are.
        noise_multiplier: on an entry of the average the noise has ``noise_multiplier clip / nodes``.
    """

    clip: Annotated[float, Range()]
    noise_multiplier: Annotated[float, Range(ends=FROM_0)]

    survives = EVERYTHING  # the server receives what clients send before it acts

    def around(self, strategy: Strategy, learning_rate: float, nodes: int) -> Strategy:
        clip = self.clip * learning_rate
        return DifferentialPrivacyServerSideFixedClipping(strategy, self.noise_multiplier, clip, nodes)

    def check_change(self, change: Tensors, client: int) -> None:
        if all(bool((tensor.abs() < _TINY).all()) for tensor in change.values()):
            raise FedtapError(
                f"Client {client} sent back the weights that it was sent, and {self.name} cannot clip a change of "
                "length 0: raise --learning-rate."
            )

    def error(self, batch: int) -> Error | None:
        return None

    def replay(self, exchange: Exchange) -> Replay | None:
        return None  # nothing was done to what was sent

    def averaged(self, times: int) -> CentralDP:
        return self

    def bound(self, norm: float) -> float:
        return math.inf

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return None

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        check_only_weights(self.name, network)
