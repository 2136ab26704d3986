"""From Flower's records to tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedtap.simulator.errors import FedtapError

NPY = b"\x93NUMPY"
"""How an array begins. numpy would also open a zip, of any size, which no client of Flower's sends."""


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The record's arrays as tensors of their own memory, by name.

    Raises:
        Exception: the bytes are no array of numbers; nothing is unpickled.
    """
    for name, array in record.items():
        if not array.data.startswith(NPY):
            raise ValueError(f"the bytes of {name} are no array")
    return {name: torch.from_numpy(np.require(array.numpy(), requirements="W")) for name, array in record.items()}


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
