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
from fedtap.simulator.defences.chain import sigma
from fedtap.simulator.defences.defence import Defence, Density, Error, Exchange, Replay
from fedtap.simulator.defences.notation import described
from fedtap.simulator.defences.sign import Sign
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.wire.replay import exchange_of, mean_gradient

SOFTNESS, HARD = Exchange.softness, 1e-4
"""Of the sign: ``tanh(g / (softness rms(g)))``, for a slope to follow; and so that next to nothing is left of it."""

ROUGHNESS = 5.0
"""Pictures have the density ``exp(-roughness sum |x - its neighbour|)``, across plus down.
Chosen on training images."""

KINK = 0.3
"""Of a Laplace density's peak: residuals smaller than this share of its scale count as in a Gaussian one."""

INSIDE = 0.01
"""Weight of the squares of what is outside [0, 1], beside a distance relative to what was sent."""


@dataclass(frozen=True)
class Adaptive:
    """`misfit`, of an answer that is first defended as the leaked one was.

    Args:
        parts: the defence.
        replays: what is done to an answer, part by part.
        error: standard deviation of the noise on an entry.
        weighed: whether entries are divided by the size of their error.
    """

    parts: tuple[Defence, ...]
    replays: tuple[Replay, ...]
    misfit: Misfit
    error: float
    weighed: bool = True

    def __call__(self, answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
        one, heard = ({name: tensor[None] for name, tensor in side.items()} for side in (answer, leaked))
        for replay in self.replays:
            one = replay.does(one, heard)
        answer = {name: tensor[0] for name, tensor in one.items()}
        if not self.weighed:
            return self.misfit(answer, leaked)
        sizes = self.sizes(leaked)
        answer, leaked = ({name: side[name] / sizes[name] for name in leaked} for side in (answer, leaked))
        return self.misfit(answer, leaked)

    def sizes(self, leaked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Standard deviation of what is random in an entry of each tensor; 1 where it is the same for all."""
        heard = {name: tensor[None] for name, tensor in leaked.items()}
        found = [error.steps(heard) for error in self._errors if error.steps]
        if not found:
            return {name: tensor.new_ones(()) for name, tensor in leaked.items()}
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
    if misfit is relative_distance and leak.protocol.summed == 1 and last and densities == {Density.LAPLACE}:
        misfit = Absolute(error / math.sqrt(2))
    adaptive = Adaptive(parts, replays, misfit, error, weighed)
    return Informed(adaptive, _weights(adaptive, leak))


def replayable(defence: Defence) -> bool:
    """Whether an attack can do to its own guess's gradient what this defence did to the victim's."""
    return defence.replay(Exchange()) is not None


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


def _weights(known: Adaptive, leak: Leak) -> Float[Tensor, "lanes"]:
    """Of the variation: ``|d|^2 / 2 s^2 + roughness sum |dx|`` is the posterior, here times ``2 s^2 / |leaked|^2``."""
    weights = []
    random = known.error > 0 or known.uneven
    pixels = leak.protocol.batch * torch.Size(leak.protocol.shape).numel()
    leaked = mean_gradient(leak)
    for lane in range(len(leak)):
        one = {name: tensor[lane] for name, tensor in leaked.items()}
        sizes = known.sizes(one)
        energy = torch.stack([(one[name] / sizes[name]).square().sum() for name in one]).sum()
        variance = 1.0 if known.uneven else known.error**2
        weights.append(2 * variance * ROUGHNESS * pixels / energy.clamp_min(1e-30) * random)
    total = torch.stack(weights)
    priors = {type(part): replay.prior for part, replay in zip(known.parts, known.replays, strict=True)}
    for prior in sorted(priors.values()):
        total = total + prior  # what is done twice takes away no more
    return total
