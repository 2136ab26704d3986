"""What a defence is: one file each, whose class, named after the file, does it and answers every question about it.

The fields are the arguments, each annotated with its range; how it is written follows from them. There are no default
answers: a class that leaves a question out is abstract, and is refused. What a defence draws comes from sources that it
is handed: the operating system, or in a simulation a seeded generator for each exchange, so that an exchange does not
depend on its neighbours in a stack.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar, final, get_args, get_origin, get_type_hints

from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtap.simulator.defences.source import Source
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Tensors

if TYPE_CHECKING:  # scipy and Flower take seconds to import, and who reads a leak without a defence needs neither
    from flwr.serverapp.strategy import Strategy

    from fedtap.simulator.defences.accountant import Gaussian

HOOKS = ("model", "step", "update", "server")
"""Where a defence acts, in the order in which things happen: on the model before it is trained, on each local step, on
what the client sends, on the server's average."""

RISING = tuple(digit * 10.0**power for power in (-3, -2, -1, 0) for digit in (1, 2, 5))
FALLING = tuple(digit * 10.0**power for power in (3, 2, 1, 0, -1, -2) for digit in (5, 2, 1))
DROPPED = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Strengths to choose from, the weakest first: of noise, of a norm or an ε, and of a share that is left out."""

FIXED = "give --model module:function of your own, which returns opacus.validators.ModuleValidator.fix(model)"
HOW_TO_FIX = f"{FIXED}, with GroupNorm in BatchNorm's place"
"""What to do about a model that a defence does not fit."""


@dataclass(frozen=True)
class Range:
    """The values that an argument takes.

    Args:
        ends: whether `low` and `high` are among the values.
        strengths: values to choose from, the weakest first, where the defence does more or less by this argument.
    """

    low: float = 0.0
    high: float = math.inf
    ends: tuple[bool, bool] = (False, False)
    strengths: tuple[float, ...] = ()


FROM_0 = (True, False)
"""`ends` of a range that begins with its lower end."""


@dataclass(frozen=True)
class Argument:
    """One field of a defence: its name, its range, and whether its values are whole numbers."""

    name: str
    range: Range
    whole: bool

    def __str__(self) -> str:
        low = f"{'from' if self.range.ends[0] else 'above'} {self.range.low:g}"
        high = "" if self.range.high == math.inf else f" {'to' if self.range.ends[1] else 'and below'} "
        most = "" if self.range.high == math.inf else f"{self.range.high:g}"
        return f"a {'whole ' if self.whole else ''}number {low}{high}{most}"

    def fits(self, value: object) -> bool:
        """Whether the value is one of the range's."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        low, high, ends = self.range.low, self.range.high, self.range.ends
        try:
            over = value >= low if ends[0] else value > low
            under = value <= high if ends[1] else value < high
            return math.isfinite(value) and over and under
        except OverflowError:
            return False


class Trace(Enum):
    """What a plain gradient shows, and what is left of it by a defence, up to noise of an announced size."""

    SCALE = "how long the gradient is"
    RATIOS = "the ratios between the entries of one image's gradient"
    SIZES = "that entries are of many different sizes"
    LAYERS = "that no layer's gradient is zero throughout, where none is frozen"
    BIAS = "what the last layer's bias shows: its gradient adds up to 0, and is below 0 at the labels alone"
    RANK = "that the rank of the last layer's gradient is at most the number of images"


EVERYTHING = frozenset(Trace)


class Density(Enum):
    """What a random error on an entry is distributed like."""

    GAUSSIAN = "Gaussian"
    LAPLACE = "Laplace"
    ROUNDING = "of rounding at random, without bias"
    OTHER = "another one"


@dataclass(frozen=True)
class Error:
    """The random error that a defence leaves on an entry of the gradient."""

    density: Density
    spread: float
    """Its standard deviation as announced, in the gradient's units; 0 where it depends on what was sent."""
    steps: Callable[[Tensors], dict[str, Float[Tensor, "victims"]]] | None = None
    """Of rounding at random: from a stack of what was sent to the step of the grid to which each tensor was rounded.
    The error on an entry has the variance ``step^2 f (1 - f)``; its mean over f in U(0, 1) is ``step^2 / 6``."""


@dataclass(frozen=True)
class Exchange:
    """What the protocol tells of the exchange in which a defence is replayed."""

    steps: int = 1
    """Local steps of which the compared gradient is the mean: norms are of the steps' sum."""
    alone: bool = True
    """Whether a step's batch is one image and there is one step, so that the image's gradient is the whole gradient."""
    last: str = ""
    """Name of the weight of the layer that yields the logits; empty where none is known."""
    softness: float = 0.3
    """How soft a step function may be replayed, for an attack to have a slope to follow; relative to the gradient."""


@dataclass(frozen=True)
class Replay:
    """What an attacker that knows a defence does to the gradient of its dummy data before it compares."""

    does: Callable[[Tensors, Tensors], dict[str, Tensor]]
    """(the dummy gradients, what was sent) → the dummy gradients, defended as what was sent; each tensor with a
    leading axis of victims. Differentiable, and called under vmap."""
    exact: bool
    """Whether the truth, replayed, is what was sent, up to the announced error."""
    prior: float
    """Weight that an attack gives to what pictures look like, beside a squared distance relative to what was sent, for
    what the defence took away; chosen on training images. 0 where noise of a known size sets the weight."""


def unchanged(dummy: Tensors, sent: Tensors) -> dict[str, Tensor]:
    """The replay of what changes a gradient by a random error alone."""
    return dict(dummy)


class Defence(ABC):
    """A defence as a value: a frozen dataclass, whose fields take numbers, `Annotated` with their `Range`.

    Raises:
        FedtapError: an argument has a value out of its range.
    """

    name: ClassVar[str]
    """How it is written: the name of its file."""
    hook: ClassVar[str]
    """One of HOOKS."""

    def __init_subclass__(cls) -> None:
        cls.name = cls.__module__.rpartition(".")[2]

    def __post_init__(self) -> None:
        for argument in self.arguments():
            object.__setattr__(self, argument.name, self.checked(argument, getattr(self, argument.name)))

    @classmethod
    @final
    def checked(cls, argument: Argument, value: object) -> float:
        """The value of an argument as a number of its type.

        Raises:
            FedtapError: it is out of range.
        """
        if not argument.fits(value):
            raise FedtapError(f"{argument.name} of {cls.name} is {short(repr(value))}, and it is {argument}: give one.")
        return value if argument.whole else float(value)  # type: ignore[return-value,arg-type]

    @classmethod
    @final
    def arguments(cls) -> tuple[Argument, ...]:
        """What it is written with, in order."""
        return _arguments(cls)

    @property
    @final
    def values(self) -> tuple[float, ...]:
        """Of the arguments, in order."""
        return tuple(getattr(self, argument.name) for argument in self.arguments())

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.values))})"

    # What may be known of it.

    @property
    @abstractmethod
    def survives(self) -> frozenset[Trace]:
        """What of a plain gradient is still to be seen in what is sent."""

    @abstractmethod
    def error(self, batch: int) -> Error | None:
        """The random error on an entry of the mean gradient of so many examples, as announced; None where none is."""

    @abstractmethod
    def replay(self, exchange: Exchange) -> Replay | None:
        """What an attacker that knows it does to its dummy gradient; None where nobody but the client can repeat it,
        and then no attack counts as adaptive against it that does not say by itself that it knows it."""

    @abstractmethod
    def averaged(self, times: int) -> Defence:
        """What the mean of so many answers of one client to the same question is defended by, as far as is known."""

    # What it guarantees.

    @abstractmethod
    def bound(self, norm: float) -> float:
        """The L2 norm that it hands on at most of what has `norm` at most; inf where that is not known."""

    @abstractmethod
    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        """The mechanism by which noise hides what was sent from the server; None where it adds none and has no ε.

        Args:
            clip: L2 norm of what reaches it, at most.
            adjacency: of clients.
            releases: exchanges in which the client sends an update of the same data.
            steps: local steps in each of them that an example takes part in.

        Raises:
            FedtapError: it adds noise that no accountant here covers.
        """

    # Where it does not fit.

    @abstractmethod
    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """Refuse a network for which it is not what it says.

        Args:
            shape: of one input, without the batch.

        Raises:
            FedtapError: with the layer, the reason and what to use instead.
        """


class ModelDefence(Defence):
    """What is put into the model before it is trained."""

    hook = "model"

    @abstractmethod
    def install(self, network: nn.Module, last: str | None) -> nn.Module:
        """The network with the defence in it, in place.

        Args:
            last: name of the linear layer that yields the logits; None where none does.

        Raises:
            ValueError: the network has no place for it, as the end of a sentence.
        """


class StepDefence(Defence):
    """What is done inside each local step: it takes the place of the backward pass."""

    hook = "step"

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


class Update(ABC):
    """What is done to a gradient before it is sent, `gradient -> gradient`.

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


class UpdateDefence(Defence, Update):
    """What is done to a client's gradient before it is sent."""

    hook = "update"


class ServerDefence(Defence):
    """What the server does to what it received, which hides nothing from the server itself."""

    hook = "server"

    @abstractmethod
    def around(self, strategy: Strategy, learning_rate: float, nodes: int) -> Strategy:
        """The strategy with the defence around it, for so many nodes that train at this learning rate."""

    @abstractmethod
    def check_change(self, change: Tensors, client: int) -> None:
        """Refuse a client's change of the weights that the strategy could not defend: it would end everybody's run.

        Raises:
            FedtapError: naming the client and the remedy.
        """


@cache
def _arguments(kind: type[Defence]) -> tuple[Argument, ...]:
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        hint = hints[field.name]
        number, ranges = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
        if number not in (int, float) or len(ranges) != 1 or not isinstance(ranges[0], Range):
            raise FedtapError(
                f"{field.name} of {kind.name} has no range, so it cannot be written: annotate it as "
                "Annotated[float, Range(low, high)], or with int for whole numbers."
            )
        found.append(Argument(field.name, ranges[0], number is int))
    return tuple(found)
