"""What can be seen: leaks, each the attacker's whole knowledge and nothing else.

A leak is a frozen stack of victims: tensors plus the protocol's plain metadata, saved as safetensors beside JSON.
It never holds private data, and it never names code: a user's own model is handed to `load` by the caller.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file, read_json, read_tensors, write_atomically

Tensors = Mapping[str, Tensor]
Kind = TypeVar("Kind", bound="Leak")

FORMAT = 2
"""Version of the saved form; a reader takes this one and the one before it."""

FORMER = {"steps": "local_steps", "listener": "threat_model"}
"""Terms of the protocol that had other names in format 1."""


ROUNDING = 6.5e-9
"""Standard error of a difference of two float32 weights near 0.1, in weight units."""


@dataclass(frozen=True)
class Protocol:
    """What the protocol tells everyone who takes part, the attacker included."""

    model: str
    """Name of the architecture."""
    shape: tuple[int, ...]
    """Of one example: channels, height, width of an image; tokens and width of an attention block's input; features."""
    classes: int
    """Of a label; 1 where there is none, or where it is a number."""
    batch: int
    """Examples in a client's local step; behind secure aggregation, in those of all clients of the sum. Where a client
    does not say how many it has, 1."""
    local_steps: int = 1
    """Local steps of the optimiser, each on the whole batch."""
    learning_rate: float = 1.0
    defence: str = "none"
    """The defence as announced."""
    threat_model: str = "curious_server"
    summed: int = 1
    """Clients whose answers are averaged into one; each has batch / summed of the images."""
    prior: str = "flat"
    """The prior over the parameters, or the regulariser that stands for its negative logarithm, as announced."""
    low: float | tuple[float, ...] = 0.0
    """What the model is fed for a pixel of 0: one number, or one a channel."""
    high: float | tuple[float, ...] = 1.0
    """What it is fed for a pixel of 1, and ``low + (high - low) pixel`` in between."""
    loss: str = "cross_entropy"
    """`cross_entropy`; `bce`, binary cross-entropy with logits; `mse`, squared distance of the logits from one-hot."""
    reduction: str = "mean"
    """`mean` or `sum`, over the batch and, of bce and mse, over the logits."""
    optimiser: str = "sgd"
    """`sgd` or `adam`, which each client begins with empty state."""
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    """Times the weights, this is added to the gradient before momentum, as in torch.optim."""
    batchnorm: str = "train"
    """`train`, by the batch's own statistics, or `eval`, by the running ones."""

    @staticmethod
    def of(document: Mapping[str, Any]) -> Protocol:
        """From the form in JSON, where tuples are lists; what is missing has its default.

        Raises:
            KeyError, TypeError: it is not of that form.
        """
        lists = {"shape": tuple(document["shape"])}
        lists |= {end: tuple(document[end]) for end in ("low", "high") if isinstance(document.get(end), list)}
        return Protocol(**{**document, **lists})


CONVENTIONS = ("low", "high", "loss", "reduction", "optimiser", "momentum", "nesterov", "weight_decay", "batchnorm")
"""What of the protocol says how a client turns images into a gradient, and a gradient into an update."""


@dataclass(frozen=True)
class Range:
    """A forward pre-hook: pixels in [0, 1] become what the model is fed. One number, or one a channel."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pixels, *rest = inputs
        low, high = (pixels.new_tensor(end).view(-1, 1, 1) for end in (self.low, self.high))
        return (low + (high - low) * pixels, *rest)

    @staticmethod
    def of(protocol: Protocol) -> Range:
        """The protocol's."""
        low, high = (end if isinstance(end, tuple) else (end,) for end in (protocol.low, protocol.high))
        return Range(low, high)


PIXELS = Range((0.0,), (1.0,))
"""Of a model that takes pixels as they are."""


def fed(network: nn.Module, protocol: Protocol) -> nn.Module:
    """The network as a function of pixels: itself, or a copy that scales them first, with the same parameter names."""
    wanted = Range.of(protocol)
    there = [hook for hook in network._forward_pre_hooks.values() if isinstance(hook, Range)]
    if (there or [PIXELS]) == [wanted]:
        return network
    copies = _FED.setdefault(network, {})
    if wanted not in copies:
        copied = copy.deepcopy(network)
        for number, hook in list(copied._forward_pre_hooks.items()):
            if isinstance(hook, Range):
                del copied._forward_pre_hooks[number]
        if wanted != PIXELS:
            copied.register_forward_pre_hook(wanted, prepend=True)
        copies[wanted] = copied
    return copies[wanted]


_FED: WeakKeyDictionary[nn.Module, dict[Range, nn.Module]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Leak:
    """A stack of answers, one victim an entry.

    Args:
        observed: what the victims sent, name -> tensor with a leading victims axis.
        protocol: the public terms under which it was sent.
        network: the architecture, on the meta device: no weights in it. Pixels in [0, 1] go in, whatever the range.
        weights: the parameters the victims started from, or None where the listener does not know them.
        buffers: likewise, what the network keeps beside parameters (BatchNorm's statistics).
        clients: the partition that each victim answered from.
        rounds: the federation's round of each answer, from 1.
        restarts: which restart each entry is; 0 in a leak fresh from the wire.
        stacked: whether weights and buffers carry a victims axis (they do where victims answered different models).
        resolution: standard error of one entry of `observed` from rounding on the wire; 0 if sent as it is.
        examples: how many examples each victim says it has (`num-examples`); None where that was not heard.
    """

    kind: ClassVar[str]
    precise: ClassVar[bool] = False
    """Whether a saved leak stays in double precision; all else is read as float32, which the weights have."""

    observed: Tensors
    protocol: Protocol
    network: nn.Module = field(repr=False, compare=False)
    weights: Tensors | None
    buffers: Tensors
    clients: Int[Tensor, "victims"]
    rounds: Int[Tensor, "victims"]
    restarts: Int[Tensor, "victims"]
    stacked: bool = False
    resolution: float = 0.0
    examples: Int[Tensor, "victims"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", fed(self.network, self.protocol))

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(iter(self.observed.values())).device

    def __getitem__(self: Kind, which: int | slice | Tensor) -> Kind:
        """The stack of the chosen victims; an int keeps the victims axis, with one entry."""
        if isinstance(which, int):
            which = slice(which, which + 1) if which != -1 else slice(-1, None)
        return self._victims(lambda tensor: tensor[which])

    def repeat(self: Kind, restarts: int) -> Kind:
        """Each victim `restarts` times in a row, numbered in `restarts`."""
        repeated = self._victims(lambda tensor: tensor.repeat_interleave(restarts, dim=0))
        numbers = torch.arange(restarts, device=self.restarts.device).repeat(len(self))
        return dataclasses.replace(repeated, restarts=repeated.restarts * restarts + numbers)

    def to(self: Kind, device: torch.device | str) -> Kind:
        """The same leak on another device. Victims' names stay on the CPU."""
        return dataclasses.replace(
            self,
            observed=_each(self.observed, lambda tensor: tensor.to(device)),
            weights=None if self.weights is None else _each(self.weights, lambda tensor: tensor.to(device)),
            buffers=_each(self.buffers, lambda tensor: tensor.to(device)),
        )

    def _victims(self: Kind, choose: Any) -> Kind:
        on_model = choose if self.stacked else (lambda tensor: tensor)
        return dataclasses.replace(
            self,
            observed=_each(self.observed, choose),
            weights=None if self.weights is None else _each(self.weights, on_model),
            buffers=_each(self.buffers, on_model),
            clients=choose(self.clients),
            rounds=choose(self.rounds),
            restarts=choose(self.restarts),
            examples=None if self.examples is None else choose(self.examples),
        )

    def check(self) -> None:
        """Refuse a leak that no attack could use.

        Raises:
            FedtapError: a tensor is missing, misshapen or not finite.
        """
        parameters = dict(self.network.named_parameters())
        wanted = self.sent()
        _same_names(self.observed, wanted, f"the leaked {self.kind}", self.protocol.model)
        for name, shape in wanted.items():
            if tuple(self.observed[name].shape) == shape:
                raise FedtapError(
                    f"{self.kind}/{short(name)} of the leak has the shape of one victim's, {shape}, and a leak is a "
                    "stack of victims: give each tensor a leading axis (tensor[None]), as "
                    "fedtap.simulator.wire.captured.leak does."
                )
            _shaped(self.observed[name], (len(self), *shape), f"{self.kind}/{name}", self.protocol.model)
        victims = len(self)
        lead = (victims,) if self.stacked else ()
        if self.weights is not None:
            _same_names(self.weights, parameters, "the leaked weights", self.protocol.model)
            for name, parameter in parameters.items():
                _shaped(self.weights[name], (*lead, *parameter.shape), f"weights/{name}", self.protocol.model)
        buffers = float_buffers(self.network)
        if self.buffers or self.weights is not None:
            _same_names(self.buffers, buffers, "the leaked buffers", self.protocol.model)
            for name, buffer in buffers.items():
                _shaped(self.buffers[name], (*lead, *buffer.shape), f"buffers/{name}", self.protocol.model)
        for group, tensors in ((self.kind, self.observed), ("weights", self.weights or {}), ("buffers", self.buffers)):
            for name, tensor in tensors.items():
                if not bool(tensor.isfinite().all()):
                    raise FedtapError(
                        f"{group}/{short(name)} of the leak holds NaN or infinity, from which nothing can be matched: "
                        "record the exchange again, or leave out the victim it belongs to."
                    )

    def sent(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without the victims axis, of what one victim sends: here a tensor for each parameter."""
        return {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}

    def packed(self) -> bytes:
        """The tensors as a safetensors file."""
        tensors = {f"{self.kind}/{name}": tensor for name, tensor in self.observed.items()}
        tensors |= {f"weights/{name}": tensor for name, tensor in (self.weights or {}).items()}
        tensors |= {f"buffers/{name}": tensor for name, tensor in self.buffers.items()}
        tensors |= {"clients": self.clients, "rounds": self.rounds, "restarts": self.restarts}
        tensors |= {} if self.examples is None else {EXAMPLES: self.examples}
        return dump_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    def save(self, path: Path) -> None:
        """Write `path` (.safetensors) and the protocol beside it (.json), each atomically."""
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "protocol": dataclasses.asdict(self.protocol),
            "stacked": self.stacked,
            "resolution": self.resolution,
        }
        write_atomically(path, self.packed())
        write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2).encode() + b"\n")


class GradientLeak(Leak):
    """One gradient a victim, of the protocol's loss over its batch: what one step moved, over the learning rate."""

    kind = "gradient"

    @property
    def gradient(self) -> Tensors:
        """Parameter name -> `victims *parameter`."""
        return self.observed


class UpdateLeak(Leak):
    """One update a victim: weights after its local steps minus weights before, shape of each parameter."""

    kind = "update"

    @property
    def update(self) -> Tensors:
        """Parameter name -> `victims *parameter`."""
        return self.observed


class PosteriorLeak(Leak):
    """A client's posterior over the model's parameters: draws of it, or its mean and covariance.

    `observed` holds `draws`, `victims draws parameters`, or `mean`, `victims parameters`, and `covariance`,
    `victims parameters parameters`; parameters are flattened, in the network's order.
    """

    kind = "posterior"
    precise = True

    def sent(self) -> dict[str, tuple[int, ...]]:
        """Draws, however many, or mean and covariance."""
        size = sum(parameter.numel() for parameter in self.network.parameters())
        if "draws" in self.observed:
            return {"draws": (*self.observed["draws"].shape[1:2], size)}
        return {"mean": (size,), "covariance": (size, size)}


class AttentionLeak(Leak):
    """What an attention block made of a client's private input: `output`, `victims tokens width`.

    Protocol's shape is that of the input, tokens and width; the weights are the block's, as they were broadcast.
    """

    kind = "attention"
    precise = True

    def sent(self) -> dict[str, tuple[int, ...]]:
        """The shape in which the block answers an input of the protocol's shape."""
        with torch.no_grad():
            answer = self.network(torch.zeros(1, *self.protocol.shape, device="meta"))
        return {"output": tuple(answer.shape[1:])}


class StationaryLeak(Leak):
    """The weights of a model that its client trained to the end, shape of each parameter.

    `weights` are the ones that were broadcast; the regulariser of the training is the protocol's `prior`, and the
    client's number of examples its `batch`.
    """

    kind = "stationary"
    precise = True

    @property
    def trained(self) -> Tensors:
        """Parameter name -> `victims *parameter`."""
        return self.observed


KINDS: dict[str, type[Leak]] = {
    kind.kind: kind for kind in (GradientLeak, UpdateLeak, PosteriorLeak, AttentionLeak, StationaryLeak)
}


NAMES = ("clients", "rounds", "restarts")
EXAMPLES = "examples"
"""A tensor that a saved leak may have beside these."""
GROUPS = {kind: (f"{kind}/", "weights/", "buffers/") for kind in KINDS}
NO_VICTIMS = {(), (0,)}


def stack(leaks: Sequence[Leak]) -> Leak:
    """One stack of all victims of leaks of one kind and protocol.

    Weights stay shared where all leaks share the same ones, and get a victims axis where they differ.

    Raises:
        FedtapError: no leaks, or leaks of unequal kind or protocol.
    """
    if not leaks:
        raise FedtapError("There is no leak to stack: no client's answer was heard, so ask for at least one victim.")
    first = leaks[0]
    if any((leak.kind, leak.protocol) != (first.kind, first.protocol) for leak in leaks):
        raise FedtapError(
            "Leaks of different kinds or protocols cannot be stacked, since one attack runs on all of a stack: "
            "group them by protocol first."
        )
    shared = not any(leak.stacked for leak in leaks) and all(_equal(first, leak) for leak in leaks[1:])

    def model_tensors(of: Any) -> Tensors | None:
        if shared or of(first) is None:
            return of(first)  # type: ignore[no-any-return]
        spread = [of(leak) if leak.stacked else _each(of(leak), _spreader(len(leak))) for leak in leaks]
        return {name: torch.cat([tensors[name] for tensors in spread]) for name in of(first)}

    return dataclasses.replace(
        first,
        observed={name: torch.cat([leak.observed[name] for leak in leaks]) for name in first.observed},
        weights=model_tensors(lambda leak: leak.weights),
        buffers=model_tensors(lambda leak: leak.buffers) or {},
        clients=torch.cat([leak.clients for leak in leaks]),
        rounds=torch.cat([leak.rounds for leak in leaks]),
        restarts=torch.cat([leak.restarts for leak in leaks]),
        stacked=not shared,
        resolution=max(leak.resolution for leak in leaks),
        examples=_joined([leak.examples for leak in leaks]),
    )


def mean(leaks: Sequence[Kind], defence: str) -> Kind:
    """What a client that answers the same again and again gives away: the mean of its answers, as one leak.

    Args:
        defence: what the mean is defended by; noise wears off.

    Raises:
        FedtapError: they are of unequal protocols, or at unequal weights.
    """
    first, many = leaks[0], len(leaks)
    if any(leak.protocol != first.protocol or not _equal(first, leak) for leak in leaks[1:]):
        raise FedtapError("Answers at different weights have no common gradient, so no mean: average those at one.")
    return dataclasses.replace(
        first,
        observed={name: torch.stack([leak.observed[name] for leak in leaks]).mean(0) for name in first.observed},
        protocol=dataclasses.replace(first.protocol, defence=defence),
        resolution=first.resolution / math.sqrt(many),
    )


def load(path: Path, build: Any, model: str | None = None) -> Leak:
    """Read a saved leak and check every tensor in it.

    Args:
        path: the .safetensors file; its .json lies beside it.
        build: `(model name, shape, classes) -> nn.Module on the meta device`.
        model: the architecture, where the caller knows better than the file (a user's own `module:function`).

    Raises:
        FedtapError: a file is missing, truncated or malformed, or is a leak of another model.
    """
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not is_file(file):
            raise FedtapError(
                f"{short(file, 100)} does not exist: a leak is two files, NAME.safetensors and NAME.json; "
                "give the path of the .safetensors file and keep both together."
            )
    about = read_json(beside)
    try:
        if about["format"] == 1:  # of fedtap 0.1, which had other names for two of the terms
            about["protocol"] = {FORMER.get(name, name): value for name, value in about["protocol"].items()}
        elif about["format"] != FORMAT:
            raise FedtapError(
                f"{short(beside, 100)} has format {short(about['format'])}, and this fedtap reads {FORMAT}: save it "
                "again."
            )
        kind = KINDS[about["kind"]]
        protocol = protocol_of(about["protocol"])
        stacked, resolution = about["stacked"], float(about["resolution"])
        if type(stacked) is not bool:
            raise TypeError("stacked is true or false")
        sound(protocol, resolution)
        if kind is GradientLeak and protocol.local_steps != 1:
            raise ValueError(f"a gradient of {protocol.local_steps} steps: several steps give an update")
    except (ValueError, KeyError, TypeError) as error:
        raise FedtapError(
            f"{short(beside)} is no leak's description ({type(error).__name__}: {short(error, 100)}): "
            "it needs format, kind, protocol, stacked and resolution as `fedtap run` writes them."
        ) from error
    if model is not None:
        protocol = dataclasses.replace(protocol, model=model)
    elif ":" in protocol.model:
        raise FedtapError(
            f"{short(beside, 80)} says the model is {short(protocol.model)!r}, and a file may not name code to import: "
            f"repeat it on the command line, --model {short(protocol.model)}, if you trust it."
        )
    tensors = read_tensors(path)

    def group(prefix: str) -> Tensors:
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        as_is = (torch.float32, torch.float64) if kind.precise else (torch.float32,)
        return _each(found, lambda t: t.float() if t.is_floating_point() and t.dtype not in as_is else t)

    names = [tensors.get(name) for name in NAMES] + [tensors[name] for name in (EXAMPLES,) if name in tensors]
    shapes = {tuple(tensor.shape) for tensor in names if tensor is not None and tensor.dtype == torch.int64}
    if (
        any(tensor is None or tensor.dtype != torch.int64 for tensor in names)
        or len(shapes) != 1
        or shapes & NO_VICTIMS
    ):
        raise FedtapError(
            f"{short(path, 100)} lacks the tensors {', '.join(NAMES)}, which say whose answers these are: "
            "add all three, int64, one entry a victim, at least one."
        )
    known = (*NAMES, EXAMPLES)
    if strange := [name for name in tensors if name not in known and not name.startswith(GROUPS[kind.kind])]:
        raise FedtapError(
            f"{short(path, 100)} holds {short(strange[0])}, which is no part of a {kind.kind} leak: take it out."
        )
    leak = kind(
        observed=group(f"{kind.kind}/"),
        protocol=protocol,
        network=build(protocol.model, protocol.shape, protocol.classes),
        weights=group("weights/") or None,
        buffers=group("buffers/"),
        clients=tensors["clients"],
        rounds=tensors["rounds"],
        restarts=tensors["restarts"],
        stacked=stacked,
        resolution=resolution,
        examples=tensors.get(EXAMPLES),
    )
    leak = dataclasses.replace(
        leak,
        observed=own_names(leak.observed, leak.network),
        weights=None if leak.weights is None else own_names(leak.weights, leak.network),
        buffers=own_names(leak.buffers, leak.network),
    )
    leak.check()
    return leak


WRAPPERS = ("module.", "_module.", "_orig_mod.")
"""What data parallelism, Opacus and torch.compile put before each name."""


def own_names(tensors: Tensors, network: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names that the network itself has for them: without a wrapper's prefix, and once where
    layers share one.

    Raises:
        FedtapError: what layers share has two values.
    """
    first: dict[int, str] = {}
    held = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    names = {name: first.setdefault(id(tensor), name) for name, tensor in held}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name
        while bare not in names and (before := next((each for each in WRAPPERS if bare.startswith(each)), "")):
            bare = bare.removeprefix(before)
        own = names.get(bare, name)
        if own in found and not torch.equal(found[own], tensor):
            raise FedtapError(
                f"{short(name)} and {short(own)} are one tensor, which layers of the model share, and two values are "
                "given for it: keep one."
            )
        found[own] = tensor
    return found


def check_protocol(protocol: Protocol) -> None:
    """Refuse a protocol that no client could follow.

    Raises:
        FedtapError: naming what is out of range and what it may be.
    """
    try:
        sound(protocol)
    except (TypeError, ValueError) as error:
        raise FedtapError(f"This protocol is none that a client could follow, since {error}: say it so.") from error


def told(leak: Leak, **said: Any) -> Leak:
    """The leak under what the caller knows of its protocol better than the file; a gradient of several steps is an
    update, ``-learning_rate x`` what one step would have had as its gradient.

    Raises:
        FedtapError: the protocol has no such value.
    """
    protocol = dataclasses.replace(leak.protocol, **said)
    check_protocol(protocol)
    if not isinstance(leak, GradientLeak) or protocol.local_steps == 1:
        return dataclasses.replace(leak, protocol=protocol)
    rate = protocol.learning_rate
    fields = {field.name: getattr(leak, field.name) for field in dataclasses.fields(leak)}
    observed = _each(leak.observed, lambda tensor: -rate * tensor)
    return UpdateLeak(**{**fields, "observed": observed, "protocol": protocol, "resolution": rate * leak.resolution})


def float_buffers(network: nn.Module) -> dict[str, Tensor]:
    """The buffers that travel: floating point ones (BatchNorm's step counter stays at home)."""
    return {name: buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()}


LONGEST = 200
"""Letters of a protocol's texts."""

MOST, MOST_CLASSES, MOST_NUMBERS = 10**6, 2**20, 2**28
"""Steps and clients of a sum, classes, and numbers in a batch of examples, at most: a leak of more is a mistake, or was
made to fill the memory."""


def protocol_of(document: Any) -> Protocol:
    """From the form in JSON; `sound` has not looked at it.

    Raises:
        KeyError, TypeError, ValueError: it is not of that form.
    """
    if not isinstance(document, dict) or not isinstance(document["shape"], list):
        raise TypeError("a protocol is an object, and its shape a list")
    return Protocol.of(document)


def sound(protocol: Protocol, resolution: float = 0.0) -> None:
    """Refuse terms that no exchange could have, and sizes that would fill the memory.

    Raises:
        TypeError, ValueError: with what is wrong.
    """
    _sound(protocol, resolution)
    if max(protocol.local_steps, protocol.summed) > MOST or protocol.classes > MOST_CLASSES:
        raise ValueError(f"local_steps and summed are at most {MOST:,}, classes {MOST_CLASSES:,}")
    if protocol.batch * math.prod(protocol.shape) > MOST_NUMBERS:
        raise ValueError(f"a batch has at most {MOST_NUMBERS:,} numbers")
    if any(len(text) > LONGEST for text in (protocol.model, protocol.defence, protocol.threat_model, protocol.prior)):
        raise ValueError(f"model, defence, listener and prior have {LONGEST} letters at most")


def _sound(protocol: Protocol, resolution: float) -> None:
    counts = (*protocol.shape, protocol.classes, protocol.batch, protocol.local_steps, protocol.summed)
    if not 1 <= len(protocol.shape) <= 3 or any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(
            "shape, classes, batch, local_steps and summed are whole numbers from 1, one to three in shape"
        )
    if protocol.batch % protocol.summed:
        raise ValueError("batch is a multiple of summed: so many images are each client's")
    if not (math.isfinite(protocol.learning_rate) and protocol.learning_rate > 0):
        raise ValueError("learning_rate is a number over 0")
    if not (math.isfinite(resolution) and resolution >= 0):
        raise ValueError("resolution is a number from 0")
    if not all(
        isinstance(text, str) for text in (protocol.model, protocol.defence, protocol.threat_model, protocol.prior)
    ):
        raise ValueError("model, defence, listener and prior are text")
    for name, known in CHOICES.items():
        if getattr(protocol, name) not in known:
            raise ValueError(f"{name} is {' or '.join(known)}")
    ends, channels = Range.of(protocol), protocol.shape[0]
    if any(len(end) not in (1, channels) or not all(map(_number, end)) for end in (ends.low, ends.high)):
        raise ValueError("low and high are numbers, one or one a channel")
    low, high = (end * channels if len(end) == 1 else end for end in (ends.low, ends.high))
    if not all(below < above for below, above in zip(low, high, strict=True)):
        raise ValueError("low is below high")
    if len(protocol.shape) != 3 and ends != PIXELS:
        raise ValueError("low and high are of images, and this shape is of none")
    if not (_number(protocol.momentum) and 0 <= protocol.momentum < 1):
        raise ValueError("momentum is a number from 0 and below 1")
    if not (_number(protocol.weight_decay) and protocol.weight_decay >= 0):
        raise ValueError("weight_decay is a number from 0")
    if type(protocol.nesterov) is not bool or (protocol.nesterov and not protocol.momentum):
        raise ValueError("nesterov is true or false, and true only beside momentum")
    if protocol.optimiser == "adam" and protocol.momentum:
        raise ValueError("momentum is sgd's, and adam has its own: leave it 0")


CHOICES = {
    "loss": ("cross_entropy", "bce", "mse"),
    "reduction": ("mean", "sum"),
    "optimiser": ("sgd", "adam"),
    "batchnorm": ("train", "eval"),
}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One after the other; None where one is."""
    known = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(known) if len(known) == len(tensors) else None


def _each(tensors: Tensors, change: Any) -> Tensors:
    return {name: change(tensor) for name, tensor in tensors.items()}


def _spreader(victims: int) -> Any:
    return lambda tensor: tensor.expand(victims, *tensor.shape)


def _equal(one: Leak, other: Leak) -> bool:
    if (one.weights is None) != (other.weights is None):
        return False
    pairs = [(one.weights or {}, other.weights or {}), (one.buffers, other.buffers)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def _same_names(found: Tensors, wanted: Mapping[str, Any], what: str, model: str) -> None:
    missing, strange = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or strange:
        said = "; ".join(
            f"{word} {', '.join(short(name, 30) for name in names[:2])}{', …' if len(names) > 2 else ''}"
            for word, names in (("missing", missing), ("not of it", strange))
            if names
        )
        raise FedtapError(
            f"The tensors of {what} are not those of model {short(model, 40)!r} ({said}): name its model, --model."
        )


def _shaped(found: Tensor, wanted: tuple[int, ...], name: str, model: str) -> None:
    if not found.is_floating_point():
        raise FedtapError(
            f"{short(name)} of the leak is {found.dtype}, and gradients are floating point: save it as float32."
        )
    if tuple(found.shape) != wanted:
        raise FedtapError(
            f"{short(name)} of the leak has shape {short(tuple(found.shape), 30)}, but model {short(model, 40)!r} "
            f"needs {short(wanted, 30)}: the leak is of another model, image size or number of classes; name its "
            "model, --model."
        )
