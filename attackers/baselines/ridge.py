"""Ridge: linear regression from the gradient to the pixels, in closed form; a baseline without a paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.teaching import HELD_OUT_EVERY, FlatGradient, as_reconstruction, rows
from fedtap.simulator.attack import Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.leaks import Leak, Tensors

RIDGES = tuple(10.0**power for power in range(-6, 2))
"""Ridges that are tried, as shares of the Gram matrix's mean diagonal."""


@dataclass(frozen=True)
class Ridge(Learner):
    """The linear map of least ridge-regularised squared error; the ridge is chosen on held-out auxiliary pairs."""

    features: int = 16384
    """Numbers to which a longer gradient is hashed."""

    def __post_init__(self) -> None:
        check_fields(self, features=1)

    def accepts(self, leak: Leak) -> None:
        """Leaks of networks whose last layer shows the labels."""
        super().accepts(leak)
        last_linear(leak)

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        return RidgeMap(about, FlatGradient(network, self.features))

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        """Solve the kernel form ``slope = X' (X X' + ridge)^-1 Y``: there are fewer pairs than features."""
        assert isinstance(inverter, RidgeMap)
        seen, images = rows(auxiliary, inverter.flat)
        images = images.flatten(1)
        kept = len(seen) - max(1, len(seen) // HELD_OUT_EVERY)
        mean, grey = seen[:kept].mean(0), images[:kept].mean(0)
        x, y = seen[:kept] - mean, images[:kept] - grey
        # K = X X', pairs x pairs
        gram = x @ x.T
        beside = (seen[kept:] - mean) @ x.T
        # ridges are shares of the mean diagonal, so that they do not depend on the gradient's units
        unit = float(gram.diagonal().mean())
        best, chosen = float("inf"), torch.zeros_like(y)
        for strength in RIDGES:
            ridged = gram.clone()
            ridged.diagonal().add_(max(strength * unit, 1e-30))
            factor, failed = torch.linalg.cholesky_ex(ridged)
            # a ridge too weak for this Gram matrix's rounding
            if failed:
                continue
            dual = torch.cholesky_solve(y, factor)
            error = float((grey + beside @ dual).clamp(0, 1).sub(images[kept:]).square().mean())
            if error < best:
                best, chosen = error, dual
        # slope = X' (K + ridge)^-1 Y
        inverter.slope.copy_(x.T @ chosen)
        # offset = mean(Y) - mean(X) slope
        inverter.offset.copy_(grey - mean @ inverter.slope)
        inverter.error.fill_(best)

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, RidgeMap)
        return as_reconstruction(inverter(leak.observed), recovered(leak), inverter.error, leak)


class RidgeMap(nn.Module):
    """``slope . gradient + offset`` for all pixels of the batch."""

    slope: Tensor
    offset: Tensor
    error: Tensor

    def __init__(self, about: Provenance, flat: FlatGradient) -> None:
        super().__init__()
        self.flat = flat
        pixels = about.protocol.batch * math.prod(about.protocol.shape)
        self.register_buffer("slope", torch.zeros(flat.length, pixels))
        self.register_buffer("offset", torch.zeros(pixels))
        self.register_buffer("error", torch.tensor(0.0))

    def forward(self, gradient: Tensors) -> Tensor:
        seen: Tensor = self.flat(gradient)
        return seen @ self.slope + self.offset
