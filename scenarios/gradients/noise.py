"""How much noise must a client add before its image is lost?

Expect: what stops the exact attack long before (1e-3 on an entry) costs the learned one little, since it is trained
under the same noise; the two in one estimator lie well above both in between. At 0.1, where the noise is as large as
the gradient itself, a posterior mean (noise_git) comes close to what a genie would reach that knew the label and how
the gradient depends on the image at the image itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import ImageObserved
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.scenario import Scenario, Scored, Session, Trial

if TYPE_CHECKING:  # so that a scenario's options can be shown without torch
    from torch import Tensor

    from fedtap.attackers.parts.priors import PublicImages
    from fedtap.simulator.leaks import Leak

GENIE_PROBES = 2
"""Random vectors for each victim's trace."""

GENIE_ITERATIONS = 100
"""Conjugate gradients for each of them, at most: fewer than it takes make the bound lower, never higher."""

GENIE_AT_ONCE = 32
"""Victims whose linear systems are solved together."""


FROM_SIGMA = 0.03
"""Noise from which `noise_git` is among the attacks: under less, its steps take long, and `fused_git` is there."""


@dataclass(frozen=True)
class NoisyObserved(ImageObserved):
    """What was observed under noise, and the bound that its noise sets."""

    @cached_property
    def genie(self) -> Sequence[float | None]:
        """`genie_mse` of each victim; None where the weights are not known, no noise is announced, the network cannot
        be differentiated twice or memory does not hold the covariance of public images."""
        import torch

        from fedtap.attackers.parts.gradients import check_match
        from fedtap.attackers.parts.priors import PublicImages
        from fedtap.simulator.defences.chained import sigma

        if self.leak is None or self.leak.weights is None or not sigma(self.leak.protocol):
            return [None] * len(self.names)
        public, (images, labels) = self.private.dataset.auxiliary, map(torch.stack, zip(*self.truths, strict=True))
        try:
            check_match(self.leak)
            prior = PublicImages(images[0, 0].numel())
        except FedtapError:
            return [None] * len(self.names)
        prior.see(public.batch(torch.arange(len(public)))[0])
        return genie_mse(self.leak, images, labels, prior).tolist()


@dataclass(frozen=True)
class Noise(ImageScenario):
    """Gaussian noise on every entry of what clients send; all know how much."""

    spent: ClassVar[tuple[str, ...]] = ("sigma",)
    panels: ClassVar[Mapping[str, str]] = {
        "curious_server": "coarse_git,exact_git,refine(exact_git,gauss_newton),fused_git",
    }
    victims: int = 4
    sigma: Annotated[float, Option("standard deviation of the noise on each entry of the gradient", 0.0, 1e6)] = sweep(
        0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1
    )

    def settings(self) -> Sequence[Scenario]:
        """The noise is the defence; from `FROM_SIGMA` on there is one attack more."""
        if self.defence != "none":
            raise FedtapError("In this scenario --sigma is the defence, and --defence would be another: leave one out.")
        defence = f"noise({self.sigma})" if self.sigma else "none"
        parts = [one.played(defence=defence) for one in self.under_threat_models()]
        if not self.named and self.sigma >= FROM_SIGMA:
            parts = [part.played(attack=f"{part.attack},noise_git") for part in parts]
        return tuple(parts)

    def observe(self, session: Session) -> NoisyObserved:
        """As in every image scenario, with the genie's bound beside it."""
        observed = super().observe(session)
        return NoisyObserved(**{field.name: getattr(observed, field.name) for field in dataclasses.fields(observed)})

    def score(self, trial: Trial) -> Scored:
        """Image by image, beside the blind guess and the genie's bound."""
        scored, observed = super().score(trial), trial.observed
        assert isinstance(observed, NoisyObserved)
        rows = [dict(row) | {"genie_mse": bound} for row, bound in zip(scored.rows, observed.genie, strict=True)]
        return dataclasses.replace(scored, rows=rows)


def genie_mse(leak: Leak, images: Tensor, labels: Tensor, prior: PublicImages) -> Tensor:
    """Mean squared error that a genie expects, one value a victim: for scoring alone, since it uses the truth.

    The genie knows the weights, the labels, and J, the derivative of the gradient in units of its noise at the true
    image; its prior is the Gaussian of public images, with covariance ``C = L L'``. It then sees a linear problem,
    whose posterior covariance is ``L (L' J' J L + 1)^-1 L'``. The trace over the number of pixels is the mean of
    ``v' L (L' J' J L + 1)^-1 L' v`` over random signs v (Hutchinson 1990, https://doi.org/10.1080/03610919008812866).

    It is an expectation over images of that Gaussian: who knows more of images than mean and covariance may stay below,
    and images unlike the public ones lie above.

    Args:
        images: the true ones, `victims batch channel height width`.
        labels: the true ones, `victims batch`.
    """
    import torch

    from fedtap.attackers.parts.newton import conjugate_gradients, linear, residual
    from fedtap.simulator.attack import generator

    pixels, bounds = len(prior.mean), []
    for some in torch.arange(len(leak)).split(GENIE_AT_ONCE):  # type: ignore[no-untyped-call]
        truth = images[some].flatten(1)
        residuals = residual(leak[some], labels[some], truth.dtype)

        def near(z: Tensor, truth: Tensor = truth, residuals: Callable[[Tensor], Tensor] = residuals) -> Tensor:
            return residuals(truth + (z.reshape(-1, pixels) @ prior.root.T).reshape(len(z), -1))

        curved, found = linear(near, torch.zeros_like(truth))[2], torch.zeros(len(truth))
        for probe in range(GENIE_PROBES):
            signs = torch.randint(2, truth.shape[1:], generator=generator("genie", probe)) * 2.0 - 1
            right = (signs.to(truth).reshape(-1, pixels) @ prior.root).flatten().expand_as(truth)
            found += (right * conjugate_gradients(curved, right, GENIE_ITERATIONS)).mean(1) / GENIE_PROBES
        bounds.append(found)
    return torch.cat(bounds)
