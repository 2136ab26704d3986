"""Fused GIT: a trained attack's reconstruction as the prior of the exact one, or as its start.

After Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026, whose exact and learned recursions stand apart; their
combination is ours. The gradient is the likelihood, each entry weighed by its error. Without noise, the trained
attack's reconstruction is the mean of a Gaussian prior, and its errors on held-out auxiliary pairs the covariance.
Under announced noise that reconstruction owes its errors to the same noise as the gradient, which would be counted
twice: there the prior is the Gaussian of the public images, which owes nothing to the leak. The image of highest
posterior density is found by Gauss-Newton steps from the trained attack's reconstruction and, where the network can be
inverted layer by layer, from Exact-GIT's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtap.attackers.gradients.coarse_git import CoarseGIT
from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.gradients.gauss_newton import VICTIMS_AT_ONCE
from fedtap.attackers.gradients.matching import check_matching
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.newton import FlatImages, Product, fitted, residual
from fedtap.attackers.parts.priors import PublicImages, shrinkage
from fedtap.attackers.parts.teaching import HELD_OUT_EVERY, ordered
from fedtap.simulator.attack import Attack, Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak

Residuals = Callable[[FlatImages], Float[Tensor, "elements entries"]]
Finder = Callable[[Residuals, FlatImages, FlatImages, int, int], tuple[FlatImages, Tensor]]
"""(residuals, start, learned mean, steps, inner) -> the most probable images and the objective there, in float64."""


@dataclass(frozen=True)
class FusedGIT(Learner):
    """Maximum a posteriori between a trained attack and the gradient, at any noise level; weights known."""

    needs_weights = True

    prior: Attack = field(default_factory=CoarseGIT)
    """The trained attack whose reconstruction is the prior's mean without noise, and a start of the steps."""
    steps: int = 10
    """Gauss-Newton steps from each start."""
    inner: int = 100
    """Iterations of conjugate gradients in each step, at most."""

    def __post_init__(self) -> None:
        check_fields(self, steps=1, inner=1)
        if not isinstance(self.prior, Learner):
            raise FedtapError(
                f"prior of FusedGIT is {self.prior.written()}, which is not trained, and the prior comes "
                "from training: give an attack that is trained on auxiliary pairs, such as coarse_git."
            )

    @property
    def least(self) -> int:
        """Pairs below which fewer than two are held out, too few for a covariance."""
        return 2 * HELD_OUT_EVERY

    def accepts(self, leak: Leak) -> None:
        """What the trained attack accepts, of networks that torch.func can differentiate twice."""
        super().accepts(leak)
        self.prior.accepts(leak)
        check_matching(self, leak, signs=True)

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        assert isinstance(self.prior, Learner)
        return LearnedPrior(about, self.prior.inverter(about, network))

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        """Train the prior's attack, and keep its errors on the last pairs, which are held out of training; under noise
        mean and covariance of all images instead."""
        assert isinstance(inverter, LearnedPrior)
        learned = self.prior.fit(auxiliary, seed)
        inverter.guess.load_state_dict(learned.learned()[0].inverter.state_dict())
        if inverter.public is not None:
            inverter.public.see(torch.cat([pairs.images.flatten(0, 1) for pairs in auxiliary]))
            return
        kept = len(auxiliary) - len(inverter.errors)
        seen, row = 0, 0
        for pairs in auxiliary:
            fresh = pairs[torch.arange(min(max(0, kept - seen), len(pairs)), len(pairs))]
            if len(fresh):
                found = learned.reconstruct(fresh.leak, fresh.images).images.clamp(0, 1)
                truth = ordered(fresh.images.flatten(2), found.flatten(2))
                inverter.errors[row : row + len(fresh)] = (truth - found.flatten(2)).flatten(1)
            seen, row = seen + len(pairs), row + len(fresh)

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, LearnedPrior)
        assert isinstance(self.prior, Learner)
        prior_mean = self.prior.invert(inverter.guess, leak, start).images.clamp(0, 1)
        starts = [prior_mean]
        try:
            ExactGIT().accepts(leak)
            starts.append(ExactGIT().reconstruct(leak, start).images)
        except FedtapError:
            pass  # the network cannot be inverted layer by layer
        labels, find, found = recovered(leak), inverter.finder(), []
        for some in torch.arange(len(leak)).split(VICTIMS_AT_ONCE):  # type: ignore[no-untyped-call]
            residuals = residual(leak[some], labels[some])
            mean = prior_mean[some].flatten(1).double()
            tries = [find(residuals, begun[some].flatten(1).double(), mean, self.steps, self.inner) for begun in starts]
            images, objective = (torch.stack(parts) for parts in zip(*tries, strict=True))
            # of both starts, the one that ends at the higher posterior density
            best = objective.argmin(0)
            elements = torch.arange(len(some), device=best.device)
            found.append((images[best, elements], objective[best, elements]))
        images, objective = (torch.cat(parts).to(start.dtype) for parts in zip(*found, strict=True))
        return Reconstruction(images.reshape(start.shape), labels, objective)


class LearnedPrior(nn.Module):
    """The trained attack's module, and its errors on held-out auxiliary pairs or, under noise, the public images.

    The errors' covariance is shrunk towards a multiple of the identity, which suits few samples.
    """

    errors: Float[Tensor, "pairs pixels"]
    public: PublicImages | None

    def __init__(self, about: Provenance, trained: nn.Module) -> None:
        super().__init__()
        self.guess = trained  # saved files hold its tensors under this name
        pixels, noisy = math.prod(about.protocol.shape), sigma(about.protocol) > 0
        kept = 0 if noisy else max(1, about.pairs // HELD_OUT_EVERY)
        self.register_buffer("errors", torch.zeros(kept, about.protocol.batch * pixels))
        self.public = PublicImages(pixels) if noisy else None

    def finder(self) -> Finder:
        """What finds the most probable images under this prior."""
        if self.public is None:
            precision = self.precision()
            return lambda residuals, start, mean, steps, inner: fitted(residuals, start, mean, precision, steps, inner)
        public = copy.deepcopy(self.public).double()

        def find(
            residuals: Residuals, start: FlatImages, mean: FlatImages, steps: int, inner: int
        ) -> tuple[FlatImages, Tensor]:
            rows = (start.reshape(-1, len(public.mean)) - public.mean).T
            z = torch.linalg.solve_triangular(public.root, rows, upper=False).T.reshape(start.shape)
            # in z the prior is N(0, 1), and conjugate gradients need fewer steps than in pixels
            z, objective = fitted(
                lambda z: residuals(public.images(z)), z, torch.zeros_like(z), lambda v: v, steps, inner
            )
            return public.images(z), objective

        return find

    def precision(self) -> Product:
        """Product with the inverse of ``C = (1 - share) E^T E / n + share tr(E^T E / n) / p I``, by Woodbury's rule:

        ``C^-1 v = (v - F^T (c I + F F^T)^-1 F v) / c`` with ``C = F^T F + c I``.
        """
        errors = self.errors.double()
        n, p = errors.shape
        gram = errors @ errors.T / n
        trace, square = gram.diagonal().sum(), gram.square().sum()
        share = shrinkage(trace, square, n, p)
        c = (share * trace / p).clamp_min(1e-12)
        factor = ((1 - share) / n).sqrt() * errors
        inner = torch.linalg.cholesky(factor @ factor.T + c * torch.eye(n, dtype=errors.dtype, device=errors.device))

        # Woodbury: (c I + F'F)^-1 = (I - F'(c I + F F')^-1 F) / c
        def product(v: Tensor) -> Tensor:
            return (v - torch.cholesky_solve(factor @ v.T, inner).T @ factor) / c

        return product
