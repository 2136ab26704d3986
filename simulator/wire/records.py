"""From Flower's records to tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy
from torch import Tensor

from fedtap.simulator.errors import FedtapError

NPY = b"\x93NUMPY"
"""How an array begins. numpy would also open a zip, of any size, which no client of Flower's sends."""

LARGEST_HEADER = 1024
"""Bytes of a header that is remembered, at most; one of plain numbers has 128."""


_Kind = TypeVar("_Kind", ArrayRecord, MetricRecord, ConfigRecord)


def records_of(content: RecordDict, kind: type[_Kind]) -> list[_Kind]:
    """A message's records of this kind; Flower's own properties build and check a dictionary at each look."""
    return [record for record in content.values() if isinstance(record, kind)]


def record_named(name: str, content: RecordDict, kind: type[_Kind]) -> _Kind:
    """The message's record of this kind and name, without a look at the others.

    Raises:
        KeyError: it has none.
    """
    found = content[name]
    if not isinstance(found, kind):
        raise KeyError(name)
    return found


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The record's arrays as tensors of their own memory, by name.

    Raises:
        Exception: the bytes are no array of numbers; nothing is unpickled.
    """
    for name, array in record.items():
        if not array.data.startswith(NPY):
            raise ValueError(f"the bytes of {name} are no array")
    return {name: torch.from_numpy(numbers_of(array)) for name, array in record.items()}


def numbers_of(array: Array) -> np.ndarray:
    """As `array.numpy()`, but a header that was met before is not parsed again, which takes longer than the rest."""
    start = len(NPY) + 4 + int.from_bytes(array.data[8:10], "little")  # version and length of the header
    if array.stype != "numpy.ndarray" or array.data[6:8] != b"\1\0" or start > LARGEST_HEADER:
        return np.require(array.numpy(), requirements="W")
    shape, fortran, dtype = _header(bytes(array.data[:start]))
    if fortran or dtype.hasobject:
        return np.require(array.numpy(), requirements="W")  # which refuses objects
    count = math.prod(shape)
    return np.frombuffer(array.data, dtype, count, start if count else 0).reshape(shape).copy()


def array_with(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    """As `Array(dtype, shape, stype, data)`, whose checks are made once of each kind, and take longer than the rest."""
    array = copy.copy(_without_data(dtype, shape, stype))
    array.data = data
    return array


@lru_cache(maxsize=4096)
def _without_data(dtype: str, shape: tuple[int, ...], stype: str) -> Array:
    return Array(dtype, shape, stype, b"")


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """As `ArrayRecord(tensors)`, with the numbers copied once in place of three times; always in C's order."""
    return _record({name: _in_order(tensor) for name, tensor in tensors.items()})


def rows_as_records(stacks: Mapping[str, Tensor]) -> Iterator[ArrayRecord]:
    """Of stacks of tensors, name -> `clients *shape`, each client's by `record_of`."""
    whole = {name: _in_order(stack) for name, stack in stacks.items()}
    for client in range(len(next(iter(whole.values())))):
        yield _record({name: stack[client, ...] for name, stack in whole.items()})


def _in_order(tensor: Tensor) -> np.ndarray:
    return np.require(tensor.detach().numpy(), requirements="C")


def _record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    record = ArrayRecord()  # which copies arrays that are handed to it all at once
    for name, numbers in arrays.items():
        kind, beginning = _beginning(numbers.dtype, numbers.shape)
        record[name] = array_with(kind, numbers.shape, "numpy.ndarray", b"".join((beginning, numbers.data)))
    return record


@lru_cache(maxsize=4096)
def _beginning(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[str, bytes]:
    """The type's name, and with what `numpy.save` begins an array in C's order of this type and shape."""
    header = BytesIO()
    about = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(header, about)
    return str(dtype), header.getvalue()


@lru_cache(maxsize=4096)
def _header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of an array that begins with these bytes."""
    return npy.read_array_header_1_0(BytesIO(start[8:]))


@contextmanager
def reading(client: int) -> Iterator[None]:
    """Whatever is raised while a client's reply is read is a sentence about the client.

    Raises:
        FedtapError: in the place of any exception of another kind.
    """
    try:
        yield
    except FedtapError:
        raise
    except Exception as error:
        raise FedtapError(f"Client {client} sent what cannot be read ({type(error).__name__}).") from error
