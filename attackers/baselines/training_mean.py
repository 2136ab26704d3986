"""Training mean: the mean of the auxiliary images, whatever was sent; a baseline without a paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtap.attackers.parts.teaching import as_reconstruction
from fedtap.simulator.attack import Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.leaks import Leak


@dataclass(frozen=True)
class TrainingMean(Learner):
    """The constant reconstruction of least mean squared error over the auxiliary images; label 0."""

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        return Mean(about)

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        assert isinstance(inverter, Mean)
        total, square = torch.zeros_like(inverter.image, dtype=torch.float64), 0.0
        for pairs in auxiliary:
            total += pairs.images.double().mean(1).sum(0)
            square += float(pairs.images.double().square().mean((1, 2, 3, 4)).sum())
        mean = total / len(auxiliary)
        inverter.image.copy_(mean)
        # E|x - m|^2 = E|x|^2 - |m|^2
        inverter.error.fill_(square / len(auxiliary) - float(mean.square().mean()))

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, Mean)
        nothing = torch.zeros(start.shape[:2], dtype=torch.long, device=start.device)
        return as_reconstruction(inverter.image.expand_as(start), nothing, inverter.error, leak)


class Mean(nn.Module):
    """One image, and the mean squared distance of the auxiliary images from it."""

    image: Tensor
    error: Tensor

    def __init__(self, about: Provenance) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(about.protocol.shape))
        self.register_buffer("error", torch.tensor(0.0))
