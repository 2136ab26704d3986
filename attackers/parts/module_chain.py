"""The chain of perceptrons of Coarse-GIT as its paper states it: one a layer or block, from output to input.

Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026. Stated there: a shallow perceptron for each module, whose
inputs are the module's own gradients and the estimate of its output, whose output is the estimate of its input; a
bootstrap perceptron, which makes the first estimate; training by the mean squared error of the images. Inferred by us:
each perceptron has one hidden layer of ReLU units; the bootstrap reads the last module's gradients and estimates the
logits; the chain is trained end to end, and ends in a sigmoid; a module's longer gradients are hashed, and each entry
is standardised over the auxiliary pairs; an estimate of a batch holds those of its images side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedtap.attackers.parts.generator import Stage
from fedtap.attackers.parts.teaching import FeatureRows, FlatGradient
from fedtap.simulator.leaks import Tensors

MODULE_FEATURES = 8192
"""Numbers to which a module's longer gradients are hashed."""


class ModuleChain(nn.Module):
    """From a batch's gradient to its images, `victims batch pixels`, in [0, 1].

    Args:
        stages: the network's, from input to output.
        network: the architecture, on the meta device.
        batch: images behind a gradient.
        units: hidden units of each perceptron.
    """

    mean: Tensor
    deviation: Tensor
    error: Tensor

    def __init__(self, stages: Sequence[Stage], network: nn.Module, batch: int, units: int) -> None:
        super().__init__()
        parts = list(reversed(stages))
        flats = [FlatGradient(network, MODULE_FEATURES, stage.parameters) for stage in parts]
        self.flat, self.lengths = nn.ModuleList(flats), [flat.length for flat in flats]
        self.register_buffer("mean", torch.zeros(sum(self.lengths)))
        self.register_buffer("deviation", torch.ones(sum(self.lengths)))
        self.register_buffer("error", torch.tensor(0.0))

        def perceptron(inputs: int, shape: tuple[int, ...]) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, batch * math.prod(shape)))

        self.bootstrap = perceptron(self.lengths[0], parts[0].output)
        # a module's input is the output of the one below, unless a pooling layer lies between: then that is estimated
        below = [*(stage.output for stage in parts[1:]), parts[-1].input]
        self.modules_back = nn.ModuleList(
            perceptron(length + batch * math.prod(stage.output), estimated)
            for length, stage, estimated in zip(self.lengths, parts, below, strict=True)
        )
        self.batch = batch

    def read(self, gradient: Tensors) -> FeatureRows:
        """Each module's gradients as a row, from the last module to the first."""
        return torch.cat([flat(gradient) for flat in self.flat], 1)

    def fit_statistics(self, seen: FeatureRows) -> None:
        """Set each entry's mean and standard deviation."""
        self.mean.copy_(seen.mean(0))
        self.deviation.copy_(seen.std(0).clamp_min(1e-12))

    def forward(self, seen: FeatureRows) -> Tensor:
        parts = torch.split((seen - self.mean) / self.deviation, self.lengths, 1)
        estimate: Tensor = self.bootstrap(parts[0])
        for part, module in zip(parts, self.modules_back, strict=True):
            estimate = module(torch.cat([part, estimate], 1))
        return torch.sigmoid(estimate).reshape(len(seen), self.batch, -1)
