"""Gradients and draws for tests of defences."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn(*names: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(names) % 2**31)


def update(*lead: int, seed: int = 0) -> dict[str, Tensor]:
    draw = drawn(seed)
    return {"b": torch.randn(*lead, 3, 4, generator=draw), "a": torch.randn(*lead, 5, generator=draw)}


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


def batch_of(exchanges: int, images: int, size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.rand(exchanges, images, 3, size, size, generator=drawn(3)), torch.arange(exchanges * images).view(
        exchanges, images
    ) % 10
