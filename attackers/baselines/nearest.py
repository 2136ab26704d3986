"""Nearest: the auxiliary images whose gradient lies nearest to the leaked one; a baseline without a paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.teaching import FlatGradient, as_reconstruction, rows
from fedtap.simulator.attack import Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.leaks import Leak


@dataclass(frozen=True)
class Nearest(Learner):
    """Nearest neighbour among the auxiliary gradients: only auxiliary images can come back."""

    features: int = 4096
    """Numbers to which a longer gradient is hashed; hashing keeps distances on average."""

    def __post_init__(self) -> None:
        check_fields(self, features=1)

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        return Album(about, FlatGradient(network, self.features))

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        assert isinstance(inverter, Album)
        seen, images = rows(auxiliary, inverter.flat)
        inverter.labels.copy_(torch.cat([pairs.labels for pairs in auxiliary]))
        inverter.seen.copy_(seen)
        # a byte a pixel takes a quarter of the memory, and rounds by less than 1/510
        inverter.images.copy_((images * 255).round())

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, Album)
        distance, which = torch.cdist(inverter.flat(leak.observed), inverter.seen).min(1)
        return as_reconstruction(inverter.images[which].to(start) / 255, inverter.labels[which], distance, leak)


class Album(nn.Module):
    """All pairs: hashed gradients, labels, and images in bytes."""

    seen: Tensor
    labels: Tensor
    images: Tensor

    def __init__(self, about: Provenance, flat: FlatGradient) -> None:
        super().__init__()
        self.flat = flat
        pixels = math.prod(about.protocol.shape)
        self.register_buffer("seen", torch.zeros(about.pairs, flat.length))
        self.register_buffer("labels", torch.zeros(about.pairs, about.protocol.batch, dtype=torch.long))
        self.register_buffer("images", torch.zeros(about.pairs, about.protocol.batch, pixels, dtype=torch.uint8))
