"""Stacks of gradients, whose tensors have a leading axis of exchanges, as rows and one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.simulator.defences.source import Source
from fedtap.simulator.leaks import Tensors

Rows = Float[Tensor, "exchanges entries"]
Draw = Callable[[Tensor, Source], Tensor]


def each(drawn: Draw, tensor: Tensor, draws: Sequence[Source]) -> Tensor:
    """Each exchange's tensor by itself, with its own source."""
    return torch.stack([drawn(row, source) for row, source in zip(tensor.unbind(), draws, strict=True)])


def along(factor: Float[Tensor, "exchanges"], tensor: Tensor) -> Tensor:
    """One number an exchange, to be multiplied with its tensor."""
    return factor.view(-1, *[1] * (tensor.dim() - 1))


def flat(gradients: Tensors) -> Rows:
    """All entries of each exchange in a row, in the order of the names."""
    return torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], dim=1)


def unflat(rows: Rows, like: Tensors) -> dict[str, Tensor]:
    """The rows as the tensors that `flat` made rows of."""
    names = sorted(like)
    parts = rows.split([like[name][0].numel() for name in names], dim=1)  # type: ignore[no-untyped-call]
    return {name: part.reshape(like[name].shape) for name, part in zip(names, parts, strict=True)}
