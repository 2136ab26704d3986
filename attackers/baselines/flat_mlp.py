"""Flat MLP: what Coarse GIT would be without the victim's structure; an ablation and baseline without a paper.

One hidden layer over all that Coarse GIT is given (rows in closed form, every other layer's gradient, the ridge
regression's start), with as many parameters as its stages have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtap.attackers.gradients.coarse_git import FEWEST_TRAININGS, CoarseGIT, TrainedGenerator
from fedtap.attackers.parts.generator import Generator, Gradients, LabelResiduals, Map, Stage, stages
from fedtap.simulator.auxiliary import Provenance


@dataclass(frozen=True)
class FlatMLP(CoarseGIT):
    """Fields and recipe are Coarse GIT's, so that two of equal fields differ in structure alone."""

    rate: float = 1e-3
    """Highest learning rate of Adam, in one cycle."""

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        shape, batch = about.protocol.shape, about.protocol.batch
        sizes, drifted = (self.width, self.hidden, self.hints), about.auxiliary_trainings >= FEWEST_TRAININGS
        generator = FlatGenerator(stages(network, shape), shape, *sizes, drifted=drifted, batch=batch)
        return TrainedGenerator(generator, about.protocol.classes)


class FlatGenerator(Generator):
    """A generator whose stages gave their parameters to one hidden layer."""

    def __init__(
        self,
        found: tuple[Stage, ...],
        shape: Map,
        width: int,
        hidden: int,
        hints: int,
        drifted: bool = False,
        batch: int = 1,
    ) -> None:
        super().__init__(found, shape, width, hidden, hints, drifted, batch)
        budget = sum(parameter.numel() for parameter in self.parameters())
        rooms = [room for room in self.modules() if isinstance(room, LabelResiduals)]
        first = self.bootstrap[0]
        assert isinstance(first, nn.Linear)
        inputs = first.in_features + sum(room.entries for room in rooms)
        # (inputs + pixels) units weights fit the stages' number of parameters
        units = max(1, budget // (inputs + math.prod(shape)))
        self.bootstrap = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, math.prod(shape)))
        for parameter in self.bootstrap[-1].parameters():
            nn.init.zeros_(parameter)
        self.stages = nn.ModuleList(rooms)
        if rooms:
            del self.last

    def images(
        self, gradients: Gradients, starts: Tensor | None = None, truth: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        known, length, direction = self._closed_form(gradients)
        features, clues = self._standardised(known, length, direction)
        start, shares = self.start(gradients, features, clues, starts)
        news = [each for room in self.stages for each in room(gradients, clues, length)]
        image = start + self.bootstrap(torch.cat([features, clues, *news], 1))
        image, start = (rows.reshape(-1, *self.shape) for rows in (image, start))
        return self.trusted(image, start, shares), image.new_zeros(())
