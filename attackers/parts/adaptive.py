"""What an attack makes of a defence that it knows: it does to its own guess's gradient what was done to the victim's.

Then both are compared where they can be compared. A pruned gradient shows which entries were kept, and Soteria's which
features: what was dropped is left out (of Soteria, as in Balunović et al. 2022, https://arxiv.org/abs/2111.04706, who
also have the Bayes-optimal attack on a gradient with noise). A sign is compared with a soft sign; a clip is repeated;
quantisation and noise leave an error of a known size, by which entries are weighed; Laplace noise has heavier tails
than a square would have it, so there it is distances that count. The less a defence leaves, the more
it matters what pictures look like: that has the weight which it has in the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.parts.gradients import Labels, Match, Misfit, relative_distance, squared_distance
from fedtap.attackers.parts.priors import smooth_variation
from fedtap.simulator.attack import Images
from fedtap.simulator.defences.announced import sigma
from fedtap.simulator.defences.notation import Part, described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, UpdateLeak
from fedtap.simulator.models.registry import logits_layer
from fedtap.simulator.wire.replay import mean_gradient, trained

MODELLED = frozenset({"soteria", "dp_sgd", "clip", "noise", "laplace", "prune", "sign", "quantise", "local_dp"})
"""Defences that an aware attack models. Not `precode`: its draw is the client's own, and no part of what is sent shows
it, so the guess's gradient is computed as if there were no bottleneck noise to know of."""

SOFTNESS, HARD = 0.3, 1e-4
"""Of the sign: ``tanh(g / (softness rms(g)))``, for a slope to follow; and so that next to nothing is left of it."""

ROUGHNESS = 5.0
"""Pictures have the density ``exp(-roughness sum |x - its neighbour|)``, across plus down. Chosen, as those below, on
training images."""

PRUNED, SIGNED = 1e-3, 1.0
"""Weight of the variation where nothing is random: beside a squared distance relative to what was sent."""

KINK = 0.3
"""Of a Laplace density's peak: residuals smaller than this share of its scale count as in a Gaussian one."""

OTHER_NOISE = {"noise", "dp_sgd", "local_dp", "quantise"}
"""What added to Laplace noise gives another density."""

INSIDE = 0.01
"""Likewise of the squares of what is outside [0, 1]."""


@dataclass(frozen=True)
class Adaptive:
    """`misfit`, of an answer that is first defended as the leaked one was.

    Args:
        parts: the defence.
        error: standard deviation of the noise on an entry.
        length: 1 over the local steps that an entry is a mean of: norms are of their sum.
        last: name of the last layer's weight.
        alone: whether a step's batch is one image, whose gradient is then the whole gradient.
        weighed: whether entries are divided by the size of their error.
    """

    parts: tuple[Part, ...]
    misfit: Misfit
    error: float
    length: float
    last: str
    alone: bool
    weighed: bool = True
    softness: float = SOFTNESS

    def __call__(self, answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
        for part in self.parts:
            answer = self._defended(part, answer, leaked)
        if not self.weighed:
            return self.misfit(answer, leaked)
        sizes = self.sizes(leaked)
        answer, leaked = ({name: side[name] / sizes[name] for name in leaked} for side in (answer, leaked))
        return self.misfit(answer, leaked)

    def sizes(self, leaked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standard deviation of what is random in an entry of each tensor; 1 where it is the same for all."""
        bits = next((part["bits"] for part in self.parts if part.name == "quantise"), None)
        if bits is None:
            return {name: tensor.new_ones(()) for name, tensor in leaked.items()}
        errors = {}
        for name, tensor in leaked.items():  # rounding at random has the variance step^2 f (1 - f), f in U(0, 1)
            step = (tensor.amax() - tensor.amin()) / (2**bits - 1)
            errors[name] = (step.square() / 6 + self.error**2).sqrt().clamp_min(1e-12)
        return errors

    def _defended(self, part: Part, answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        match part.name:
            case "prune":
                return {name: torch.where(leaked[name] == 0, 0.0, tensor) for name, tensor in answer.items()}
            case "soteria":
                return {**answer, self.last: torch.where(leaked[self.last] == 0, 0.0, answer[self.last])}
            case "sign":
                roots = {name: (tensor.square().mean() + 1e-30).sqrt() for name, tensor in answer.items()}
                return {name: (tensor / (self.softness * roots[name])).tanh() for name, tensor in answer.items()}
            case "clip":
                return _shortened(answer, self.length * part["norm"])
            case "local_dp":
                return _shortened(answer, self.length * part["clip"])
            case "dp_sgd":
                return _shortened(answer, part["clip"]) if self.alone else _scaled(answer, leaked)
        return dict(answer)


@dataclass(frozen=True)
class Absolute:
    """``4 b sum |answer - leaked| / |leaked|^2``, without the kink at 0.

    That is minus the logarithm of a Laplace density of scale b times ``2 s^2 / |leaked|^2``, with the variance
    ``s^2 = 2 b^2``, as `relative_distance` is of a Gaussian one.
    """

    scale: float

    def __call__(self, answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
        apart = [(answer[name] - leaked[name]).square() + (KINK * self.scale) ** 2 for name in leaked]
        size = torch.stack([tensor.square().sum() for tensor in leaked.values()]).sum().clamp_min(1e-30)
        return 4 * self.scale * torch.stack([square.sqrt().sum() for square in apart]).sum() / size


@dataclass(frozen=True)
class Informed:
    """What an attack minimises that knows the defence.

    Args:
        misfit: between what the guess and the victim sent, both defended.
        weights: of the variation of a guess's pixels, beside a distance relative to what was sent.
    """

    misfit: Adaptive
    weights: Float[Tensor, "lanes"]

    def prior(self, images: Images, lanes: Tensor | None = None) -> Float[Tensor, "lanes"]:
        """Of the lanes' guesses: how little they look like pictures."""
        weights = self.weights if lanes is None else self.weights[lanes]
        outside = (images - images.clamp(0, 1)).square().flatten(1).sum(1)
        return weights * smooth_variation(images) + INSIDE * outside


def informed(leak: Leak, misfit: Misfit, weighed: bool = True, softness: float = SOFTNESS) -> Informed | None:
    """What is to be minimised; None where the protocol announces nothing that changes what a guess would send.

    Neither does a defence that is not fedtap's. After a step of Adam there are signs.
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
    alike = (
        parts[-1].name == "laplace" and leak.protocol.summed == 1 and not OTHER_NOISE & {part.name for part in parts}
    )
    if misfit is relative_distance and alike:
        misfit = Absolute(error / math.sqrt(2))
    adaptive = Adaptive(parts, misfit, error, 1 / steps, _last(leak), alone, weighed, softness)
    return Informed(adaptive, _weights(adaptive, leak))


class Objective:
    """The squared distance of `Match`; where the attack is aware of a defence, relative, defended and with a prior.

    Signs that Adam left are matched as signs.
    """

    def __init__(self, leak: Leak, adaptive: bool, compiled: bool = False) -> None:
        self.known = informed(leak, relative_distance) if adaptive or leak.protocol.optimiser == "adam" else None
        self.match = Match(leak, self.known.misfit if self.known else squared_distance, compiled=compiled)
        self.floor = 0.0 if self.known else self.match.floor

    def __call__(self, images: Images, labels: Labels, lanes: Tensor | None = None) -> Float[Tensor, "lanes"]:
        """Of each lane's guess, with its slope."""
        misfit: Tensor = self.match(images, labels, lanes)
        return misfit + self.known.prior(images, lanes) if self.known else misfit

    def with_slope(self, images: Images, labels: Labels, lanes: Tensor | None = None) -> tuple[Tensor, Images]:
        """The same and its slope towards the images, without autograd where there is no prior."""
        misfit, slope = self.match.with_slope(images, labels, lanes)
        if self.known is None:
            return misfit, slope
        images = images.detach().requires_grad_()
        prior = self.known.prior(images, lanes)
        (push,) = torch.autograd.grad(prior.sum(), images)
        return misfit + prior.detach(), slope + push


def _last(leak: Leak) -> str:
    """Soteria's layer; of a model that has none, or has it frozen, any name would do."""
    name = f"{logits_layer(leak.network, leak.protocol.shape)}.weight".removeprefix(".")
    return name if name in trained(leak.network) else trained(leak.network)[-1]


def _weights(known: Adaptive, leak: Leak) -> Float[Tensor, "lanes"]:
    """Of the variation: ``|d|^2 / 2 s^2 + roughness sum |dx|`` is the posterior, here times ``2 s^2 / |leaked|^2``."""
    weights = []
    names = {part.name for part in known.parts}
    random = known.error > 0 or "quantise" in names
    pixels = leak.protocol.batch * torch.Size(leak.protocol.shape).numel()
    leaked = mean_gradient(leak)
    for lane in range(len(leak)):
        one = {name: tensor[lane] for name, tensor in leaked.items()}
        sizes = known.sizes(one)
        energy = torch.stack([(one[name] / sizes[name]).square().sum() for name in one]).sum()
        variance = 1.0 if "quantise" in names else known.error**2
        weights.append(2 * variance * ROUGHNESS * pixels / energy.clamp_min(1e-30) * random)
    total = torch.stack(weights)
    return total + PRUNED * ("prune" in names) + SIGNED * ("sign" in names)


def _shortened(answer: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    length = torch.stack([tensor.square().sum() for tensor in answer.values()]).sum().clamp_min(1e-30).sqrt()
    return {name: tensor * (norm / length).clamp_max(1) for name, tensor in answer.items()}


def _scaled(answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """At the length at which it is nearest: of examples that are clipped one by one only the mean's is not known."""
    product = torch.stack([(answer[name] * leaked[name]).sum() for name in leaked]).sum()
    square = torch.stack([answer[name].square().sum() for name in leaked]).sum().clamp_min(1e-30)
    return {name: tensor * (product / square).clamp_min(0) for name, tensor in answer.items()}
