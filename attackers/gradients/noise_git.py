"""Noise GIT: the most probable image under a noisy gradient, and a denoiser that leads on to the mean of the probable.

For the noise of Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026, whose standard deviation sigma is known; the
estimator is ours. With g(x) the gradient that image x causes at the known weights and G the leaked one,

    |(g(x) - G) / sigma|^2 + |z|^2,  x = m + L z

is lowered by Gauss-Newton steps with a line search, where m and L L' are the mean and the covariance of public images:
a prior that owes nothing to the leak, so that the gradient counts once. What minimises the squared error is not that
most probable image but the posterior mean; a small convolutional network approaches it, taught on the most probable
images of auxiliary pairs, whose gradients carry noise of their own of the same sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtap.attackers.gradients.denoiser import ImageDenoiser
from fedtap.attackers.gradients.matching import check_matching
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.labels import logit_gradients, mean_embedding, recovered
from fedtap.attackers.parts.newton import FlatImages, Unknown, residual, stepped
from fedtap.attackers.parts.priors import PerElement, PublicImages
from fedtap.attackers.parts.teaching import HELD_OUT_EVERY, as_reconstruction, teach
from fedtap.simulator.attack import Images, Labels, Learner, Reconstruction, reply_parts
from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.defences.defence import EVERYTHING
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.registry import logits_layer
from fedtap.simulator.progress import progress

UNSEEN_FOLDS = 4
"""Parts of the public images, each of which the prior of its own leaks has not seen."""

FORCING = 0.3
"""Share of its first norm to which conjugate gradients bring the residual of a step: an inexact Newton method
(Dembo, Eisenstat and Steihaug 1982, https://doi.org/10.1137/0719025) spends no more on a step than it is worth."""

FALL = 0.003
"""Steps end where they lower the objective by less than this share of it."""

SOLVED_TOGETHER = 64
"""Images solved together; more take no less time each (measured on a CPU)."""


@dataclass(frozen=True)
class NoiseGIT(Learner):
    """Posterior mean of one image under announced noise, by way of its most probable value; weights known."""

    needs_weights = True

    steps: int = 8
    """Gauss-Newton steps to the most probable image, at most; fewer are enough under much noise."""
    inner: int = 60
    """Iterations of conjugate gradients in each step, at most."""
    solved: int = 4000
    """Auxiliary pairs, at most, whose most probable images the denoiser is taught on; the prior is of all images."""
    width: int = 32
    """Channels of the denoiser at half the image's resolution."""
    epochs: int = 20
    """Passes of the denoiser over all pairs; 0 leaves the most probable image as it is."""
    batch: int = 50
    """Pairs in each step of Adam."""
    rate: float = 2e-3
    """Highest learning rate of Adam, in one cycle."""

    def __post_init__(self) -> None:
        check_fields(self, steps=1, inner=1, solved=self.least, width=1, batch=2, rate=1e-9)

    @property
    def least(self) -> int:
        """Two pairs to hold out."""
        return 2 * HELD_OUT_EVERY

    def accepts(self, leak: Leak) -> None:
        """One image a victim, under announced noise and no other change of the gradient, at known weights."""
        super().accepts(leak)
        if leak.protocol.batch != 1:
            raise FedtapError(
                f"{self.name} reads the gradient of one image, and this one is the mean over {leak.protocol.batch}: "
                "use --batch 1, or coarse_git, which learns batches too."
            )
        check_matching(self, leak)
        if not sigma(leak.protocol):
            raise FedtapError(
                f"{self.name} weighs the gradient by the noise that is announced, and defence {leak.protocol.defence} "
                "announces none: use exact_git or fused_git, which need none."
            )
        parts = reply_parts(leak.protocol.defence)
        if strange := [str(part) for part in parts if isinstance(part, str) or part.survives != EVERYTHING]:
            raise FedtapError(
                f"{self.name} takes the leak for a gradient and noise, and {strange[0]} changes the gradient itself: "
                "use coarse_git, which learns from pairs under the same defence."
            )

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        shape = about.protocol.shape
        name = logits_layer(network, shape)
        layer = network.get_submodule(name) if name is not None else None
        return PosteriorMean(shape, layer.in_features if isinstance(layer, nn.Linear) else 0, self.width)

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        """Mean and covariance of the public images, then the denoiser on the most probable images of their leaks.

        The prior of each is that of the other images: one that has seen the image itself finds it better than any
        victim's, and would teach the denoiser another error than it meets.
        """
        assert isinstance(inverter, PosteriorMean)
        images = torch.cat([pairs.images[:, 0] for pairs in auxiliary])
        inverter.prior.see(images)
        leak = next(iter(auxiliary)).leak
        self.accepts(leak)
        inverter.embedding.copy_(mean_embedding(leak, images))
        taught = images[: self.solved]
        fold = torch.arange(len(images), device=images.device) % UNSEEN_FOLDS
        priors = [PublicImages(images[0].numel()).to(images.device) for _ in range(UNSEEN_FOLDS)]
        for number, prior in enumerate(priors):
            prior.see(images[fold != number])
        rows = images.new_empty(len(taught), images[0].numel() + 1)
        first = 0
        for pairs in progress(auxiliary.first(self.solved), "most probable images"):
            here = torch.arange(first, first + len(pairs), device=images.device)
            for number, prior in enumerate(priors):
                mine = fold[here] == number
                if mine.any():
                    rows[here[mine]] = self.read(inverter, pairs.leak[mine], prior)[0]
            first += len(pairs)
        adam = torch.optim.Adam(inverter.denoiser.parameters(), self.rate)
        steps = max(1, self.epochs * math.ceil(len(rows) / self.batch))
        cycle = torch.optim.lr_scheduler.OneCycleLR(adam, self.rate, total_steps=steps)
        truth = taught.flatten(1)[:, None]
        how = {"epochs": self.epochs, "batch": self.batch, "seed": seed}
        inverter.error.copy_(teach(inverter.denoiser, rows, truth, adam, cycle, **how))

    def read(
        self, inverter: PosteriorMean, leak: Leak, prior: PublicImages
    ) -> tuple[Float[Tensor, "victims numbers"], Labels]:
        """What the denoiser is given of each victim, and the labels.

        That is the most probable image, and the length of the logits' gradient: all of the gradient is proportional to
        it, so that the noise hides the more the shorter it is.
        """
        labels = recovered(leak, inverter.embedding)
        images, _ = most_probable(leak, labels, prior, self.steps, self.inner)
        return torch.cat([images, logit_gradients(leak, inverter.embedding).norm(dim=1, keepdim=True)], dim=1), labels

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, PosteriorMean)
        rows, labels = self.read(inverter, leak, inverter.prior)
        images = torch.cat([inverter.denoiser(some) for some in torch.split(rows, SOLVED_TOGETHER)])
        return as_reconstruction(images, labels, inverter.error, leak)


class PosteriorMean(nn.Module):
    """A Gaussian of public images, what reads labels from noisy gradients, and the denoiser.

    Args:
        shape: of an image.
        features: inputs of the layer that yields the logits.
        width: of the denoiser.
    """

    embedding: Float[Tensor, "features"]
    """Mean input of the layer that yields the logits, over public images."""
    error: Tensor
    """Mean squared error on the pairs that were held out."""

    def __init__(self, shape: tuple[int, ...], features: int, width: int) -> None:
        super().__init__()
        self.prior = PublicImages(math.prod(shape))
        self.denoiser = ImageDenoiser(shape, 1, width)
        self.register_buffer("embedding", torch.zeros(features))
        self.register_buffer("error", torch.tensor(0.0))


def most_probable(
    leak: Leak, labels: Labels, prior: PublicImages, steps: int, inner: int
) -> tuple[FlatImages, PerElement]:
    """The image of highest posterior density behind each gradient, not clamped to [0, 1], and the objective there."""
    found = []
    for some in torch.arange(len(leak)).split(SOLVED_TOGETHER):  # type: ignore[no-untyped-call]
        residuals = residual(leak[some], labels[some], prior.mean.dtype)
        found.append(_solved(lambda z, r=residuals: r(prior.images(z)), len(some), prior, steps, inner))  # type: ignore[misc]
    images, objectives = (torch.cat(parts) for parts in zip(*found, strict=True))
    return images, objectives


def _solved(
    residuals: Callable[[Unknown], Tensor], elements: int, prior: PublicImages, steps: int, inner: int
) -> tuple[FlatImages, PerElement]:
    """Gauss-Newton steps from the prior's mean until each element's objective has stopped falling."""
    z = prior.mean.new_zeros(elements, len(prior.mean))
    objective, going = z.new_full((elements,), torch.inf), torch.ones(elements, dtype=torch.bool, device=z.device)
    for _ in range(steps):
        there, lower = stepped(residuals, z, inner, FORCING)
        fell = objective - lower > FALL * lower
        z, objective = torch.where(going[:, None], there, z), torch.where(going, lower, objective)
        going &= fell
        if not going.any():
            break
    return prior.images(z), objective
