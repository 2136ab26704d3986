"""Adaptive gradient matching: the announced defence is applied to the reconstruction's gradient, as to the victim's.

The two are then compared on the entries that the defence keeps. Pruning shows which entries were kept, and Soteria
which features: all others are left out (for Soteria as in Balunović et al. 2022, https://arxiv.org/abs/2111.04706, who
also derive the Bayes-optimal attack on a gradient with noise). A sign is compared with a soft sign, and clipping is
repeated. Quantisation and noise leave an error of known size, by which entries are weighed; Laplace noise has heavier
tails than a Gaussian, so absolute differences take the place of squares. An image prior is added with the weight that
it has in the posterior density, which grows with the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.parts.gradients import AnyLabels, Distance, Match, relative_distance, squared_distance
from fedtap.attackers.parts.priors import smooth_variation
from fedtap.simulator.attack import Images
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.defences.defence import Defence, Density, Error, Exchange, Replay
from fedtap.simulator.defences.notation import described
from fedtap.simulator.defences.sign import Sign
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.wire.replay import exchange_of, mean_gradient

SOFTNESS, HARD = Exchange.softness, 1e-4
"""Softness of the sign ``tanh(g / (softness rms(g)))``: one that gradient descent can follow, and one close to the
sign itself, for comparing reconstructions."""

ROUGHNESS = 5.0
"""Pictures have the density ``exp(-roughness sum |x - its neighbour|)``, across plus down.
Chosen on training images."""

KINK = 0.3
"""Residuals below this share of a Laplace density's scale are smoothed, so that the loss is differentiable at 0."""

INSIDE = 0.01
"""Weight of the squared distance of pixels from [0, 1]."""


@dataclass(frozen=True)
class Adaptive:
    """`distance`, after the announced defence has been applied to the reply, as it was to the leaked one."""

    parts: tuple[Defence, ...]
    """The parts of the announced defence, in the order in which they are applied."""
    replays: tuple[Replay, ...]
    """What each of them does to a reply."""
    distance: Distance
    """Distance between the defended reply and the leaked one."""
    error: float
    """Standard deviation of the announced noise on an entry."""
    weighed: bool = True
    """Whether entries are divided by the standard deviation of their error."""

    def __call__(self, reply: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
        one, leaked_one = ({name: tensor[None] for name, tensor in side.items()} for side in (reply, leaked))
        for replay in self.replays:
            one = replay.does(one, leaked_one)
        reply = {name: tensor[0] for name, tensor in one.items()}
        if not self.weighed:
            return self.distance(reply, leaked)
        sizes = self.sizes(leaked)
        reply, leaked = ({name: side[name] / sizes[name] for name in leaked} for side in (reply, leaked))
        return self.distance(reply, leaked)

    def sizes(self, leaked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standard deviation of the random error of each tensor's entries; 1 where all tensors have the same."""
        leaked_one = {name: tensor[None] for name, tensor in leaked.items()}
        found = [error.steps(leaked_one) for error in self._errors if error.steps]
        if not found:
            return {name: tensor.new_ones(()) for name, tensor in leaked.items()}
        # rounding at random has the variance step^2 f (1 - f) with f in U(0, 1), and E f (1 - f) = 1/6
        squares = {name: torch.stack([steps[name][0].square() / 6 for steps in found]).sum(0) for name in leaked}
        return {name: (square + self.error**2).sqrt().clamp_min(1e-12) for name, square in squares.items()}

    @property
    def uneven(self) -> bool:
        """Whether the error on an entry depends on its tensor."""
        return any(error.steps for error in self._errors)

    @property
    def _errors(self) -> list[Error]:
        return [error for part in self.parts if (error := part.error(batch=1))]


@dataclass(frozen=True)
class Absolute:
    """``4 b sum |reply - leaked| / |leaked|^2``, smoothed at 0.

    That is minus the logarithm of a Laplace density of scale b times ``2 s^2 / |leaked|^2``, with the variance
    ``s^2 = 2 b^2``, as `relative_distance` is of a Gaussian one.
    """

    scale: float
    """Scale b of the Laplace density."""

    def __call__(self, reply: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
        # sqrt(d^2 + (KINK b)^2) for |d|
        apart = [(reply[name] - leaked[name]).square() + (KINK * self.scale) ** 2 for name in leaked]
        size = torch.stack([tensor.square().sum() for tensor in leaked.values()]).sum().clamp_min(1e-30)
        return 4 * self.scale * torch.stack([square.sqrt().sum() for square in apart]).sum() / size


@dataclass(frozen=True)
class Informed:
    """The matching loss and the image prior of an attack that knows the defence."""

    distance: Adaptive
    """Distance between the reconstruction's reply and the leaked one, both defended."""
    weights: Float[Tensor, "elements"]
    """Weight of the prior for each batch element, beside a distance relative to the leaked reply."""

    def prior(self, images: Images, elements: Tensor | None = None) -> Float[Tensor, "elements"]:
        """Penalty of each batch element's images: weighted total variation, and squared distance from [0, 1]."""
        weights = self.weights if elements is None else self.weights[elements]
        # squared distance from the box [0, 1]
        outside = (images - images.clamp(0, 1)).square().flatten(1).sum(1)
        return weights * smooth_variation(images) + INSIDE * outside


def informed(leak: Leak, distance: Distance, weighed: bool = True, softness: float = SOFTNESS) -> Informed | None:
    """The adaptive matching loss of a leak; None where the protocol announces no defence that fedtap can replay.

    A step of Adam counts as the defence `sign()`, since it sends the signs of the gradient.
    """
    signs = (Sign(),) if leak.protocol.optimiser == "adam" else ()
    try:
        announced = described(leak.protocol.defence)
    except FedtapError:
        announced = ()
    # one step of Adam is g / (|g| + ε), which a defence of the update comes after
    parts = signs + tuple(part for part in announced if replayable(part))
    if not parts:
        return None
    exchange = exchange_of(leak, softness)
    replays = tuple(replay for part in parts if (replay := part.replay(exchange)))
    error = sigma(leak.protocol) / exchange.steps
    densities = {noise.density for part in parts if (noise := part.error(batch=1))}
    last = parts[-1].error(batch=1)
    # pure Laplace noise on a single client's whole update, and nothing after it: its density is known
    if distance is relative_distance and leak.protocol.summed == 1 and last and densities == {Density.LAPLACE}:
        distance = Absolute(error / math.sqrt(2))
    adaptive = Adaptive(parts, replays, distance, error, weighed)
    return Informed(adaptive, _weights(adaptive, leak))


def replayable(defence: Defence) -> bool:
    """Whether an attack can do to its dummy gradient what this defence did to the victim's."""
    return defence.replay(Exchange()) is not None


class MatchingObjective:
    """What dlg and idlg minimise: the squared distance of `Match`, or, for an adaptive attack, the loss of `informed`.

    An adaptive attack's distance is relative to the leaked gradient, defended as announced, and has an image prior.
    After a step of Adam signs are matched, adaptive or not.
    """

    def __init__(self, leak: Leak, adaptive: bool, compiled: bool = False) -> None:
        self.known = informed(leak, relative_distance) if adaptive or leak.protocol.optimiser == "adam" else None
        self.match = Match(leak, self.known.distance if self.known else squared_distance, compiled=compiled)
        self.tolerance = 0.0 if self.known else self.match.tolerance

    def __call__(self, images: Images, labels: AnyLabels, elements: Tensor | None = None) -> Float[Tensor, "elements"]:
        """Objective of each batch element, differentiable with respect to images and label distributions."""
        distance: Tensor = self.match(images, labels, elements)
        return distance + self.known.prior(images, elements) if self.known else distance

    def with_input_gradient(
        self, images: Images, labels: AnyLabels, elements: Tensor | None = None
    ) -> tuple[Tensor, Images]:
        """Objective and its gradient with respect to the images, without autograd where there is no prior."""
        distance, input_gradient = self.match.with_input_gradient(images, labels, elements)
        if self.known is None:
            return distance, input_gradient
        images = images.detach().requires_grad_()
        prior = self.known.prior(images, elements)
        (prior_gradient,) = torch.autograd.grad(prior.sum(), images)
        return distance + prior.detach(), input_gradient + prior_gradient


def _weights(known: Adaptive, leak: Leak) -> Float[Tensor, "elements"]:
    """Weight of the variation: ``|d|^2 / 2 s^2 + R sum |dx|`` is -log posterior, here times ``2 s^2 / |leaked|^2``."""
    weights = []
    random = known.error > 0 or known.uneven
    pixels = leak.protocol.batch * torch.Size(leak.protocol.shape).numel()
    leaked = mean_gradient(leak)
    for element in range(len(leak)):
        one = {name: tensor[element] for name, tensor in leaked.items()}
        sizes = known.sizes(one)
        # |leaked|^2 in units of the errors
        energy = torch.stack([(one[name] / sizes[name]).square().sum() for name in one]).sum()
        variance = 1.0 if known.uneven else known.error**2
        weights.append(2 * variance * ROUGHNESS * pixels / energy.clamp_min(1e-30) * random)
    total = torch.stack(weights)
    priors = {type(part): replay.prior for part, replay in zip(known.parts, known.replays, strict=True)}
    for prior in sorted(priors.values()):
        total = total + prior  # what is done twice takes away no more
    return total
