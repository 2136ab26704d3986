"""A file of leaks that grows as they are observed, and is a whole safetensors file all the while.

It holds a stack of victims, each tensor `victims *shape`, and is made with room for more of them, which takes no disk
before it is used where the file system knows holes. A victim is written into its place, and its round, which is 0 in
places that are free, last of all: a process that is killed loses the leak that it was writing and no other, and
whoever reads the file meanwhile sees whole leaks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save as dump_weights

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file, whole, write_atomically
from fedtap.simulator.leaks import RECORDED, Leak, Tensors, weights_digest, weights_file

LARGEST_STACK = 4 << 20
"""Bytes of a file's victims, at most, or one victim: an attack runs on all victims of a file at once."""

_TYPES = {torch.int64: "I64", torch.float32: "F32"}
"""safetensors' names of the types that are recorded, those of more bytes first, so that all are aligned."""


class RecordedStack:
    """The leaks of clients that were sent the same weights in one round, or each weights of its own.

    Attributes:
        path: of the .safetensors file; its .json lies beside it.
        room: victims for whom there is a place.
        filled: victims that are in the file.
    """

    def __init__(self, path: Path, leak: Leak, room: int, weights: str | None) -> None:
        """Write the file with its first victim.

        Args:
            leak: of one victim.
            room: victims to make room for, as far as `LARGEST_STACK` allows.
            weights: what `keep_weights` gave for the weights that all victims were sent; None to keep each victim's own
                beside its reply.

        Raises:
            FedtapError: it cannot be written.
        """
        self.path, self.filled, self._own_weights = path, 0, weights is None
        first = self._entries(leak)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in first.items()}
        self.room = max(1, min(room, LARGEST_STACK // sum(sizes.values())))
        header, at = {}, 0
        self._places: dict[str, int] = {}
        for name, tensor in sorted(first.items(), key=lambda entry: list(_TYPES).index(entry[1].dtype)):
            until = at + self.room * sizes[name]
            shape = [self.room, *tensor.shape[1:]]
            header[name] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": [at, until]}
            self._places[name], at = at, until
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data begin at a multiple of 8, as in files that safetensors writes
        self._start = 8 + len(text)
        about = {**leak.description(), "format": RECORDED, "stacked": self._own_weights, "weights": weights}
        write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2).encode() + b"\n")
        with whole(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._start + at)
            self._put(file, first)
        self.filled = 1

    @property
    def full(self) -> bool:
        """Whether there is no place left."""
        return self.filled == self.room

    def add(self, leak: Leak) -> None:
        """Write one more victim into the file.

        Raises:
            FedtapError: it cannot be written; its place stays free.
        """
        try:
            with self.path.open("r+b", buffering=0) as file:
                self._put(file, self._entries(leak))
        except OSError as error:
            why = short(error.strerror or error)
            raise FedtapError(f"{short(self.path, 120)} could not be written ({why}): make room.") from error
        self.filled += 1

    def _entries(self, leak: Leak) -> Tensors:
        """What is written of a victim, its round last."""
        entries = leak.entries()
        if self._own_weights:
            entries |= {name: tensor[None] for name, tensor in leak.model_entries().items()}
        entries["rounds"] = entries.pop("rounds")
        return entries

    def _put(self, file: IO[bytes], entries: Tensors) -> None:
        for name, tensor in entries.items():
            content = memoryview(tensor.numpy().tobytes())
            file.seek(self._start + self._places[name] + self.filled * len(content))
            while content:  # a disk that is nearly full takes a part
                content = content[file.write(content) :]


def keep_weights(folder: Path, leak: Leak) -> str:
    """Write the weights and buffers that clients were sent, once, and give the digest that names their file.

    Raises:
        FedtapError: they cannot be written.
    """
    content = dump_weights(leak.model_entries())
    digest = weights_digest(content)
    if not is_file(path := weights_file(folder, digest)):
        write_atomically(path, content)
    return digest
