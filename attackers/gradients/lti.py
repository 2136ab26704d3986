"""LTI, Learning to Invert: a multilayer perceptron from the whole gradient to the pixels, taught on auxiliary pairs.

Wu et al. 2022, https://arxiv.org/abs/2210.10880.
Departs from the paper in hashing a long gradient to a fixed number of features, not to half its length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.teaching import FlatGradient, as_reconstruction, rows, teach
from fedtap.simulator.attack import Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.leaks import Leak, Tensors


@dataclass(frozen=True)
class LTI(Learner):
    """Learning to Invert, at its paper's size."""

    width: int = 3000
    """Units of each of the two hidden layers."""
    epochs: int = 200
    """Passes over all pairs; the learning rate falls to a tenth after three quarters of them."""
    rate: float = 1e-4
    """Adam's learning rate."""
    batch: int = 256
    """Pairs in each step of Adam."""
    features: int = 32768
    """Numbers to which a longer gradient is hashed."""

    def __post_init__(self) -> None:
        check_fields(self, width=1, batch=1, features=1)

    def accepts(self, leak: Leak) -> None:
        """Leaks of networks whose last layer shows the labels."""
        super().accepts(leak)
        last_linear(leak)

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        return Perceptron(about, network, self.features, self.width)

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        assert isinstance(inverter, Perceptron)
        seen, images = rows(auxiliary, inverter.flat)
        optimiser = torch.optim.Adam(inverter.layers.parameters(), self.rate)
        steps = self.epochs * math.ceil(len(seen) / self.batch)
        # a tenth of the rate after three quarters of the steps
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3 * steps // 4])
        how = {"epochs": self.epochs, "batch": self.batch, "seed": seed}
        inverter.error.copy_(teach(inverter.layers, seen, images, optimiser, schedule, **how))

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, Perceptron)
        return as_reconstruction(inverter(leak.observed), recovered(leak), inverter.error, leak)


class Perceptron(nn.Module):
    """Linear–ReLU–linear–ReLU–linear–sigmoid, from the flat gradient to all pixels of the batch."""

    error: Tensor

    def __init__(self, about: Provenance, network: nn.Module, features: int, width: int) -> None:
        super().__init__()
        self.flat = FlatGradient(network, features)
        batch, pixels = about.protocol.batch, math.prod(about.protocol.shape)
        self.layers = nn.Sequential(
            nn.Linear(self.flat.length, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, batch * pixels),
            nn.Sigmoid(),
            nn.Unflatten(1, (batch, pixels)),
        )
        self.register_buffer("error", torch.tensor(0.0))

    def forward(self, gradient: Tensors) -> Tensor:
        return self.layers(self.flat(gradient))  # type: ignore[no-any-return]
