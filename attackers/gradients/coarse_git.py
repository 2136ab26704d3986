"""Coarse GIT: a generator built from the victim's own structure, one module a layer or block, from output to input.

Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026. We found no public code (November 2026), and the paper states
neither widths nor optimiser nor epochs. Departs from the paper as `fedtap.attackers.parts.generator` says: inputs of
linear layers are read in closed form, the image starts from a ridge regression on them, and a stage is a few
convolutions that read the gradient through an estimate of the layer's error signal. With `published` it has none of
these: `fedtap.attackers.parts.module_chain` says what is then inferred.

Of a batch, each image is read by itself, from the last layer's input that its label tells of it
(`fedtap.attackers.parts.batch_rows`), and training compares images by assignment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from fedtap.attackers.parts.batch_rows import fit_labels, read_each_image, read_labels
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.generator import Generator, fit, stages
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.module_chain import ModuleChain
from fedtap.attackers.parts.teaching import as_reconstruction, check_room, rows, teach
from fedtap.simulator.attack import Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Provenance, trainings
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak
from fedtap.simulator.progress import progress

FEWEST_TRAININGS = 3
"""Trainings of the compromised client, at least, for a whole one to be held out while others are learned from."""


@dataclass(frozen=True)
class CoarseGIT(Learner):
    """A generator from a gradient to its images, trained on auxiliary pairs; weights not known."""

    width: int = 32
    """Channels of the running estimate."""
    hidden: int = 64
    """Hidden units of the perceptron beside the ridge regression."""
    hints: int = 32
    """Units through which a stage reads all of its gradients directly."""
    epochs: int = 8
    """Passes over all pairs; 0 leaves the closed form and the ridge regression."""
    batch: int = 100
    """Pairs in each step of Adam."""
    rate: float = 4e-3
    """Highest learning rate of Adam, in one cycle."""
    published: bool = False
    """As the paper states it: a chain of perceptrons, which knows no closed form and starts from no regression."""
    units: int = 1000
    """Hidden units of each perceptron of that chain."""

    def __post_init__(self) -> None:
        check_fields(self, width=1, hidden=1, hints=1, batch=2, units=1)

    @property
    def least(self) -> int:
        """Eight pairs for each of the ridge regression's five folds."""
        return 40

    def accepts(self, leak: Leak) -> None:
        """A network whose stages can be read; of a batch, one that tells classes apart."""
        super().accepts(leak)
        if leak.protocol.batch > 1 and leak.protocol.classes == 1 and not self.published:
            raise FedtapError(
                f"{self.name} tells the images of a batch apart by their classes, and this model has one output: use "
                "lti, or coarse_git(published=True)."
            )
        last_linear(leak)
        stages(leak.network, leak.protocol.shape)

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        shape, batch = about.protocol.shape, about.protocol.batch
        found = stages(network, shape)
        if self.published:
            return ModuleChain(found, network, batch, self.units)
        sizes, drifted = (self.width, self.hidden, self.hints), about.auxiliary_trainings >= FEWEST_TRAININGS
        generator = Generator(found, shape, *sizes, drifted=drifted, batch=batch)
        return TrainedGenerator(generator, about.protocol.classes)

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        how = {"epochs": self.epochs, "batch": self.batch, "seed": seed}
        if isinstance(inverter, ModuleChain):
            seen, images = rows(auxiliary, inverter.read)
            inverter.fit_statistics(seen)
            adam = torch.optim.Adam(inverter.parameters(), self.rate)
            steps = self.epochs * math.ceil(len(seen) / self.batch)
            cycle = torch.optim.lr_scheduler.OneCycleLR(adam, self.rate, total_steps=max(11, steps), pct_start=0.1)
            inverter.error.copy_(teach(inverter, seen, images, adam, cycle, **how))
            return
        assert isinstance(inverter, TrainedGenerator)
        read, images, labels = compact(inverter.generator, auxiliary)
        inverter.met.zero_()[labels] = True
        recorded = None
        if auxiliary.about.auxiliary_trainings >= FEWEST_TRAININGS:
            parts = trainings(len(auxiliary), auxiliary.about.auxiliary_trainings)
            # number of the training in which each pair was recorded
            recorded = torch.repeat_interleave(torch.tensor([len(part) for part in parts])).to(images.device)
        inverter.error.copy_(fit(inverter.generator, read, images, recorded, rate=self.rate, **how))

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(leak, GradientLeak)
        if isinstance(inverter, ModuleChain):
            return as_reconstruction(inverter(inverter.read(leak.observed)), recovered(leak), inverter.error, leak)
        assert isinstance(inverter, TrainedGenerator)
        generator = inverter.generator
        parts = torch.arange(len(leak)).split(self.batch)  # type: ignore[no-untyped-call]
        labels, images = read_labels(generator, leak), []
        for some in parts:
            read = read_each_image(generator, leak[some])
            found, met = generator.images(read)[0].clamp(0, 1), inverter.met[labels[some].flatten()]
            if not bool(met.all()):
                # what the stages make of a gradient depends on its label, and of one that they never met it is no image
                found[~met] = generator.regressed({name: tensor[~met] for name, tensor in read.items()})
            images.append(found)
        return as_reconstruction(torch.cat(images), labels, inverter.error, leak)


class TrainedGenerator(nn.Module):
    """A generator, its mean squared error on the pairs that were held out, and which labels the pairs have."""

    later = ("met",)
    """Buffers that files of fedtap 0.2.0 lack: there, the stages were trusted with every label."""

    error: Tensor
    met: Bool[Tensor, " classes"]

    def __init__(self, generator: Generator, classes: int) -> None:
        super().__init__()
        self.generator = generator
        self.register_buffer("error", torch.tensor(0.0))
        self.register_buffer("met", torch.ones(max(2, classes), dtype=torch.bool))  # one logit has two labels


def compact(generator: Generator, auxiliary: Auxiliary) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All pairs as the generator reads them, the images behind them, `pairs * batch channels height width`, and labels.

    The images of a batch are in the order of their labels, in which their entries are too.
    """
    read: list[dict[str, Tensor]] = []
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for pairs in progress(auxiliary, "reading pairs"):
        if not read and generator.batch > 1:
            fit_labels(generator, pairs.leak, pairs.labels)
        read.append(read_each_image(generator, pairs.leak))
        sorted_labels, order = pairs.labels.sort(dim=1, stable=True)
        labels.append(sorted_labels.flatten())
        images.append(pairs.images[torch.arange(len(pairs))[:, None], order].flatten(0, 1))
        if len(read) == 1:
            check_room(
                len(auxiliary) * generator.batch, sum(t[0].numel() for t in read[0].values()) + images[0][0].numel()
            )
    return {name: torch.cat([part[name] for part in read]) for name in read[0]}, torch.cat(images), torch.cat(labels)
