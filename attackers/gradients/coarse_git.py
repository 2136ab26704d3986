"""Coarse GIT: a generator built from the victim's own structure, one module a layer or block, from output to input.

Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026. We found no public code (November 2026), and the paper states
neither widths nor optimiser nor epochs. Departs from the paper as `fedtap.attackers.parts.generator` says: inputs of
linear layers are read in closed form, the image starts from a ridge regression on them, and a stage is a few
convolutions that read the gradient through an estimate of the layer's error signal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.generator import Generator, fit, stages
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.teaching import as_reconstruction, check_room
from fedtap.simulator.attack import Attack, Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Provenance, trainings
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.progress import progress

FEWEST_TRAININGS = 3
"""Trainings of the compromised client, at least, for a whole one to be held out while others are learned from."""


@dataclass(frozen=True)
class CoarseGIT(Learner):
    """A generator from one image's gradient to the image, trained on auxiliary pairs; weights not known."""

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

    def __post_init__(self) -> None:
        check_fields(self, width=1, hidden=1, hints=1, batch=2)

    @property
    def least(self) -> int:
        """Eight pairs for each of the ridge regression's five folds."""
        return 40

    def accepts(self, leak: Leak) -> None:
        """One image a victim, and a network whose stages can be read."""
        super().accepts(leak)
        one_image(self, leak.protocol.batch)
        last_linear(leak)
        stages(leak.network, leak.protocol.shape)

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        one_image(self, about.protocol.batch)
        shape = about.protocol.shape
        sizes = (self.width, self.hidden, self.hints)
        return TrainedGenerator(
            Generator(stages(network, shape), shape, *sizes, drifted=about.auxiliary_trainings >= FEWEST_TRAININGS),
            about.protocol.classes,
        )

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        assert isinstance(inverter, TrainedGenerator)
        read, images, labels = compact(inverter.generator, auxiliary)
        inverter.met.zero_()[labels] = True
        how = {"epochs": self.epochs, "batch": self.batch, "seed": seed}
        recorded = None
        if auxiliary.about.auxiliary_trainings >= FEWEST_TRAININGS:
            parts = trainings(len(auxiliary), auxiliary.about.auxiliary_trainings)
            # number of the training in which each pair was recorded
            recorded = torch.repeat_interleave(torch.tensor([len(part) for part in parts])).to(images.device)
        inverter.error.copy_(fit(inverter.generator, read, images, recorded, rate=self.rate, **how))

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, TrainedGenerator)
        parts = torch.arange(len(leak)).split(self.batch)  # type: ignore[no-untyped-call]
        images, labels = torch.cat([inverter.generator(leak[some].observed) for some in parts]), recovered(leak)
        # the stages read each gradient by its label, and say anything of a label that they never met
        for some in (~inverter.met[labels[:, 0]]).nonzero().flatten().split(self.batch):  # type: ignore[no-untyped-call]
            images[some] = inverter.generator.regressed(leak[some].observed)
        return as_reconstruction(images, labels, inverter.error, leak)


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


def compact(generator: Generator, auxiliary: Auxiliary) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All pairs as the generator reads them, the images behind them, `pairs channel height width`, and labels."""
    read, images, labels = [], [], []
    for pairs in progress(auxiliary, "reading pairs"):
        read.append(generator.read(pairs.leak.observed))
        images.append(pairs.images[:, 0])
        labels.append(pairs.labels[:, 0])
        if len(read) == 1:
            check_room(len(auxiliary), sum(t[0].numel() for t in read[0].values()) + images[0][0].numel())
    return {name: torch.cat([part[name] for part in read]) for name in read[0]}, torch.cat(images), torch.cat(labels)
