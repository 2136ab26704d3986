"""Practice: public examples that the attacker chose, each with the gradient that it caused.

A set of pairs is a folder: `practice.json`, and chunks of pairs as safetensors, which are read one at a time, so that a
set need not fit into memory.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

from simulator.errors import DamagedError
from simulator.files import write_atomically
from simulator.leaks import GradientLeak, Protocol, Tensors
from simulator.precode import training_loss

FORMAT = 1
"""Version of the saved form; a reader refuses any other."""

CHUNK = 2**24
"""Numbers in a chunk's gradients: 64 MiB of float32."""

Build = Callable[[str, tuple[int, ...], int], nn.Module]
"""`(model name, shape, classes) -> network on the meta device`."""


@dataclass(frozen=True)
class About:
    """What a practice was, in words: it goes with the pairs, and with whatever learned from them."""

    protocol: Protocol
    """The public terms of an exchange; in practice a single step, whose batch is the pair's."""
    world: str
    """Where the examples are from."""
    pairs: int
    source: str = "compromised_client"
    """Who computed the gradients."""
    drifts: int = 0
    """Trainings of the compromised client, along which pairs were met; 0 means all at the weights in force."""
    labels: str = "own"
    """The examples' own labels, or `random` ones."""
    digest: str = ""
    """Of the weights in force and of the examples: it tells sets apart, and tells nothing else of them."""

    def __str__(self) -> str:
        p = self.protocol
        return (
            f"{self.pairs:,} pairs of {p.model} on {'x'.join(map(str, p.shape))} images of {self.world} "
            f"in {p.classes} classes, batch {p.batch}, defence {p.defence}, {p.listener}, from the {self.source}"
            + (f", along {self.drifts} trainings" if self.drifts else "")
            + (f", with {self.labels} labels" if self.labels != "own" else "")
        )

    @staticmethod
    def of(document: dict[str, object]) -> About:
        """From the form in JSON.

        Raises:
            KeyError, TypeError, ValueError: it is not of that form.
        """
        about = {name: value for name, value in document.items() if name != "protocol"}
        made = About(Protocol.of(document["protocol"]), **about)  # type: ignore[arg-type]
        if any(type(count) is not int or count < 0 for count in (made.pairs, made.drifts)):
            raise ValueError("pairs and drifts are whole numbers from 0")
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
        """The same pairs on another device."""
        return Pairs(self.leak.to(device), self.images.to(device), self.labels.to(device))

    def __getitem__(self, which: slice | Tensor) -> Pairs:
        return Pairs(self.leak[which], self.images[which], self.labels[which])


@dataclass(frozen=True)
class Practice:
    """The pairs in a folder, iterated over in chunks, always in the same order.

    Args:
        folder: where `record` left them.
        about: what they are; `pairs` may be less than the folder holds: the first so many.
        network: the architecture, on the meta device.
        device: where pairs are put as they are read, and where an attack learns from them.
    """

    folder: Path
    about: About
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
            tensors = load_file(path)
            images, labels, clients = tensors["images"], tensors["labels"], tensors["clients"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DamagedError(
                f"{path} cannot be read ({error}), so the practice is not whole: delete {self.folder} and run again."
            ) from error
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
        )
        leak.check()
        return Pairs(leak, images, labels)

    def first(self, pairs: int) -> Practice:
        """The first so many of these pairs."""
        return dataclasses.replace(self, about=dataclasses.replace(self.about, pairs=min(pairs, len(self))))

    @staticmethod
    def record(folder: Path, about: About, network: nn.Module, chunks: Iterable[Pairs]) -> Practice:
        """Write pairs as they come; the description last, so that a folder with one is whole.

        Raises:
            FedtapError: the folder cannot be written.
        """
        heard = 0
        for number, pairs in enumerate(chunks):
            tensors = {f"gradient/{name}": tensor for name, tensor in pairs.leak.observed.items()}
            tensors |= {f"weights/{name}": tensor for name, tensor in (pairs.leak.weights or {}).items()}
            tensors |= {f"buffers/{name}": tensor for name, tensor in pairs.leak.buffers.items()}
            tensors |= {"images": pairs.images, "labels": pairs.labels, "clients": pairs.leak.clients}
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_atomically(folder / _chunk(number), save(whole))
            heard += len(pairs)
        if heard != about.pairs:
            raise AssertionError(f"{heard} pairs came, and {about.pairs} were announced")
        document = {"format": FORMAT, **dataclasses.asdict(about)}
        write_atomically(folder / "practice.json", json.dumps(document, indent=2).encode() + b"\n")
        return Practice(folder, about, network)

    @staticmethod
    def saved(folder: Path, build: Build) -> Practice | None:
        """The set that a folder holds; None where there is none, or one that was not finished.

        Raises:
            FedtapError: its description is damaged.
        """
        file = folder / "practice.json"
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text())
            if document.pop("format") != FORMAT:
                raise ValueError(f"a format other than {FORMAT}")
            about = About.of(document)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(
                f"{file} does not describe a practice ({type(error).__name__}: {error}): delete {folder} and run again."
            ) from error
        return Practice(folder, about, build(about.protocol.model, about.protocol.shape, about.protocol.classes))


def _chunk(number: int) -> str:
    return f"pairs_{number:05d}.safetensors"


def digest(tensors: Tensors) -> str:
    """A name for these values, the same wherever they are the same to the bit."""
    whole = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def digest_of(about: About) -> str:
    """A name for this practice."""
    return hashlib.blake2b(repr(about).encode(), digest_size=8).hexdigest()


def trainings(pairs: int, drifts: int) -> tuple[Int[Tensor, " pairs"], ...]:
    """Which pairs belong to which training of the compromised client, in order; all to one where it did not train."""
    return torch.arange(pairs).tensor_split(max(1, drifts))


def chunk_size(network: nn.Module) -> int:
    """Pairs in a chunk."""
    return max(1, CHUNK // sum(parameter.numel() for parameter in network.parameters()))


def gradients(
    network: nn.Module,
    images: Float[Tensor, "pairs batch channel height width"],
    labels: Int[Tensor, "pairs batch"],
) -> dict[str, Float[Tensor, "pairs *parameter"]]:
    """The gradient of each pair's loss, as a client's training step computes it, for all pairs at once.

    BatchNorm uses the batch's own statistics, and keeps none of them. A frozen parameter's gradient is zero.
    """
    stateless = replace_all_batch_norm_modules_(copy.deepcopy(network).train())

    def loss(trained: dict[str, Tensor], some: Tensor, named: Tensor) -> Tensor:
        return training_loss(stateless, some, named, lambda images: functional_call(stateless, trained, (images,)))

    trained = {name: weight.detach() for name, weight in stateless.named_parameters() if weight.requires_grad}
    found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=128, randomness="different")(
        trained, images, labels
    )
    return {
        name: found[name].contiguous() if name in found else weight.new_zeros(len(images), *weight.shape)
        for name, weight in stateless.named_parameters()
    }
