"""Drift GIT: the image together with the drifted weights at which a victim computed its gradient.

A victim that has trained by itself shares a gradient at weights that nobody else knows, the drift of Chen and Liu 2025
(GIT), https://arxiv.org/abs/2505.20026; the joint estimate is ours. With g(x, w) the gradient that image x causes at
weights w and G the leaked one,

    |(g(x, w) - G) / s|^2 + |z_x|^2 + |z_w|^2 + |z_f|^2,  x = m + L z_x,  w = broadcast + mean + F z_f + a u z_w

is lowered by Gauss-Newton steps with a line search, as s falls from 0.3 to 0.003 of the gradient's root mean square. m
and L L' are the mean and the covariance of public images, F the spread of auxiliary trainings on them, if there are
any, and u the root mean square of each broadcast tensor. The drift's scale a is estimated from the leak as the one of
the largest evidence, by the fixed point of MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.415.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtap.attackers.gradients.gauss_newton import VICTIMS_AT_ONCE
from fedtap.attackers.gradients.matching import MATCHED, check_matching
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.newton import Unknown, conjugate_gradients, linear, standard_errors, stepped
from fedtap.attackers.parts.priors import PerElement, PublicImages
from fedtap.simulator.attack import Images, Labels, Learner, Reconstruction, generator
from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Tensors
from fedtap.simulator.progress import progress
from fedtap.simulator.wire.replay import client_reply, mean_gradient, mean_loss, stateless, targets, trained

RESIDUAL_LEVELS = (0.3, 0.1, 0.03, 0.01, 0.003)
"""s at each level, as a share of the gradient's root mean square."""

FIRST_SCALE, LEAST_SCALE = 0.1, 1e-3
"""The drift's scale a at the first level, and its least value later, as a share of each tensor's root mean square. The
first is larger than most drifts: from too small a scale the steps find no way to the true weights."""

TRAINING_BATCH, SNAPSHOTS = 32, 8
"""Images in a step of an auxiliary training, and how often its weights are kept on the way."""


@dataclass(frozen=True)
class DriftGIT(Learner):
    """Maximum a posteriori of images and drifted weights, with a prior of public images; broadcast weights known."""

    leaks = MATCHED
    needs_weights = True

    steps: int = 15
    """Gauss-Newton steps in all, as many at each of the five levels of s."""
    inner: int = 60
    """Iterations of conjugate gradients in each step, at most."""
    trainings: int = 0
    """Auxiliary trainings from the broadcast weights on public images, for the drift's mean and spread; 0 for none."""
    epochs: int = 20
    """Epochs of an auxiliary training."""
    learning_rate: float = 0.01
    """Learning rate of an auxiliary training."""

    def __post_init__(self) -> None:
        check_fields(self, steps=len(RESIDUAL_LEVELS), inner=1, epochs=1, learning_rate=1e-9)

    def accepts(self, leak: Leak) -> None:
        """Networks that torch.func can differentiate twice and whose last layer shows the labels."""
        super().accepts(leak)
        check_matching(self, leak)

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        pixels = math.prod(about.protocol.shape)
        weights = sum(dict(network.named_parameters())[name].numel() for name in trained(network))
        return PublicPrior(pixels, weights, self.trainings * SNAPSHOTS)

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        """Mean and covariance of the public images, and of the weights along trainings on them."""
        assert isinstance(inverter, PublicPrior)
        images, labels = [], []
        for pairs in auxiliary:
            leak = pairs.leak
            images.append(pairs.images.flatten(0, 1))
            labels.append(pairs.labels.flatten())
        inverter.see(torch.cat(images))
        if not self.trainings:
            return
        if auxiliary.about.labels != "own":
            raise FedtapError(
                f"{self.name} trains on the auxiliary images as a victim does on its own, and these have "
                f"{auxiliary.about.labels} labels: use --auxiliary-labels own, or trainings=0."
            )
        if leak.weights is None:
            raise FedtapError(
                f"{self.name} trains from the broadcast weights, and the {leak.protocol.threat_model} does not know "
                "them: use --threat-model curious_server, or trainings=0."
            )
        seen = torch.cat(images), torch.cat(labels)
        draws = [generator(seed, "drift", number) for number in range(self.trainings)]
        if seen[0].is_cuda:
            inverter.follow(self.trained_at_once(leak, *seen, draws))
        else:  # a CPU gains nothing from many weights at once, and loses on convolutions
            ways = [self.training(leak, *seen, draw) for draw in progress(draws, "trainings")]
            inverter.follow(torch.stack(ways))

    def training(
        self, leak: Leak, images: Tensor, labels: Tensor, draw: torch.Generator
    ) -> Float[Tensor, "snapshots weights"]:
        """The drift from a leak's weights along a training on as many images as there are, drawn with replacement.

        So drawn, trainings stray from each other as those on independent datasets do (Efron 1979,
        https://doi.org/10.1214/aos/1176344552).
        """
        protocol, kept = leak.protocol, list[Tensor]()
        network = copy.deepcopy(stateless(leak.network, protocol.batchnorm)).to_empty(device=images.device)
        network.load_state_dict({**(leak.weights or {}), **leak.buffers}, strict=False)
        moving = [dict(network.named_parameters())[name] for name in trained(network)]
        begun = torch.cat([weight.detach().flatten() for weight in moving])
        sgd = torch.optim.SGD(moving, self.learning_rate)
        batches = self._batches(len(images), draw)
        for some, stop in zip(batches, _stops(len(batches)), strict=True):
            sgd.zero_grad()
            mean_loss(protocol, network(images[some]), targets(labels[some], protocol.classes)).backward()  # type: ignore[no-untyped-call]
            sgd.step()
            if stop:
                kept.append(torch.cat([weight.detach().flatten() for weight in moving]) - begun)
        kept += kept[-1:] * (SNAPSHOTS - len(kept))  # of fewer steps than snapshots
        return torch.stack(kept)

    def trained_at_once(
        self, leak: Leak, images: Tensor, labels: Tensor, draws: Sequence[torch.Generator]
    ) -> Float[Tensor, "trainings snapshots weights"]:
        """`training` of each draw, but for rounding: each is a lane of one batched gradient."""
        protocol, network, kept = leak.protocol, stateless(leak.network, leak.protocol.batchnorm), list[Tensor]()
        known = {name: tensor.to(images.device) for name, tensor in {**(leak.weights or {}), **leak.buffers}.items()}
        begun = {name: known[name] for name in trained(network)}

        def loss(moving: Tensors, some: Tensor, target: Tensor) -> Tensor:
            return mean_loss(protocol, functional_call(network, {**known, **moving}, (some,)), target)

        differentiate = vmap(grad(loss), randomness="different")
        lanes = {name: tensor.repeat(len(draws), *[1] * tensor.ndim) for name, tensor in begun.items()}
        batches = [
            torch.stack(step) for step in zip(*(self._batches(len(images), draw) for draw in draws), strict=True)
        ]
        for some, stop in zip(progress(batches, "trainings"), _stops(len(batches)), strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be batched
                slopes = differentiate(lanes, images[some], targets(labels[some], protocol.classes))
            lanes = {name: torch.sub(lanes[name], slopes[name], alpha=self.learning_rate) for name in lanes}
            if stop:
                kept.append(torch.cat([(lanes[name] - begun[name]).flatten(1) for name in lanes], 1))
        kept += kept[-1:] * (SNAPSHOTS - len(kept))
        return torch.stack(kept, 1)

    def _batches(self, count: int, draw: torch.Generator) -> list[Tensor]:
        """Numbers of the images of each step of a training on as many as there are."""
        drawn = torch.randint(count, (count,), generator=draw)
        epochs = [drawn[torch.randperm(count, generator=draw)] for _ in range(self.epochs)]
        return [some for epoch in epochs for some in torch.split(epoch, TRAINING_BATCH)]

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, PublicPrior)
        labels, found = recovered(leak), []
        for some in torch.arange(len(leak)).split(VICTIMS_AT_ONCE):  # type: ignore[no-untyped-call]
            joint = Joint.of(leak[some], labels[some], inverter)
            found.append(joint.fitted(self.steps, self.inner))
        images, rows, objective = (torch.cat(parts).to(start.dtype) for parts in zip(*found, strict=True))
        return Reconstruction(images.reshape(start.shape), labels, objective, weights=unpacked(rows, leak))


def _stops(steps: int) -> list[bool]:
    """Whether the weights are kept after each step."""
    stops = {round(steps * (stop + 1) / SNAPSHOTS) for stop in range(SNAPSHOTS)}
    return [step in stops for step in range(1, steps + 1)]


class PublicPrior(PublicImages):
    """Gaussians: of public images, and of the drift of weights along trainings on them."""

    drift: Float[Tensor, "weights"]
    """Mean of the drift, over trainings and the way."""
    spread: Float[Tensor, "snapshots weights"]
    """F', whose rows are the snapshots' distances from that mean, over the root of their number."""

    def __init__(self, pixels: int, weights: int, snapshots: int) -> None:
        super().__init__(pixels)
        self.register_buffer("drift", torch.zeros(weights))
        self.register_buffer("spread", torch.zeros(snapshots, weights))

    def follow(self, ways: Float[Tensor, "trainings snapshots weights"]) -> None:
        """Take mean and spread of the drift along these trainings."""
        rows = ways.flatten(0, 1)
        self.drift.copy_(rows.mean(0))
        self.spread.copy_((rows - self.drift) / math.sqrt(len(rows)))


@dataclass(frozen=True)
class Joint:
    """The estimate of images and weights of some victims; an element's unknowns are a row z, ``[z_x, z_f, z_w]``."""

    prior: PublicPrior
    """Of images, and of drift."""
    leaked: Float[Tensor, "elements entries"]
    """G."""
    errors: Float[Tensor, "elements entries"]
    """Standard errors of the leaked entries."""
    respond: Callable[[Tensor, Tensor], Float[Tensor, "elements entries"]]
    """(images `elements pixels`, weights `elements weights`) -> g(x, w)."""
    broadcast: Float[Tensor, "#elements weights"]
    """The weights that the victims were sent."""
    unit: Float[Tensor, "#elements weights"]
    """u: root mean square of the broadcast weights in the tensor of each."""
    batch: int
    """Images of an element."""

    @staticmethod
    def of(leak: Leak, labels: Labels, prior: PublicPrior) -> Joint:
        """The problem that these victims' leaks pose."""
        gradient, weights, errors = mean_gradient(leak), leak.weights or {}, standard_errors(leak)
        names, target = list(gradient), targets(labels, leak.protocol.classes).to(leak.device)
        shape, reply = (leak.protocol.batch, *leak.protocol.shape), client_reply(leak)
        shapes = {name: weights[name].shape[1:] if leak.stacked else weights[name].shape for name in names}
        sizes = [shapes[name].numel() for name in names]
        fixed = {name: weight for name, weight in weights.items() if name not in gradient}

        def element(frozen: Tensors, buffers: Tensors, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
            moved = {name: part.reshape(shapes[name]) for name, part in zip(names, torch.split(w, sizes), strict=True)}
            found = reply({**frozen, **moved}, buffers, x.reshape(shape), target)
            return torch.cat([found[name].flatten() for name in names])

        shared = 0 if leak.stacked else None
        every = vmap(element, in_dims=(shared, shared, 0, 0, 0))
        rows = [weights[name].reshape(-1, size) for name, size in zip(names, sizes, strict=True)]
        broadcast = torch.cat(rows, dim=1)
        # a tensor that begins at zero drifts as the others do
        whole = broadcast.square().mean(1, keepdim=True).sqrt()
        sizes_of = [row.square().mean(1, keepdim=True).sqrt().expand_as(row) for row in rows]
        unit = torch.cat([torch.where(size > 0, size, whole) for size in sizes_of], dim=1)
        return Joint(
            prior,
            torch.cat([gradient[name].flatten(1) for name in names], dim=1),
            torch.cat([errors[name][:, None].expand(-1, size) for name, size in zip(names, sizes, strict=True)], dim=1),
            lambda x, w: every(fixed, leak.buffers, x, w, target),
            broadcast,
            unit,
            leak.protocol.batch,
        )

    def images(self, z: Unknown) -> Float[Tensor, "elements pixels"]:
        """``m + L z_x`` of each image of the batch."""
        pixels = len(self.prior.mean)
        return self.prior.images(z[:, : self.batch * pixels])

    def weights(self, z: Unknown, scale: PerElement) -> Float[Tensor, "elements weights"]:
        """``broadcast + mean + F z_f + a u z_w``."""
        snapshots, weights = self.prior.spread.shape
        along, freely = z[:, -weights - snapshots : -weights], z[:, -weights:]
        return self.broadcast + self.prior.drift + along @ self.prior.spread + scale[:, None] * self.unit * freely

    def residual(self, scale: PerElement, level: float) -> Callable[[Unknown], Float[Tensor, "elements entries"]]:
        """``(g(x, w) - G) / s`` as a function of z."""
        size = self.leaked.square().mean(1, keepdim=True)
        # s^2 = (level |G|)^2 / n + the variance of what was sent
        s = (level**2 * size + self.errors.square()).sqrt().to(self.leaked.dtype)
        return lambda z: (self.respond(self.images(z), self.weights(z, scale)) - self.leaked) / s

    def fitted(
        self, steps: int, inner: int
    ) -> tuple[Float[Tensor, "elements pixels"], Float[Tensor, "elements weights"], PerElement]:
        """The images and weights at which the objective is lowest, and the objective there."""
        snapshots, weights = self.prior.spread.shape
        elements, unknowns = len(self.leaked), self.batch * len(self.prior.mean) + snapshots + weights
        z = self.leaked.new_zeros(elements, unknowns)
        scale = self.leaked.new_full((elements,), FIRST_SCALE)
        for level in RESIDUAL_LEVELS:
            residual = self.residual(scale, level)
            for _ in progress(steps // len(RESIDUAL_LEVELS), f"steps at s = {level}"):
                z, objective = stepped(residual, z, inner)
            if level == RESIDUAL_LEVELS[-1]:
                break
            z, scale = self.rescaled(z, scale, residual, inner)
        return self.images(z), self.weights(z, scale), objective

    def rescaled(
        self, z: Unknown, scale: PerElement, residual: Callable[[Unknown], Tensor], inner: int
    ) -> tuple[Unknown, PerElement]:
        """The drift's scale of the largest evidence about z, and z in its units, so that the weights are the same.

        MacKay's fixed point: ``a^2 = |w - broadcast - mean - F z_f|^2 / gamma`` in units of u, where gamma is the
        number of those directions of w that the leak determines.
        """
        weights = self.prior.spread.shape[1]
        kept, freely = z[:, :-weights], z[:, -weights:]
        gamma = determined(residual, z, inner)[:, -weights:].sum(1).clamp_min(1.0)
        better = (scale * freely.norm(dim=1) / gamma.sqrt()).clamp_min(LEAST_SCALE)
        return torch.cat([kept, freely * (scale / better)[:, None]], dim=1), better


def unpacked(rows: Float[Tensor, "victims weights"], leak: Leak) -> dict[str, Tensor]:
    """The weights in these rows by name, beside those that victims do not train."""
    known, names = leak.weights or {}, list(mean_gradient(leak))
    each = {name: tensor if leak.stacked else tensor.expand(len(leak), *tensor.shape) for name, tensor in known.items()}
    parts = torch.split(rows, [each[name][0].numel() for name in names], dim=1)
    return {**each, **{name: part.reshape(each[name].shape) for name, part in zip(names, parts, strict=True)}}


def determined(residual: Callable[[Unknown], Tensor], z: Unknown, inner: int) -> Unknown:
    """How far the leak and not the prior determines each unknown, 0 to 1: an estimate whose sums are unbiased.

    It is the diagonal of ``1 - H^-1`` with ``H = J'J + 1``, by a random vector v of signs: ``1 - v (H^-1 v)``
    (Hutchinson 1990, https://doi.org/10.1080/03610919008812866).
    """
    signs = torch.randint(2, z.shape[1:], generator=generator("signs", z.shape[1])).to(z) * 2 - 1
    v = signs.expand_as(z)
    return 1 - v * conjugate_gradients(linear(residual, z)[2], v, inner)
