"""Coarse GIT: a generator built from the victim's own structure, one module a layer or block, from output to input.

Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026. We found no public code (November 2026), and widths,
optimiser and epochs are nowhere stated. Departs from the paper as `fedtap.attackers.parts.generator` says: what a
linear layer gives away is read in closed form, the image starts from a ridge regression on it, a stage reads its
gradient through an estimate of the layer's error signal, and is a few convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.generator import Generator, fit, stages
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.teaching import check_room, guessed
from fedtap.simulator.attack import Attack, Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import About, Auxiliary, trainings
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.progress import progress

FEWEST = 3
"""Trainings of the compromised client from which it can be told how far one carries over to another."""


@dataclass(frozen=True)
class CoarseGIT(Learner):
    """From one image's gradient to the image, layer by layer, as pairs have taught it; weights not known.

    Args:
        width: channels of the running estimate.
        hidden: units of the perceptron beside the ridge regression.
        hints: units through which a stage reads all of its gradients directly.
        epochs: over all pairs; 0 leaves the closed form and the ridge regression.
        batch: pairs a step.
        rate: Adam's highest, in one cycle.
    """

    width: int = 32
    hidden: int = 64
    hints: int = 32
    epochs: int = 8
    batch: int = 100
    rate: float = 4e-3

    def __post_init__(self) -> None:
        check_fields(self, width=1, hidden=1, hints=1, batch=2)

    @property
    def least(self) -> int:
        """Where a ridge regression's folds begin to say anything."""
        return 40

    def accepts(self, leak: Leak) -> None:
        """One image a victim, and a network whose layers can be read."""
        super().accepts(leak)
        one_image(self, leak.protocol.batch)
        last_linear(leak)
        stages(leak.network, leak.protocol.shape)

    def inverter(self, about: About, network: nn.Module) -> nn.Module:
        one_image(self, about.protocol.batch)
        shape = about.protocol.shape
        sizes = (self.width, self.hidden, self.hints)
        return Estimate(Generator(stages(network, shape), shape, *sizes, drifted=about.auxiliary_trainings >= FEWEST))

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        assert isinstance(inverter, Estimate)
        read, images = compact(inverter.generator, auxiliary)
        how = {"epochs": self.epochs, "batch": self.batch, "seed": seed}
        met = None
        if auxiliary.about.auxiliary_trainings >= FEWEST:
            parts = trainings(len(auxiliary), auxiliary.about.auxiliary_trainings)
            met = torch.repeat_interleave(torch.tensor([len(part) for part in parts])).to(images.device)
        inverter.error.copy_(fit(inverter.generator, read, images, met, rate=self.rate, **how))

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, Estimate)
        parts = torch.arange(len(leak)).split(self.batch)  # type: ignore[no-untyped-call]
        images = torch.cat([inverter.generator(leak[some].observed) for some in parts])
        return guessed(images, recovered(leak), inverter.error, leak)


class Estimate(nn.Module):
    """A generator, and its mean squared error on the pairs that were held out."""

    error: Tensor

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.register_buffer("error", torch.tensor(0.0))


def one_image(attack: Attack, batch: int) -> None:
    """Refuse batches.

    Raises:
        FedtapError: naming the attack and what to use instead.
    """
    if batch != 1:
        raise FedtapError(
            f"{attack.name} reads the gradient of one image, and this one is the mean over {batch}: use --batch 1, or "
            "lti, which learns batches too."
        )


def compact(generator: Generator, auxiliary: Auxiliary) -> tuple[dict[str, Tensor], Tensor]:
    """All pairs as the generator reads them, and the images behind them, `pairs channel height width`."""
    read, images = [], []
    for pairs in progress(auxiliary, "reading pairs"):
        read.append(generator.read(pairs.leak.observed))
        images.append(pairs.images[:, 0])
        if len(read) == 1:
            check_room(len(auxiliary), sum(t[0].numel() for t in read[0].values()) + images[0][0].numel())
    return {name: torch.cat([part[name] for part in read]) for name in read[0]}, torch.cat(images)
