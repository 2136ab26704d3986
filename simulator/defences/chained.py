"""Defences one after the other: by where they act, whether they fit a model, and the noise that they announce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedtap.simulator.defences.defence import StepDefence, Update, UpdateDefence
from fedtap.simulator.defences.notation import described
from fedtap.simulator.defences.source import Source
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Protocol, Tensors


@dataclass(frozen=True)
class Chain(Update):
    """One defence of the update after the other; none of them is none at all."""

    parts: tuple[Update, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.parts)

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        for part in self.parts:
            gradients = part.stacked(gradients, draws)
        return dict(gradients)


@dataclass(frozen=True)
class Defences:
    """All that a client does, by where it acts."""

    step: StepDefence | None = None
    update: Chain = field(default_factory=Chain)


def parse(text: str) -> Defences:
    """Those of the defences as written on the command line that are the clients' own; `none` is none.

    Raises:
        FedtapError: no such defence, or a value out of range.
    """
    made = described(text)
    return Defences(
        step=next((one for one in made if isinstance(one, StepDefence)), None),
        update=Chain(tuple(one for one in made if isinstance(one, UpdateDefence))),
    )


def check_model(text: str, network: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse a network for which one of the defences is not what it says.

    Args:
        shape: of one input, without the batch.

    Raises:
        FedtapError: with the layer, the reason and what to use instead.
    """
    for part in described(text):
        part.check(network, shape)


def sigma(protocol: Protocol) -> float:
    """Standard deviation of the noise that is announced, on an entry of the gradient; 0 where none is.

    Each client of a sum adds its own, and the mean of n of them has it less by √n.
    The noise of all parts of a chain adds up by its variances; what a clip after it may take away is not taken off.
    Nothing else that is done to the gradient is modelled, nor is a defence that is not known here: an attack that knows
    the defence by this alone goes on as if there were no more to it, and accepts the leak. Exact-GIT loses nothing to a
    clip, since a layer's input is a ratio of gradients.
    """
    try:
        parts = described(protocol.defence)
    except FedtapError:
        return 0.0
    errors = [part.error(protocol.batch // protocol.summed) for part in parts]
    return math.sqrt(sum(error.spread**2 for error in errors if error) / protocol.summed)
