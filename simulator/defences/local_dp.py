"""Local differential privacy by Flower's own mod.

Dwork and Roth 2014, theorem A.1, https://doi.org/10.1561/0400000042.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from flwr.app import DEFAULT_TTL, Array, ArrayRecord, Context, Message, MessageType, Metadata, RecordDict
from flwr.clientapp.mod import LocalDpMod
from jaxtyping import Float
from torch import Tensor, nn

from fedtap.simulator.attack import numpy_seeded
from fedtap.simulator.defences.accountant import Gaussian, flower_local_dp
from fedtap.simulator.defences.clip import Clip, shortened
from fedtap.simulator.defences.defence import (
    EVERYTHING,
    FALLING,
    HOW_TO_FIX,
    Density,
    Error,
    Exchange,
    Range,
    Replay,
    Trace,
    UpdateDefence,
)
from fedtap.simulator.defences.source import Source, gaussian
from fedtap.simulator.defences.stacks import each, flat, unflat
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Tensors, float_buffers


@dataclass(frozen=True, repr=False)
class LocalDP(UpdateDefence):
    """Clips the whole gradient and adds Gaussian noise of ``sensitivity √(2 ln(1.25 / δ)) / ε``: Flower's `LocalDpMod`.

    Dwork and Roth 2014, theorem A.1, https://doi.org/10.1561/0400000042, which is proved for ε below 1 alone: beyond,
    the noise is not what its ε says. One exchange of one client is what it protects, if `sensitivity` is twice `clip`.

    A simulation calls Flower's mod itself, which draws from numpy's global generator, a Mersenne Twister and no
    cryptographic one. A real client's noise is the operating system's, at the same clip and standard deviation.

    Args:
        clip: L2 norm, in the gradient's units; Flower's own is that of the weights' change, `clip` times the rate.
        sensitivity: in the gradient's units too; Flower leaves it to the user.
        epsilon: above 0. (Flower takes 0 too, and then its noise is infinite.)
        delta: between 0 and 1.
    """

    clip: Annotated[float, Range()]
    sensitivity: Annotated[float, Range()]
    epsilon: Annotated[float, Range(strengths=FALLING[:12])]
    delta: Annotated[float, Range(high=1)]

    survives = EVERYTHING - {Trace.SCALE}

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        mod, sigma = LocalDpMod(self.clip, self.sensitivity, self.epsilon, self.delta), self.sigma

        def protected(row: Tensor, source: Source) -> Tensor:
            if source is None:
                clipped = Clip(self.clip)({"update": row}, None)["update"]
                return gaussian(clipped, sigma, None)
            return _through(mod, row, source)

        with _quiet():
            return unflat(each(protected, flat(gradients), draws), gradients)

    @property
    def sigma(self) -> float:
        """Standard deviation of its noise."""
        return flower_local_dp(self.clip, self.sensitivity, self.epsilon, self.delta, "replace").sigma

    def error(self, batch: int) -> Error | None:
        return Error(Density.GAUSSIAN, self.sigma)

    def replay(self, exchange: Exchange) -> Replay | None:
        return Replay(lambda dummy, sent: shortened(dummy, self.clip / exchange.steps), exact=True, prior=0.0)

    def averaged(self, times: int) -> LocalDP:
        return self

    def bound(self, norm: float) -> float:
        return math.inf

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        once = flower_local_dp(self.clip, self.sensitivity, self.epsilon, self.delta, adjacency)
        return dataclasses.replace(once, releases=releases)

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        check_only_weights(self.name, network)


def check_only_weights(name: str, network: nn.Module) -> None:
    """Refuse a network that sends more than weights, for a defence of this name that is for weights.

    Raises:
        FedtapError: it has BatchNorm.
    """
    if buffers := float_buffers(network):
        raise FedtapError(
            f"{name} is for weights, and this model also sends {next(iter(buffers))}, for "
            f"whose privacy nothing accounts: {HOW_TO_FIX}."
        )


def _through(mod: LocalDpMod, row: Float[Tensor, "entries"], draw: torch.Generator) -> Float[Tensor, "entries"]:
    """What a client's mod makes of an exchange in which zeros were sent and `row` comes back."""
    row = row.contiguous().clone()
    if not row.any():
        row[0] = 1e-18  # the mod divides by the norm
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, DEFAULT_TTL, MessageType.TRAIN)  # of no run: none need be going on
    content = RecordDict({"arrays": _record(torch.zeros_like(row))})
    order = Message(content=content, metadata=metadata)  # type: ignore[call-overload]

    def client(order: Message, context: Context) -> Message:
        content = RecordDict({"arrays": _record(row)})
        return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]

    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with numpy_seeded(int(torch.randint(2**32, (), generator=draw))):
        answer = mod(order, context, client)
    return torch.from_numpy(answer.content.array_records["arrays"]["update"].numpy()).to(row.dtype)


def _record(row: Tensor) -> ArrayRecord:
    return ArrayRecord({"update": Array(row.numpy())})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the mod's two lines in the log for each exchange."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.WARNING if before < logging.WARNING else before)
    try:
        yield
    finally:
        logger.setLevel(before)
