"""Auxiliary pairs: examples of the attacker's own, each with the gradient that it causes; attacks are trained on them.

A set of pairs is a folder: `auxiliary.json`, and chunks of pairs as safetensors, which are read one at a time, so that
a set need not fit into memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtap.simulator.defences.layers import functional_batchnorm, training_loss
from fedtap.simulator.errors import DamagedError, FedtapError, short
from fedtap.simulator.files import is_file, read_json, read_tensors, write_atomically
from fedtap.simulator.leaks import ROUNDING, GradientLeak, Protocol, Tensors, protocol_of, sound

PAIRS_FORMAT = 3
"""Version of the saved form; a reader refuses any other. In version 1, pairs were gradients that had not crossed the
wire."""

_AT_ONCE, _CUDA_AT_ONCE = 256, 1024
"""Pairs whose gradients are computed together."""

CHUNK_NUMBERS, CUDA_CHUNK_NUMBERS = 2**21, 2**27
"""Numbers in a chunk's gradients: 8 MiB of float32, which caches hold, and 512 MiB where a GPU computes them."""

MOST_CHUNK_NUMBERS = 2**24
"""Numbers in the gradients of a chunk on the CPU that has no more pairs than are computed together: 64 MiB."""

MOST_PAIRS = 10**9
"""Pairs of a set, and trainings behind it, at most."""

Build = Callable[[str, tuple[int, ...], int], nn.Module]
"""`(model name, shape, classes) -> network on the meta device`."""


@dataclass(frozen=True)
class Provenance:
    """Where auxiliary pairs are from, in words: saved with the pairs, and with every attack trained on them."""

    protocol: Protocol
    """The public terms of an exchange: one local step, whose batch is the pair's."""
    dataset: str
    """Name of the dataset that the examples are from."""
    pairs: int
    auxiliary_source: str = "compromised_client"
    """Who computed the gradients: `compromised_client`, or `server`."""
    auxiliary_trainings: int = 0
    """Trainings of the compromised client, along which pairs were recorded; 0 means all at the broadcast weights."""
    labels: str = "own"
    """The examples' own labels, or `random` ones."""
    digest: str = ""
    """Digest of the broadcast weights and of the examples, by which sets are told apart."""

    def __str__(self) -> str:
        p = self.protocol
        return (
            f"{self.pairs:,} pairs of {p.model} on {'x'.join(map(str, p.shape))} images of {self.dataset} "
            f"in {p.classes} classes, batch {p.batch}, defence {p.defence}, {p.threat_model}, from the "
            f"{self.auxiliary_source}"
            + (f", along {self.auxiliary_trainings} trainings" if self.auxiliary_trainings else "")
            + (f", with {self.labels} labels" if self.labels != "own" else "")
        )

    @staticmethod
    def of(document: dict[str, object]) -> Provenance:
        """From the form in JSON.

        Raises:
            KeyError, TypeError, ValueError: it is not of that form, or too large.
        """
        protocol = protocol_of(document["protocol"])
        made = Provenance(protocol, **{name: value for name, value in document.items() if name != "protocol"})  # type: ignore[arg-type]
        sound(protocol)
        if any(
            type(count) is not int or not 0 <= count <= MOST_PAIRS for count in (made.pairs, made.auxiliary_trainings)
        ):
            raise ValueError(f"pairs and auxiliary_trainings are whole numbers from 0 to {MOST_PAIRS:,}")
        texts = (made.dataset, made.auxiliary_source, made.labels, made.digest)
        if not all(isinstance(text, str) and len(text) <= 4096 for text in texts):
            raise ValueError("dataset, auxiliary_source, labels and digest are text")
        return made


@dataclass(frozen=True)
class Pairs:
    """Some pairs: a leak whose entries are theirs, and the examples that caused it.

    Args:
        images: in [0, 1].
    """

    leak: GradientLeak
    images: Float[Tensor, "pairs batch channel height width"]
    labels: Int[Tensor, "pairs batch"]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Pairs:
        """These pairs on another device."""
        return Pairs(self.leak.to(device), self.images.to(device), self.labels.to(device))

    def __getitem__(self, which: slice | Tensor) -> Pairs:
        return Pairs(self.leak[which], self.images[which], self.labels[which])


@dataclass(frozen=True)
class Auxiliary:
    """The pairs in a folder, iterated over in chunks, always in the same order.

    Args:
        folder: where `record` left them.
        about: their provenance; its `pairs` may be fewer than the folder holds, and are then the first ones.
        network: the architecture, on the meta device.
        device: where pairs are put as they are read, and where an attack learns from them.
    """

    folder: Path
    about: Provenance
    network: nn.Module = dataclasses.field(repr=False, compare=False)
    device: str = "cpu"

    def __len__(self) -> int:
        return self.about.pairs

    def __iter__(self) -> Iterator[Pairs]:
        left = len(self)
        for number in range(len(self)):  # a chunk has a pair at least
            if left <= 0:
                return
            pairs = self._read(number)[:left]
            left -= len(pairs)
            yield pairs.to(self.device)

    def _read(self, number: int) -> Pairs:
        path = self.folder / _chunk(number)
        try:
            tensors = read_tensors(path)
            images, labels, clients = tensors["images"], tensors["labels"], tensors["clients"]
            self._check(images, labels, clients)
        except (FedtapError, KeyError, ValueError) as error:
            raise _not_whole(path, error) from error
        groups: dict[str, dict[str, Tensor]] = {"gradient": {}, "weights": {}, "buffers": {}}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            if group in groups:
                groups[group][key] = tensor
        leak = GradientLeak(
            observed=groups["gradient"],
            protocol=self.about.protocol,
            network=self.network,
            weights=groups["weights"] or None,
            buffers=groups["buffers"],
            clients=clients,
            rounds=torch.zeros(len(labels), dtype=torch.long),
            restarts=torch.zeros(len(labels), dtype=torch.long),
            resolution=ROUNDING / self.about.protocol.learning_rate,
        )
        try:
            leak.check()
        except FedtapError as error:
            raise _not_whole(path, error) from error
        kinds = {name: parameter.dtype for name, parameter in self.network.named_parameters()}
        if strange := [name for name, kind in kinds.items() if leak.observed[name].dtype != kind]:
            raise _not_whole(path, ValueError(f"{strange[0]} is {leak.observed[strange[0]].dtype}"))
        return Pairs(leak, images, labels)

    def _check(self, images: Tensor, labels: Tensor, clients: Tensor) -> None:
        """Raise ValueError where examples do not match the provenance."""
        protocol, pairs = self.about.protocol, len(clients) if clients.ndim == 1 else 0
        wanted = {
            "images": (images, torch.float32, (pairs, protocol.batch, *protocol.shape)),
            "labels": (labels, torch.int64, (pairs, protocol.batch)),
            "clients": (clients, torch.int64, (pairs,)),
        }
        for name, (tensor, kind, shape) in wanted.items():
            if tensor.dtype != kind or tuple(tensor.shape) != shape or not pairs:
                raise ValueError(f"{name} are {tensor.dtype} of shape {short(tuple(tensor.shape), 30)}")
        if not bool(((images >= 0) & (images <= 1)).all()):  # nor NaN
            raise ValueError("pixels are outside [0, 1]")
        if not bool(((labels >= 0) & (labels < protocol.classes)).all()):
            raise ValueError("labels are outside the classes")

    def first(self, pairs: int) -> Auxiliary:
        """The first `pairs` of these pairs."""
        return dataclasses.replace(self, about=dataclasses.replace(self.about, pairs=min(pairs, len(self))))

    @staticmethod
    def record(folder: Path, about: Provenance, network: nn.Module, chunks: Iterable[Pairs]) -> Auxiliary:
        """Write pairs as they come; the description last, so that a folder with one is whole.

        Raises:
            FedtapError: the folder cannot be written.
        """
        written = 0
        for number, pairs in enumerate(chunks):
            tensors = {f"gradient/{name}": tensor for name, tensor in pairs.leak.observed.items()}
            tensors |= {f"weights/{name}": tensor for name, tensor in (pairs.leak.weights or {}).items()}
            tensors |= {f"buffers/{name}": tensor for name, tensor in pairs.leak.buffers.items()}
            tensors |= {"images": pairs.images, "labels": pairs.labels, "clients": pairs.leak.clients}
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_atomically(folder / _chunk(number), save(whole))
            written += len(pairs)
        if written != about.pairs:
            raise AssertionError(f"{written} pairs came, and {about.pairs} were announced")
        document = {"format": PAIRS_FORMAT, **dataclasses.asdict(about)}
        write_atomically(folder / "auxiliary.json", json.dumps(document, indent=2).encode() + b"\n")
        return Auxiliary(folder, about, network)

    @staticmethod
    def saved(folder: Path, build: Build, wanted: Provenance | None = None) -> Auxiliary | None:
        """The set that a folder holds; None where there is none, or one that was not finished.

        Args:
            wanted: the provenance that it has to have, except for the number of pairs; nothing is built of any other.
                Where it is None, a folder that names code to import is refused.

        Raises:
            FedtapError: its description is damaged, or of other pairs.
        """
        file = folder / "auxiliary.json"
        if not is_file(file):
            return None
        try:
            document = read_json(file)
            if document.pop("format") != PAIRS_FORMAT:
                raise ValueError(f"a format other than {PAIRS_FORMAT}")
            about = Provenance.of(document)
            if wanted is None and ":" in about.protocol.model:
                raise ValueError("its model names code to import, which a file may not")
            if wanted is not None and dataclasses.replace(about, pairs=wanted.pairs) != wanted:
                raise ValueError("it is of other pairs than this run asks for")
        except (FedtapError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"{short(file, 90)} does not describe auxiliary pairs ({type(error).__name__}: {short(error, 90)}): "
                "delete its folder and run again."
            ) from error
        return Auxiliary(folder, about, build(about.protocol.model, about.protocol.shape, about.protocol.classes))


def _not_whole(path: Path, error: Exception) -> DamagedError:
    return DamagedError(
        f"{short(path, 90)} cannot be used ({short(error, 90)}), so the auxiliary pairs are not whole: delete their "
        "folder and run again."
    )


def _chunk(number: int) -> str:
    return f"pairs_{number:05d}.safetensors"


def digest(tensors: Tensors) -> str:
    """A name for these values: equal exactly where all bits are."""
    whole = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def digest_of(about: Provenance) -> str:
    """A name for auxiliary pairs of this provenance."""
    return hashlib.blake2b(repr(about).encode(), digest_size=8).hexdigest()


def trainings(pairs: int, many: int) -> tuple[Int[Tensor, " pairs"], ...]:
    """Indices of the pairs of each training of the compromised client, in order; all in one where it did not train."""
    return torch.arange(pairs).tensor_split(max(1, many))


def chunk_size(network: nn.Module, device: torch.device | str = "cpu") -> int:
    """Pairs in a chunk: on the CPU those computed together, more of a small model and fewer of a large one; more where
    a GPU computes them, which takes as long for few.
    """
    weights = sum(parameter.numel() for parameter in network.parameters())
    if str(device) != "cpu":
        return max(1, CUDA_CHUNK_NUMBERS // weights)
    return max(1, CHUNK_NUMBERS // weights, min(_AT_ONCE, MOST_CHUNK_NUMBERS // weights))


def gradients(
    network: nn.Module,
    images: Float[Tensor, "pairs batch channel height width"],
    labels: Int[Tensor, "pairs batch"],
    device: torch.device | str = "cpu",
) -> dict[str, Float[Tensor, "pairs *parameter"]]:
    """The gradient of each pair's loss, as a client's training step computes it, for all pairs at once.

    BatchNorm in training mode uses the batch's own statistics and keeps none of them; in eval mode, the running ones. A
    frozen parameter's gradient is zero.

    Args:
        network: in training mode, but for BatchNorm where that is frozen; on the CPU, as are images and gradients.
        device: where the gradients are computed.
    """
    stateless = functional_batchnorm(network)
    known = {
        name: value.detach().to(device) for name, value in (*stateless.named_parameters(), *stateless.named_buffers())
    }

    def loss(trained: dict[str, Tensor], some: Tensor, named: Tensor) -> Tensor:
        given = {**known, **trained}
        return training_loss(stateless, some, named, lambda images: functional_call(stateless, given, (images,)))

    trained = {name: known[name] for name, weight in stateless.named_parameters() if weight.requires_grad}
    batched = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    at_once = _AT_ONCE if str(device) == "cpu" else _CUDA_AT_ONCE
    parts = zip(*(side.chunk(max(1, -(-len(images) // at_once))) for side in (images, labels)), strict=True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be batched
        found = [batched(trained, some.to(device), named.to(device)) for some, named in parts]
    out = {}
    for name, weight in stateless.named_parameters():
        stacks = [part[name] for part in found if name in part] or [weight.new_zeros(len(images), *weight.shape)]
        out[name] = (stacks[0] if len(stacks) == 1 else torch.cat(stacks)).cpu()
    return out
