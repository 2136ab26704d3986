"""Signs in the place of what is sent.

Bernstein, Wang, Azizzadenesheli and Anandkumar 2018, https://arxiv.org/abs/1802.04434; against gradient inversion, Wu,
Chen, Guo and Weinberger 2023 (LTI), https://arxiv.org/abs/2210.10880.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import Error, Exchange, Replay, Trace, UpdateDefence
from fedtap.simulator.defences.source import Source
from fedtap.simulator.defences.stacks import along
from fedtap.simulator.leaks import Tensors


@dataclass(frozen=True, repr=False)
class Sign(UpdateDefence):
    """Sends the sign of each entry, at the scale 1: -1, 0 or 1, whatever the gradient's length.

    Bernstein, Wang, Azizzadenesheli and Anandkumar 2018, https://arxiv.org/abs/1802.04434; against gradient inversion,
    Wu, Chen, Guo and Weinberger 2023 (LTI), https://arxiv.org/abs/2210.10880.
    """

    survives = frozenset({Trace.LAYERS})

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        return {name: tensor.sign() for name, tensor in gradients.items()}

    def error(self, batch: int) -> Error | None:
        return None

    def replay(self, exchange: Exchange) -> Replay | None:
        """``tanh(g / (softness rms(g)))``, for a slope to follow."""

        def softly(dummy: Tensors, sent: Tensors) -> dict[str, Tensor]:
            roots = {name: (tensor.flatten(1).square().mean(1) + 1e-30).sqrt() for name, tensor in dummy.items()}
            return {n: (tensor / along(exchange.softness * roots[n], tensor)).tanh() for n, tensor in dummy.items()}

        return Replay(softly, exact=False, prior=1.0)

    def averaged(self, times: int) -> Sign:
        return self

    def bound(self, norm: float) -> float:
        return math.inf  # the root of the number of entries, which is not known here

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return None

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """It fits every network."""
