"""Where a defence acts, as types: on what a client sends, or inside each of its local steps.

A defence is a value: a frozen dataclass whose fields are the arguments that it is written with. What it draws comes
from sources that it is handed: the operating system, or in a simulation a seeded generator for each exchange, so that
an exchange does not depend on its neighbours in a stack.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtap.simulator.defences.notation import Part
from fedtap.simulator.defences.source import Source
from fedtap.simulator.leaks import Tensors


class Named(ABC):
    """A defence as it is written. Values that it does not take are a FedtapError when it is made."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field, value in zip(dataclasses.fields(self), self.part.values, strict=True):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, value)

    @property
    def part(self) -> Part:
        """What it is in words."""
        return Part(self.name, dataclasses.astuple(self))  # type: ignore[call-overload]

    def __repr__(self) -> str:
        return str(self.part)


class UpdateDefence(ABC):
    """What is done to a gradient before it is sent, `update -> update`.

    The gradient is fedtap's: (weights before - weights after) / learning rate, the mean over the batch where one local
    step is taken and the sum of the steps' where several are. Norms and noise are in its units.
    """

    @abstractmethod
    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        """The gradients that are sent; each tensor with a leading axis of exchanges, one source for each."""

    @final
    def __call__(self, gradient: Tensors, draw: Source) -> dict[str, Tensor]:
        """The gradient that is sent; what is random comes from `draw`, in the order of the names."""
        one = {name: tensor.unsqueeze(0) for name, tensor in gradient.items()}
        return {name: tensor.squeeze(0) for name, tensor in self.stacked(one, [draw]).items()}


class StepDefence(ABC):
    """What is done inside each local step: it takes the place of the backward pass."""

    @abstractmethod
    def backward(
        self,
        network: nn.Module,
        images: Float[Tensor, "images channel height width"],
        labels: Int[Tensor, "images"],
        draw: Source,
    ) -> Float[Tensor, ""]:
        """Leave the gradient that the step is to follow in the parameters' `grad`; the mean cross-entropy.

        Raises:
            FedtapError: the network is none that can be defended so.
        """

    @abstractmethod
    def stacked(
        self,
        network: nn.Module,
        images: Float[Tensor, "exchanges batch channel height width"],
        labels: Int[Tensor, "exchanges batch"],
        draws: Sequence[Source],
    ) -> dict[str, Float[Tensor, "exchanges *parameter"]]:
        """The gradients of many exchanges of one step each, at the same weights; one source for each exchange."""


@dataclass(frozen=True)
class Chain(UpdateDefence):
    """One after the other; none of them is none at all."""

    parts: tuple[UpdateDefence, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.parts)

    def stacked(self, gradients: Tensors, draws: Sequence[Source]) -> dict[str, Tensor]:
        for part in self.parts:
            gradients = part.stacked(gradients, draws)
        return dict(gradients)
