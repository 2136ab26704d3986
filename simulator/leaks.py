"""Leaks: each is the attacker's whole knowledge, and nothing else.

A leak is a frozen stack of victims: tensors plus the protocol's plain metadata, saved as safetensors beside JSON.
It never holds private data, and it never names code: a user's own model is handed to `load` by the caller.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import (
    LARGEST_TENSORS,
    is_file,
    parse_tensors,
    read_bytes,
    read_json,
    read_tensors,
    write_atomically,
)

Tensors = Mapping[str, Tensor]
_AnyLeak = TypeVar("_AnyLeak", bound="Leak")

FORMAT = 2
"""Version of the saved form; a reader takes this one, the one before it, and `RECORDED`."""

RECORDED = 3
"""Version of the form that the recorder writes: it may have places for victims that are not there yet, of round 0, and
its weights may lie in a file that several leaks share, which its JSON names by a digest."""

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
    """Step size of the client's optimiser."""
    defence: str = "none"
    """The defence as announced."""
    threat_model: str = "curious_server"
    """Name of the threat model: what the attacker observes and knows."""
    summed: int = 1
    """Clients whose replies are averaged into one; each has batch / summed of the images."""
    prior: str = "flat"
    """The prior over the parameters, or the regulariser that stands for its negative logarithm, as announced."""
    low: float | tuple[float, ...] = 0.0
    """What the model is fed for a pixel of 0: one number, or one a channel."""
    high: float | tuple[float, ...] = 1.0
    """What the model is fed for a pixel of 1; for any pixel, ``low + (high - low) pixel``."""
    loss: str = "cross_entropy"
    """`cross_entropy`; `bce`, binary cross-entropy with logits; `mse`, squared distance of the logits from one-hot."""
    reduction: str = "mean"
    """`mean` or `sum`, over the batch and, of bce and mse, over the logits."""
    optimiser: str = "sgd"
    """`sgd` or `adam`, which each client begins with empty state; of a checkpoint, also `adamw`."""
    momentum: float = 0.0
    """Momentum of sgd, in [0, 1)."""
    nesterov: bool = False
    """Whether momentum is Nesterov's, as in torch.optim."""
    weight_decay: float = 0.0
    """Factor of the weights that are added to the gradient before momentum, as in torch.optim."""
    batchnorm: str = "train"
    """`train`, by the batch's own statistics, or `eval`, by the running ones."""
    step_batch: int = 0
    """Examples in each local step, where the steps take those of `batch` in turn; 0 where each step is on all."""
    adapter: str = ""
    """What clients train and send in the place of all weights, such as `lora(rank=8, alpha=16)`; empty for none."""
    prompt: str = ""
    """Caption of the images that a diffusion model is tuned on, as far as it is announced; * is a word that is not."""

    @staticmethod
    def of(document: Mapping[str, Any]) -> Protocol:
        """From its JSON form, where tuples are lists and what is missing has its default.

        Raises:
            KeyError, TypeError: it is not of that form.
        """
        lists = {"shape": tuple(document["shape"])}
        lists |= {end: tuple(document[end]) for end in ("low", "high") if isinstance(document.get(end), list)}
        return Protocol(**{**document, **lists})


CONVENTIONS = (
    "low",
    "high",
    "loss",
    "reduction",
    "optimiser",
    "momentum",
    "nesterov",
    "weight_decay",
    "batchnorm",
    "step_batch",
)
"""Terms of the protocol that say how a client turns images into a gradient, and a gradient into an update."""


@dataclass(frozen=True)
class PixelRange:
    """A forward pre-hook: pixels in [0, 1] become what the model is fed. One number, or one a channel."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pixels, *rest = inputs
        low, high = (pixels.new_tensor(end).view(-1, 1, 1) for end in (self.low, self.high))
        return (low + (high - low) * pixels, *rest)

    @staticmethod
    def of(protocol: Protocol) -> PixelRange:
        """The protocol's."""
        low, high = (end if isinstance(end, tuple) else (end,) for end in (protocol.low, protocol.high))
        return PixelRange(low, high)


PIXELS = PixelRange((0.0,), (1.0,))
"""Range of a model that takes pixels in [0, 1] as they are."""


def fed(network: nn.Module, protocol: Protocol) -> nn.Module:
    """The network as a function of pixels: itself, or a copy that scales them first, with the same parameter names."""
    wanted = PixelRange.of(protocol)
    there = [hook for hook in network._forward_pre_hooks.values() if isinstance(hook, PixelRange)]
    if (there or [PIXELS]) == [wanted]:
        return network
    copies = _FED.setdefault(network, {})
    if wanted not in copies:
        copied = copy.deepcopy(network)
        for number, hook in list(copied._forward_pre_hooks.items()):
            if isinstance(hook, PixelRange):
                del copied._forward_pre_hooks[number]
        if wanted != PIXELS:
            copied.register_forward_pre_hook(wanted, prepend=True)
        copies[wanted] = copied
    return copies[wanted]


_FED: WeakKeyDictionary[nn.Module, dict[PixelRange, nn.Module]] = WeakKeyDictionary()


MODEL_GROUPS = ("weights/", "buffers/")
"""Groups of tensors in a saved leak beside that of its kind."""

KINDS: dict[str, type[Leak]] = {}
"""Kind -> class, of all that have been imported: a subclass of `Leak` is entered by its definition."""


@dataclass(frozen=True)
class Leak:
    """A stack of replies, one victim an entry.

    A subclass says its `kind`, and what one victim sends (`sent`) where that is no tensor for each parameter.
    """

    kind: ClassVar[str]
    """As saved leaks name it."""
    precise: ClassVar[bool] = False
    """Whether a saved leak stays in double precision; all else is read as float32, which the weights have."""

    observed: Tensors
    """What the victims sent, name -> tensor with a leading victims axis."""
    protocol: Protocol
    """The public terms under which it was sent."""
    network: nn.Module = field(repr=False, compare=False)
    """The architecture, on the meta device and without weights; it takes pixels in [0, 1], whatever the range."""
    weights: Tensors | None
    """The parameters that the victims started from; None where the threat model does not know them."""
    buffers: Tensors
    """The floating point buffers that they started from (BatchNorm's statistics); empty where not known."""
    clients: Int[Tensor, "victims"]
    """Partition of each victim."""
    rounds: Int[Tensor, "victims"]
    """The federation's round of each reply, from 1."""
    restarts: Int[Tensor, "victims"]
    """Number of the restart of each entry; 0 in a leak as it was observed."""
    stacked: bool = False
    """Whether weights and buffers have a victims axis, as where victims started from different weights."""
    resolution: float = 0.0
    """Standard error of an entry of `observed` from rounding on the wire; 0 if it was sent as it is."""
    examples: Int[Tensor, "victims"] | None = None
    """Number of examples that each victim reports (`num-examples`); None where it was not observed."""

    def __init_subclass__(cls) -> None:
        if "kind" not in vars(cls):
            return
        if not cls.kind.isidentifier() or f"{cls.kind}/" in MODEL_GROUPS:
            raise FedtapError(
                f"{cls.__name__} calls its kind of leak {short(repr(cls.kind))}, which its tensors have before their "
                "names in a file: give it one word, and neither weights nor buffers."
            )
        known = KINDS.setdefault(cls.kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise FedtapError(
                f"{cls.__name__} calls its kind of leak {short(cls.kind)}, and so does {known.__name__} in "
                f"{short(known.__module__)}: give it another name."
            )
        KINDS[cls.kind] = cls  # a module may be imported anew

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", fed(self.network, self.protocol))

    @classmethod
    def architecture(cls, protocol: Protocol, build: Callable[[str, tuple[int, ...], int], nn.Module]) -> nn.Module:
        """The network of a saved leak: the protocol's model. A kind of leak without one gives nn.Identity()."""
        return build(protocol.model, protocol.shape, protocol.classes)

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(iter(self.observed.values())).device

    def __getitem__(self: _AnyLeak, which: int | slice | Tensor) -> _AnyLeak:
        """The stack of the chosen victims; an int keeps the victims axis, with one entry."""
        if isinstance(which, int):
            which = slice(which, which + 1) if which != -1 else slice(-1, None)
        return self._victims(lambda tensor: tensor[which])

    def repeat(self: _AnyLeak, restarts: int) -> _AnyLeak:
        """Each victim `restarts` times in a row, numbered in `restarts`."""
        if restarts == 1:
            return self
        repeated = self._victims(lambda tensor: tensor.repeat_interleave(restarts, dim=0))
        numbers = torch.arange(restarts, device=self.restarts.device).repeat(len(self))
        return dataclasses.replace(repeated, restarts=repeated.restarts * restarts + numbers)

    def at(self: _AnyLeak, weights: Tensors) -> _AnyLeak:
        """This leak as if its victims had started from these weights, which have a victims axis."""
        buffers = self.buffers if self.stacked else _each(self.buffers, lambda t: t.expand(len(self), *t.shape))
        return dataclasses.replace(self, weights=weights, buffers=buffers, stacked=True)

    def broadcast(self, victim: int) -> dict[str, Tensor]:
        """Parameters and buffers that the server sent to a victim, by name."""
        assert self.weights is not None
        held = {**self.weights, **self.buffers}
        return {name: tensor[victim] if self.stacked else tensor for name, tensor in held.items()}

    def to(self: _AnyLeak, device: torch.device | str) -> _AnyLeak:
        """This leak on another device; `clients`, `rounds` and `restarts` stay on the CPU."""
        return dataclasses.replace(
            self,
            observed=_each(self.observed, lambda tensor: tensor.to(device)),
            weights=None if self.weights is None else _each(self.weights, lambda tensor: tensor.to(device)),
            buffers=_each(self.buffers, lambda tensor: tensor.to(device)),
        )

    def _victims(self: _AnyLeak, choose: Any) -> _AnyLeak:
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
                        f"{group}/{short(name)} of the leak holds NaN or infinity, which nothing can be matched to: "
                        "record the exchange again, or leave out the victim it belongs to."
                    )

    def sent(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without the victims axis, of what one victim sends: here a tensor for each parameter."""
        return {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}

    def entries(self) -> dict[str, Tensor]:
        """What is observed of each victim, and its names, as they are called in a file; on the CPU."""
        tensors = {f"{self.kind}/{name}": tensor for name, tensor in self.observed.items()}
        tensors |= {"clients": self.clients, "rounds": self.rounds, "restarts": self.restarts}
        return _stored(tensors | ({} if self.examples is None else {EXAMPLE_COUNTS: self.examples}))

    def model_entries(self) -> dict[str, Tensor]:
        """Weights and buffers as they are called in a file, on the CPU."""
        tensors = {f"weights/{name}": tensor for name, tensor in (self.weights or {}).items()}
        return _stored(tensors | {f"buffers/{name}": tensor for name, tensor in self.buffers.items()})

    def packed(self) -> bytes:
        """The tensors as a safetensors file."""
        return dump_safetensors(self.entries() | self.model_entries())

    def description(self) -> dict[str, Any]:
        """What the JSON file beside the tensors says."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "protocol": dataclasses.asdict(self.protocol),
            "stacked": self.stacked,
            "resolution": self.resolution,
        }

    def save(self, path: str | Path) -> None:
        """Write `path` (.safetensors) and the protocol beside it (.json), each atomically."""
        path = Path(path)
        write_atomically(path, self.packed())
        write_atomically(path.with_suffix(".json"), json.dumps(self.description(), indent=2).encode() + b"\n")


class GradientLeak(Leak):
    """One gradient a victim, of the protocol's loss over its batch; or ``(before - after) / learning_rate``."""

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
    """The output of an attention block on a client's private input: `output`, `victims tokens width`.

    The protocol's shape is that of the input, tokens and width; the weights are the block's, as they were broadcast.
    """

    kind = "attention"
    precise = True

    def sent(self) -> dict[str, tuple[int, ...]]:
        """Shape of the block's output for an input of the protocol's shape."""
        with torch.no_grad():
            output = self.network(torch.zeros(1, *self.protocol.shape, device="meta"))
        return {"output": tuple(output.shape[1:])}


class TrainedWeightsLeak(Leak):
    """The weights of a model that its client trained to a stationary point, shape of each parameter.

    `weights` are the ones that were broadcast; the regulariser of the training is the protocol's `prior`, and the
    client's number of examples its `batch`.
    """

    kind = "trained_weights"
    precise = True

    @property
    def trained(self) -> Tensors:
        """Parameter name -> `victims *parameter`."""
        return self.observed


class CheckpointLeak(Leak):
    """The checkpoint that a client fine-tuned from the broadcast weights: all weights, or an adapter.

    `observed` has the shape of each parameter, or of each of the protocol's `adapter`, with a victims axis; behind
    secure aggregation it is the mean of `summed` clients', and `examples` the documents or images of all of them. The
    protocol's shape is the tokens of a document, at most, or that of an image.
    """

    kind = "checkpoint"

    def sent(self) -> dict[str, tuple[int, ...]]:
        """A tensor for each parameter, or for each of the adapter's."""
        if not self.protocol.adapter:
            return super().sent()
        from fedtap.simulator.models.adapters import Lora, adapter_shapes

        return adapter_shapes(self.network, Lora.parse(self.protocol.adapter))

    def tuned(self, victim: int) -> dict[str, Tensor]:
        """Those of the model that came back; an adapter is added to the weights that it stands beside."""
        sent, before = {name: tensor[victim] for name, tensor in self.observed.items()}, self.broadcast(victim)
        if not self.protocol.adapter:
            return before | sent
        from fedtap.simulator.models.adapters import Lora, merged

        return before | merged(before, sent, Lora.parse(self.protocol.adapter), self.network)


FORMER_KINDS = {"stationary": "trained_weights"}
"""Kinds of leak that had other names in saved files, whose tensors then have the former name before them."""

VICTIM_NAMES = ("clients", "rounds", "restarts")
"""Tensors of a saved leak that name its victims."""

EXAMPLE_COUNTS = "examples"
"""A tensor that a saved leak may have beside `VICTIM_NAMES`."""

NO_VICTIMS = {(), (0,)}
"""Shapes of names that hold no victim."""


def stack(leaks: Sequence[Leak]) -> Leak:
    """One stack of all victims of leaks of one kind and protocol.

    Weights stay shared where all leaks share the same ones, and get a victims axis where they differ.

    Raises:
        FedtapError: no leaks, or leaks of unequal kind or protocol.
    """
    if not leaks:
        raise FedtapError("There is no leak to stack: no client's reply was observed, so ask for at least one victim.")
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


def mean(leaks: Sequence[_AnyLeak], defence: str) -> _AnyLeak:
    """The mean of one client's replies on the same examples, as one leak.

    Args:
        defence: what the mean is defended by; noise wears off.

    Raises:
        FedtapError: they are of unequal protocols, or at unequal weights.
    """
    first, many = leaks[0], len(leaks)
    if any(leak.protocol != first.protocol or not _equal(first, leak) for leak in leaks[1:]):
        raise FedtapError(
            "Replies at different weights have no common gradient, so no mean: average replies at the same weights."
        )
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
        elif about["format"] not in (FORMAT, RECORDED):
            raise FedtapError(
                f"{short(beside, 100)} has format {short(about['format'])}, and this fedtap reads {FORMAT} and "
                f"{RECORDED}: save it again."
            )
        shared = about["weights"] if about["format"] == RECORDED else None
        if not (shared is None or (isinstance(shared, str) and re.fullmatch(r"[0-9a-f]{32}", shared))):
            raise ValueError("weights is null, or the digest of a file of weights, 32 hexadecimal digits")
        written = str(about["kind"])
        kind = KINDS.get(FORMER_KINDS.get(written, written))
        if kind is None:
            raise FedtapError(
                f"{short(beside, 100)} says that it is a leak of the kind {short(written)!r}, and none of the attacks "
                "here is on those: name one of a package of your own, --attack module:Class."
            )
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
    if about["format"] == RECORDED:
        tensors = _observed_by_now(tensors, path, stacked)
    if shared:
        tensors |= _shared_weights(path, shared)

    def group(prefix: str) -> Tensors:
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        as_is = (torch.float32, torch.float64) if kind.precise else (torch.float32,)
        return _each(found, lambda t: t.float() if t.is_floating_point() and t.dtype not in as_is else t)

    names = [tensors.get(name) for name in VICTIM_NAMES] + [
        tensors[name] for name in (EXAMPLE_COUNTS,) if name in tensors
    ]
    shapes = {tuple(tensor.shape) for tensor in names if tensor is not None and tensor.dtype == torch.int64}
    if (
        any(tensor is None or tensor.dtype != torch.int64 for tensor in names)
        or len(shapes) != 1
        or shapes & NO_VICTIMS
    ):
        raise FedtapError(
            f"{short(path, 100)} lacks the tensors {', '.join(VICTIM_NAMES)}, which say whose answers these are: "
            "add all three, int64, one entry a victim, at least one."
        )
    known = (*VICTIM_NAMES, EXAMPLE_COUNTS)
    groups = (f"{written}/", *MODEL_GROUPS)
    if strange := [name for name in tensors if name not in known and not name.startswith(groups)]:
        raise FedtapError(
            f"{short(path, 100)} holds {short(strange[0])}, which does not belong to a {kind.kind} leak: take it out."
        )
    leak = kind(
        observed=group(f"{written}/"),
        protocol=protocol,
        network=kind.architecture(protocol, build),
        weights=group("weights/") or None,
        buffers=group("buffers/"),
        clients=tensors["clients"],
        rounds=tensors["rounds"],
        restarts=tensors["restarts"],
        stacked=stacked,
        resolution=resolution,
        examples=tensors.get(EXAMPLE_COUNTS),
    )
    leak = dataclasses.replace(
        leak,
        observed=own_names(leak.observed, leak.network),
        weights=None if leak.weights is None else own_names(leak.weights, leak.network),
        buffers=own_names(leak.buffers, leak.network),
    )
    leak.check()
    return leak


def weights_file(folder: Path, digest: str) -> Path:
    """Where a folder of leaks keeps weights that several of them share."""
    return folder / "weights" / f"{digest}.safetensors"


def weights_digest(content: bytes) -> str:
    """By which a file of shared weights is named: 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _shared_weights(path: Path, digest: str) -> dict[str, Tensor]:
    """The weights and buffers to which a recorded leak refers.

    Raises:
        FedtapError: they are not there, or are not those that were recorded.
    """
    file = weights_file(path.parent, digest)
    if not is_file(file):
        raise FedtapError(
            f"{short(path, 100)} refers to the weights that its clients were sent, weights/{file.name} beside it, "
            "which is not there: copy the folder weights with it."
        )
    content = read_bytes(file, LARGEST_TENSORS)
    if weights_digest(content) != digest:
        raise FedtapError(
            f"{short(file, 120)} is damaged, since its content has another digest than its name: copy it again from "
            "the folder that was recorded."
        )
    tensors = parse_tensors(content, file)
    if strange := [name for name in tensors if not name.startswith(MODEL_GROUPS)]:
        raise FedtapError(f"{short(file, 120)} holds {short(strange[0])}, which is no weight: record the leak again.")
    return tensors


def _observed_by_now(tensors: Mapping[str, Tensor], path: Path, stacked: bool) -> dict[str, Tensor]:
    """The victims of a recorded leak that are there, without the places that are free.

    Raises:
        FedtapError: there is none, or a tensor has a type that is not recorded.
    """
    rounds = tensors.get("rounds")
    if rounds is None or rounds.ndim != 1 or rounds.dtype != torch.int64:
        return dict(tensors)  # which is refused for that
    if strange := [name for name, tensor in tensors.items() if tensor.dtype not in (torch.int64, torch.float32)]:
        raise FedtapError(
            f"{short(path, 100)} holds {short(strange[0])} as {tensors[strange[0]].dtype}, and float32 is recorded: "
            "record the leak again."
        )
    there = rounds != 0
    if not bool(there.any()):
        raise FedtapError(f"{short(path, 100)} holds no leak, only places for some: record a round, or take it out.")
    if bool(there.all()):
        return dict(tensors)
    of_victims = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.shape[:1] == there.shape and (stacked or not name.startswith(MODEL_GROUPS))
    }
    begun = torch.zeros_like(there)
    for tensor in of_victims.values():
        begun |= tensor[:, None].flatten(1).ne(0).any(1)
    if many := int((begun & ~there).sum()):
        warnings.warn(
            f"{short(path, 100)} holds {many} more in part, since the recording ended as it was being written, or goes "
            "on: it is left out.",
            stacklevel=3,
        )
    return {name: tensor[there] if name in of_victims else tensor for name, tensor in tensors.items()}


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
        raise FedtapError(f"No client could follow this protocol, since {error}: change that term.") from error


def with_terms(leak: Leak, **said: Any) -> Leak:
    """The leak with these terms of its protocol replaced; where that makes a gradient one of several local steps, it
    becomes an update, ``-learning_rate`` times the former gradient.

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
    """The buffers that are sent: floating point ones (not BatchNorm's step counter)."""
    return {name: buffer for name, buffer in network.named_buffers() if buffer.is_floating_point()}


LONGEST_TEXT = 200
"""Characters of each text of a protocol, at most."""

MOST_STEPS, MOST_CLASSES, MOST_NUMBERS = 10**6, 2**20, 2**28
"""Steps and clients of a sum, classes, and numbers in a batch of examples, at most: a leak of more is a mistake, or was
made to fill the memory."""


def protocol_of(document: Any) -> Protocol:
    """From its JSON form, not yet checked by `sound`.

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
    if max(protocol.local_steps, protocol.summed) > MOST_STEPS or protocol.classes > MOST_CLASSES:
        raise ValueError(f"local_steps and summed are at most {MOST_STEPS:,}, classes {MOST_CLASSES:,}")
    if protocol.batch * math.prod(protocol.shape) > MOST_NUMBERS:
        raise ValueError(f"a batch has at most {MOST_NUMBERS:,} numbers")
    if any(len(getattr(protocol, name)) > LONGEST_TEXT for name in TEXTS):
        raise ValueError(f"{', '.join(TEXTS)} have {LONGEST_TEXT} letters at most")


def _sound(protocol: Protocol, resolution: float) -> None:
    counts = (*protocol.shape, protocol.classes, protocol.batch, protocol.local_steps, protocol.summed)
    if not 1 <= len(protocol.shape) <= 3 or any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(
            "shape, classes, batch, local_steps and summed are whole numbers from 1, one to three in shape"
        )
    if protocol.batch % protocol.summed:
        raise ValueError("batch is a multiple of summed: each client has batch / summed images")
    if not (math.isfinite(protocol.learning_rate) and protocol.learning_rate > 0):
        raise ValueError("learning_rate is a number over 0")
    if not (math.isfinite(resolution) and resolution >= 0):
        raise ValueError("resolution is a number from 0")
    if not all(isinstance(getattr(protocol, name), str) for name in TEXTS):
        raise ValueError(f"{', '.join(TEXTS)} are text")
    for name, known in CHOICES.items():
        if getattr(protocol, name) not in known:
            raise ValueError(f"{name} is {' or '.join(known)}")
    ends, channels = PixelRange.of(protocol), protocol.shape[0]
    if any(len(end) not in (1, channels) or not all(map(_number, end)) for end in (ends.low, ends.high)):
        raise ValueError("low and high are numbers, one or one for each channel")
    low, high = (end * channels if len(end) == 1 else end for end in (ends.low, ends.high))
    if not all(below < above for below, above in zip(low, high, strict=True)):
        raise ValueError("low is below high")
    if len(protocol.shape) != 3 and ends != PIXELS:
        raise ValueError("low and high apply to images, and this shape is not an image's")
    if not (_number(protocol.momentum) and 0 <= protocol.momentum < 1):
        raise ValueError("momentum is a number from 0 and below 1")
    if not (_number(protocol.weight_decay) and protocol.weight_decay >= 0):
        raise ValueError("weight_decay is a number from 0")
    if type(protocol.nesterov) is not bool or (protocol.nesterov and not protocol.momentum):
        raise ValueError("nesterov is true or false, and true only beside momentum")
    if type(protocol.step_batch) is not int or not 0 <= protocol.step_batch <= protocol.batch:
        raise ValueError("step_batch is a whole number from 0, and batch at most")
    if protocol.step_batch and protocol.reduction == "sum":
        raise ValueError("step_batch goes with a loss that is a mean: give reduction mean")
    if protocol.optimiser == "adam" and protocol.momentum:
        raise ValueError("momentum is sgd's, and adam has its own: leave it 0")


TEXTS = ("model", "defence", "threat_model", "prior", "adapter", "prompt")
"""Terms of the protocol that are text."""

CHOICES = {
    "loss": ("cross_entropy", "bce", "mse"),
    "reduction": ("mean", "sum"),
    "optimiser": ("sgd", "adam", "adamw"),
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


def _stored(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
            f"{short(name)} of the leak is {found.dtype}, and a leak is floating point: save it as float32."
        )
    if tuple(found.shape) != wanted:
        raise FedtapError(
            f"{short(name)} of the leak has shape {short(tuple(found.shape), 30)}, but model {short(model, 40)!r} "
            f"needs {short(wanted, 30)}: the leak is of another model, image size or number of classes; name its "
            "model, --model."
        )
