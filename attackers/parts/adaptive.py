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
from fedtap.simulator.defences.announced import sigma
from fedtap.simulator.defences.notation import Part, described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, UpdateLeak
from fedtap.simulator.models.registry import logits_layer
from fedtap.simulator.wire.replay import mean_gradient, trained

MODELLED = frozenset({"soteria", "dp_sgd", "clip", "noise", "laplace", "prune", "sign", "quantise", "local_dp"})
"""Defences that an adaptive attack models. PRECODE is not among them: its random draw stays with the client, and the
reconstruction's gradient is computed without the bottleneck's noise."""

SOFTNESS, HARD = 0.3, 1e-4
"""Softness of the sign ``tanh(g / (softness rms(g)))``: one that gradient descent can follow, and one close to the
sign itself, for comparing reconstructions."""

ROUGHNESS = 5.0
"""Prior density of images: ``exp(-roughness sum |x - its neighbour|)``, across plus down. This constant and those
below were chosen on training images."""

PRUNED, SIGNED = 1e-3, 1.0
"""Weights of total variation under pruning and under signs, beside a relative squared distance."""

KINK = 0.3
"""Residuals below this share of a Laplace density's scale are smoothed, so that the loss is differentiable at 0."""

OTHER_NOISE = {"noise", "dp_sgd", "local_dp", "quantise"}
"""Defences whose errors, added to Laplace noise, give a density that is no longer a Laplace one."""

INSIDE = 0.01
"""Weight of the squared distance of pixels from [0, 1]."""


@dataclass(frozen=True)
class Adaptive:
    """`distance`, after the announced defence has been applied to the reply, as it was to the leaked one."""

    parts: tuple[Part, ...]
    """The parts of the announced defence, in the order in which they are applied."""
    distance: Distance
    """Distance between the defended reply and the leaked one."""
    error: float
    """Standard deviation of the announced noise on an entry."""
    length: float
    """1 / local steps: an update is a mean over them, and norms are bounded for their sum."""
    last: str
    """Name of the last layer's weight, which Soteria prunes."""
    alone: bool
    """Whether one step's batch is one image, so that its gradient is the whole gradient."""
    weighed: bool = True
    """Whether entries are divided by the standard deviation of their error."""
    softness: float = SOFTNESS
    """Softness of the sign: ``tanh(g / (softness rms(g)))``."""

    def __call__(self, reply: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
        for part in self.parts:
            reply = self._defended(part, reply, leaked)
        if not self.weighed:
            return self.distance(reply, leaked)
        sizes = self.sizes(leaked)
        reply, leaked = ({name: side[name] / sizes[name] for name in leaked} for side in (reply, leaked))
        return self.distance(reply, leaked)

    def sizes(self, leaked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standard deviation of the random error of each tensor's entries; 1 where all tensors have the same."""
        bits = next((part["bits"] for part in self.parts if part.name == "quantise"), None)
        if bits is None:
            return {name: tensor.new_ones(()) for name, tensor in leaked.items()}
        errors = {}
        for name, tensor in leaked.items():  # rounding at random has the variance step^2 f (1 - f), f in U(0, 1)
            step = (tensor.amax() - tensor.amin()) / (2**bits - 1)
            # E f (1 - f) = 1/6, and the announced noise adds its variance
            errors[name] = (step.square() / 6 + self.error**2).sqrt().clamp_min(1e-12)
        return errors

    def _defended(self, part: Part, reply: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        match part.name:
            case "prune":
                return {name: torch.where(leaked[name] == 0, 0.0, tensor) for name, tensor in reply.items()}
            case "soteria":
                return {**reply, self.last: torch.where(leaked[self.last] == 0, 0.0, reply[self.last])}
            case "sign":
                roots = {name: (tensor.square().mean() + 1e-30).sqrt() for name, tensor in reply.items()}
                # tanh(g / (softness rms(g)))
                return {name: (tensor / (self.softness * roots[name])).tanh() for name, tensor in reply.items()}
            case "clip":  # g min(1, C / |g|)
                return _shortened(reply, self.length * part["norm"])
            case "local_dp":
                return _shortened(reply, self.length * part["clip"])
            case "dp_sgd":
                return _shortened(reply, part["clip"]) if self.alone else _scaled(reply, leaked)
        return dict(reply)


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
    signs = described("sign()") if leak.protocol.optimiser == "adam" else ()
    try:
        parts = tuple(part for part in described(leak.protocol.defence) if part.kind.hook in ("step", "update"))
    except FedtapError:
        parts = ()
    parts = signs + parts  # one step of Adam is g / (|g| + ε), which a defence of the update comes after
    if not parts:
        return None
    steps = leak.protocol.local_steps if isinstance(leak, UpdateLeak) else 1
    alone = leak.protocol.batch == steps == 1
    error = sigma(leak.protocol) / steps
    # pure Laplace noise on a single client's whole update, and nothing after it: its density is known
    alike = (
        parts[-1].name == "laplace" and leak.protocol.summed == 1 and not OTHER_NOISE & {part.name for part in parts}
    )
    if distance is relative_distance and alike:
        distance = Absolute(error / math.sqrt(2))
    adaptive = Adaptive(parts, distance, error, 1 / steps, _last(leak), alone, weighed, softness)
    return Informed(adaptive, _weights(adaptive, leak))


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


def _last(leak: Leak) -> str:
    """Name of the weight that Soteria prunes; where that layer is absent or frozen, any other weight."""
    name = f"{logits_layer(leak.network, leak.protocol.shape)}.weight".removeprefix(".")
    return name if name in trained(leak.network) else trained(leak.network)[-1]


def _weights(known: Adaptive, leak: Leak) -> Float[Tensor, "elements"]:
    """Weight of the variation: ``|d|^2 / 2 s^2 + R sum |dx|`` is -log posterior, here times ``2 s^2 / |leaked|^2``."""
    weights = []
    names = {part.name for part in known.parts}
    random = known.error > 0 or "quantise" in names
    pixels = leak.protocol.batch * torch.Size(leak.protocol.shape).numel()
    leaked = mean_gradient(leak)
    for element in range(len(leak)):
        one = {name: tensor[element] for name, tensor in leaked.items()}
        sizes = known.sizes(one)
        # |leaked|^2 in units of the errors
        energy = torch.stack([(one[name] / sizes[name]).square().sum() for name in one]).sum()
        variance = 1.0 if "quantise" in names else known.error**2
        weights.append(2 * variance * ROUGHNESS * pixels / energy.clamp_min(1e-30) * random)
    total = torch.stack(weights)
    return total + PRUNED * ("prune" in names) + SIGNED * ("sign" in names)


def _shortened(reply: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    length = torch.stack([tensor.square().sum() for tensor in reply.values()]).sum().clamp_min(1e-30).sqrt()
    return {name: tensor * (norm / length).clamp_max(1) for name, tensor in reply.items()}


def _scaled(reply: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reply scaled to the least distance: the norm of a mean of clipped examples is unknown."""
    product = torch.stack([(reply[name] * leaked[name]).sum() for name in leaked]).sum()
    square = torch.stack([reply[name].square().sum() for name in leaked]).sum().clamp_min(1e-30)
    return {name: tensor * (product / square).clamp_min(0) for name, tensor in reply.items()}
