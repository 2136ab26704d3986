"""Fused GIT: a learned reconstruction as the prior of the exact one.

After Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026, whose exact and learned recursions stand apart; their
union is ours. What an attack has learned says where the image is and, by its errors on pairs that were held out, how
far off and in which directions; the gradient says the rest, each entry as loudly as its noise allows. The image of
highest posterior is found by Gauss-Newton steps from the learned guess and, where the network can be undone layer by
layer, from Exact-GIT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtap.attackers.gradients.coarse_git import CoarseGIT
from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.gradients.gauss_newton import LANES
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.gradients import check_match
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.newton import Product, fitted, residual
from fedtap.attackers.parts.teaching import HELD_OUT
from fedtap.simulator.attack import Attack, Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import About, Auxiliary
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak


@dataclass(frozen=True)
class FusedGIT(Learner):
    """One estimator across all noise levels; weights known.

    Args:
        prior: the attack whose guess is the prior's mean.
        steps: Gauss-Newton steps from each start.
        inner: conjugate gradients a step, at most.
    """

    needs_weights = True

    prior: Attack = field(default_factory=CoarseGIT)
    steps: int = 10
    inner: int = 100

    def __post_init__(self) -> None:
        check_fields(self, steps=1, inner=1)
        if not isinstance(self.prior, Learner):
            raise FedtapError(
                f"prior of FusedGIT is {self.prior.written()}, which does not learn, and the prior is what was "
                "learned: give an attack that practises, such as coarse_git."
            )

    @property
    def least(self) -> int:
        """Enough to see an error's spread."""
        return 2 * HELD_OUT

    def accepts(self, leak: Leak) -> None:
        """What the learned attack accepts, of networks that can be differentiated twice."""
        super().accepts(leak)
        self.prior.accepts(leak)
        last_linear(leak)
        check_match(leak)

    def inverter(self, about: About, network: nn.Module) -> nn.Module:
        assert isinstance(self.prior, Learner)
        return Prior(about, self.prior.inverter(about, network))

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        """Learn, and keep the errors on the pairs that learners hold out: the last ones."""
        assert isinstance(inverter, Prior)
        learned = self.prior.fit(auxiliary, seed)
        inverter.guess.load_state_dict(learned.learned()[0].inverter.state_dict())
        kept = len(auxiliary) - len(inverter.errors)
        seen, row = 0, 0
        for pairs in auxiliary:
            fresh = pairs[torch.arange(min(max(0, kept - seen), len(pairs)), len(pairs))]
            if len(fresh):
                guess = learned.reconstruct(fresh.leak, fresh.images).images.clamp(0, 1)
                inverter.errors[row : row + len(fresh)] = (fresh.images - guess).flatten(1)
            seen, row = seen + len(pairs), row + len(fresh)

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, Prior)
        assert isinstance(self.prior, Learner)
        guess = self.prior.invert(inverter.guess, leak, start).images.clamp(0, 1)
        starts = [guess]
        try:
            ExactGIT().accepts(leak)
            starts.append(ExactGIT().reconstruct(leak, start).images)
        except FedtapError:
            pass  # the network cannot be undone layer by layer
        labels, precision, found = recovered(leak), inverter.precision(), []
        for some in torch.arange(len(leak)).split(LANES):  # type: ignore[no-untyped-call]
            misfit = residual(leak[some], labels[some])
            mean = guess[some].flatten(1).double()
            tries = [
                fitted(misfit, begun[some].flatten(1).double(), mean, precision, self.steps, self.inner)
                for begun in starts
            ]
            images, objective = (torch.stack(parts) for parts in zip(*tries, strict=True))
            best = objective.argmin(0)
            lanes = torch.arange(len(some), device=best.device)
            found.append((images[best, lanes], objective[best, lanes]))
        images, objective = (torch.cat(parts).to(start.dtype) for parts in zip(*found, strict=True))
        return Reconstruction(images.reshape(start.shape), labels, objective)


class Prior(nn.Module):
    """The learned attack's module, and its errors on pairs that it did not learn from.

    Their covariance is shrunk towards a multiple of the identity, as far as few samples of a Gaussian ask for (Chen,
    Wiesel, Eldar and Hero 2010, https://arxiv.org/abs/0907.4698).
    """

    errors: Float[Tensor, "pairs pixels"]

    def __init__(self, about: About, guess: nn.Module) -> None:
        super().__init__()
        self.guess = guess
        pixels = about.protocol.batch * math.prod(about.protocol.shape)
        self.register_buffer("errors", torch.zeros(max(1, about.pairs // HELD_OUT), pixels))

    def precision(self) -> Product:
        """Product with the inverse of ``C = (1 - share) E^T E / n + share tr(E^T E / n) / p I``, by Woodbury's rule:

        ``C^-1 v = (v - F^T (c I + F F^T)^-1 F v) / c`` with ``C = F^T F + c I``.
        """
        errors = self.errors.double()
        n, p = errors.shape
        gram = errors @ errors.T / n
        trace, square = gram.diagonal().sum(), gram.square().sum()
        share = (
            ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p)).clamp_min(1e-300)
        ).clamp(0, 1)
        c = (share * trace / p).clamp_min(1e-12)
        factor = ((1 - share) / n).sqrt() * errors
        inner = torch.linalg.cholesky(factor @ factor.T + c * torch.eye(n, dtype=errors.dtype, device=errors.device))

        def product(v: Tensor) -> Tensor:
            return (v - torch.cholesky_solve(factor @ v.T, inner).T @ factor) / c

        return product
