"""Reconstruction from a posterior: weighted pseudo-data under which the model's posterior is the one that leaked.

Wynne 2025, https://arxiv.org/abs/2507.18372 (the paper calls the attack TDR): the Fisher divergence between a posterior
and that of pseudo-data is half a squared MMD between the unnormalised data and pseudo-data, whose kernel is the mean
product of the likelihood's gradients, so that what these gradients see of the data comes back: their number among it.
For Gaussian regression that is the sufficient statistics, and no single record: any data of the same statistics have
the same divergence.

Departs from the paper in four ways: parameters are whitened, θ = mean + factor φ, without which first-order descent is
slowed down by a condition number of 1e8 (`whiten=False` shows it); draws of a regression are reduced once to the
quadratic that J is in the statistics, so that a step costs as many operations as there are pseudo-points; that
quadratic is minimised by Levenberg and Marquardt's damped Gauss-Newton steps, tens in the place of Adam's thousands;
and denoising score matching stands beside the exact and the sliced estimator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacfwd, vmap

from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.posteriors.fisher import (
    Coordinates,
    Quadratic,
    check_covariance,
    check_draws,
    coordinates,
    directions,
    divergence,
    estimator_named,
    not_finite,
    reduced,
)
from fedtap.simulator.attack import Attack, PseudoData, generator
from fedtap.simulator.errors import FedtapError, unknown
from fedtap.simulator.leaks import Leak, PosteriorLeak
from fedtap.simulator.models.likelihoods import Likelihood, LinearRegression, likelihood_of
from fedtap.simulator.progress import progress

OPTIMISERS = ("gauss_newton", "adam")

DEFAULT_ITERATIONS = {"gauss_newton": 300, "adam": 5000}
"""Iterations, at most, where `iterations` is 0; Gauss-Newton ends earlier, once J no longer falls."""

REST, STILL = 8, 1e-14
"""Iterations in which J fell by no more than this share of itself, after which Gauss-Newton ends."""

SPREAD = 2.0
"""How many times wider the start is than the draws' mean and covariance say the data are."""

JUDGED_DRAWS = 256
"""Draws over which the objective of a likelihood without statistics is evaluated, at most."""

PseudoWeights = Float[Tensor, "victims pseudo"]
PseudoPoints = Float[Tensor, "victims pseudo columns"]


@dataclass(frozen=True)
class PosteriorMMD(Attack[PseudoData]):
    """Least Fisher divergence over weights ``w = exp a`` and points, from weights of 1."""

    leaks = (PosteriorLeak,)
    reconstructs = PseudoData
    needs_weights = False

    pseudo: int = 200
    """Pseudo-points."""
    whiten: bool = True
    """Whether the divergence is taken in coordinates in which the draws have unit covariance."""
    estimator: str = "exact"
    """Estimator of the divergence: `exact`, `sliced` or `denoising`."""
    optimiser: str = "gauss_newton"
    """`gauss_newton` or `adam`; a likelihood without sufficient statistics takes Adam on batches of draws."""
    iterations: int = 0
    """At most; 0 means 300 of Gauss-Newton, which mostly ends after tens, and 5,000 of Adam."""
    step_size: float = 0.02
    """Adam's learning rate, which falls to 0 along a cosine."""
    draws: int = 10_000
    """Draws that are made of a posterior that leaked as mean and covariance."""
    batch: int = 64
    """Draws in each step of Adam, where the likelihood has no sufficient statistics."""

    @classmethod
    def suits(cls, leak: Leak) -> bool:
        """Any posterior."""
        return isinstance(leak, PosteriorLeak)

    def __post_init__(self) -> None:
        check_fields(self, pseudo=1, step_size=1e-9, draws=2, batch=1)
        estimator_named(self.estimator)
        if self.optimiser not in OPTIMISERS:
            raise unknown("optimiser", self.optimiser, OPTIMISERS)

    def accepts(self, leak: Leak) -> None:
        """Posteriors of models whose likelihood is known."""
        super().accepts(leak)
        likelihood_of(leak.protocol)

    def begin(self, leak: Leak, seed: int) -> PseudoPoints:
        """Normal numbers, from (seed, client, round, restart) alone."""
        shape = (self.pseudo, likelihood_of(leak.protocol).columns)
        names = zip(leak.clients.tolist(), leak.rounds.tolist(), leak.restarts.tolist(), strict=True)
        return torch.stack([torch.randn(shape, generator=generator(seed, *name)).double() for name in names])

    def reconstruct(self, leak: Leak, start: PseudoPoints) -> PseudoData:
        weights, points, objective = start[..., 0], start, start[:, 0, 0]
        for weights, points, objective in self.path(leak, start):  # noqa: B007
            pass
        return PseudoData(points[..., :-1], points[..., -1], weights, objective)

    def path(
        self, leak: Leak, start: PseudoPoints, quadratic: Quadratic | None = None
    ) -> Iterator[tuple[PseudoWeights, PseudoPoints, Float[Tensor, "victims"]]]:
        """Weights, points and objective: at the start, and after each iteration; the last are the reconstruction.

        Args:
            quadratic: that of this leak, where it is known already.

        Raises:
            FedtapError: the draws are not those of the protocol's model, have a singular covariance, or a derivative
                of the likelihood is not finite at one of them.
        """
        model, draws = likelihood_of(leak.protocol), self.drawn(leak)
        units = Units.of(model, draws)
        logs, places = torch.zeros_like(start[..., 0]), SPREAD * start.to(draws)
        if isinstance(model, LinearRegression):
            descend = self._gauss_newton if self.optimiser == "gauss_newton" else self._adam
            yield from descend(model, quadratic or self.quadratic(leak, draws), units, logs, places)
        else:
            yield from self._adam_on_batches(model, leak, draws, units, logs, places)

    def drawn(self, leak: Leak) -> Float[Tensor, "victims draws d"]:
        """The leaked draws; of a leaked mean and covariance, draws that have just these.

        Raises:
            FedtapError: they are not of the model, or the covariance is none.
        """
        model = likelihood_of(leak.protocol)
        if "draws" in leak.observed:
            draws = leak.observed["draws"].double()
        else:
            mean, covariance = leak.observed["mean"].double(), leak.observed["covariance"].double()
            check_covariance(covariance, model.parameters)
            shape = (self.draws, mean.shape[-1])
            normal = torch.stack([torch.randn(shape, generator=draw).double() for draw in _draws_of(leak, "draws")])
            # draws whitened by their own mean and covariance have the leaked ones exactly
            phi = coordinates(normal, model.parameters).inside(normal).to(mean)
            draws = mean[:, None] + phi @ torch.linalg.cholesky(covariance).mT
        check_draws(draws, model)
        return draws

    def quadratic(self, leak: Leak, draws: Float[Tensor, "victims draws d"] | None = None) -> Quadratic:
        """The objective of a linear regression, in the sums of the statistics; its minimum is the oracle.

        Raises:
            FedtapError: as `path` does, or the model is no linear regression.
        """
        model = likelihood_of(leak.protocol)
        if not isinstance(model, LinearRegression):
            raise FedtapError(f"{model} has no sufficient statistics, so there is no closed form: use the estimators.")
        draws = self.drawn(leak) if draws is None else draws
        where, phi = self._whitened(model, draws)
        return reduced(model, where, phi, self.estimator, self._directions(leak, phi))

    def _whitened(self, model: Likelihood, draws: Tensor) -> tuple[Coordinates, Tensor]:
        where = coordinates(draws, model.parameters, self.whiten)
        return where, where.inside(draws)

    def _directions(self, leak: Leak, phi: Float[Tensor, "victims draws d"]) -> Float[Tensor, "victims draws d"]:
        each = zip(phi, _draws_of(leak, "directions"), strict=True)
        return torch.stack([directions(one, self.estimator, draw) for one, draw in each])

    @property
    def steps(self) -> int:
        """Iterations, where the likelihood has statistics."""
        return self.iterations or DEFAULT_ITERATIONS[self.optimiser]

    def _gauss_newton(
        self, model: LinearRegression, quadratic: Quadratic, units: Units, logs: PseudoWeights, places: PseudoPoints
    ) -> Iterator[tuple[PseudoWeights, PseudoPoints, Float[Tensor, "victims"]]]:
        """``δ = −D K (λ + KᵀDᵀD K)⁻¹ K⁻¹ (g + H S)``, H = K Kᵀ, D the derivative of S in (a, z): q equations for all
        points.

        A step that does not lower J is not taken, and λ grows tenfold; else it falls so.
        """
        # H = K K'
        k, k_inverse = _root(quadratic.h)
        damping = torch.full(logs.shape[:1], 1e-3).to(logs)
        sums = _sums(model, units, logs, places)
        best = quadratic(sums)
        yield logs.exp(), units(places), best
        rested = torch.zeros_like(damping, dtype=torch.long)
        for _ in progress(self.steps, self.name):
            gradient = _derivative(model, units, logs, places) @ k  # victims unknowns statistics
            # K'D'D K, statistics x statistics
            normal = gradient.mT @ gradient
            scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1)
            eye = torch.eye(normal.shape[-1]).to(normal)
            # K^-1 (g + H S)
            right = k_inverse @ quadratic.gradient(sums)[..., None]
            step = -gradient @ torch.linalg.solve(normal + (damping * scale)[:, None, None] * eye, right)
            change = step.reshape(*places.shape[:2], -1)
            tried = logs + change[..., 0], places + change[..., 1:]
            there = _sums(model, units, *tried)
            objective = quadratic(there)
            better = (objective <= best) & (rested < REST)  # a victim ends when it would by itself
            logs = torch.where(better[:, None], tried[0], logs)
            places = torch.where(better[:, None, None], tried[1], places)
            before = best
            sums, best = torch.where(better[:, None], there, sums), torch.where(better, objective, best)
            damping = torch.where(better, damping / 10, damping * 10).clamp(1e-15, 1e15)
            yield logs.exp(), units(places), best
            rested = torch.where((before - best <= STILL * best.abs()) | (rested >= REST), rested + 1, 0)
            if bool((rested >= REST).all()):
                return

    def _adam(
        self, model: LinearRegression, quadratic: Quadratic, units: Units, logs: PseudoWeights, places: PseudoPoints
    ) -> Iterator[tuple[PseudoWeights, PseudoPoints, Float[Tensor, "victims"]]]:
        """Minimise the quadratic by Adam."""
        logs, places = logs.clone().requires_grad_(), places.clone().requires_grad_()
        adam = torch.optim.Adam([logs, places], self.step_size)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        for _ in progress(self.steps, self.name):
            objective = quadratic(_sums(model, units, logs, places))
            yield logs.detach().exp(), units(places.detach()), objective.detach()
            logs.grad, places.grad = torch.autograd.grad(objective.sum(), [logs, places])
            adam.step()
            cosine.step()
        with torch.no_grad():
            yield logs.exp(), units(places), quadratic(_sums(model, units, logs, places))

    def _adam_on_batches(
        self, model: Likelihood, leak: Leak, draws: Tensor, units: Units, logs: PseudoWeights, places: PseudoPoints
    ) -> Iterator[tuple[PseudoWeights, PseudoPoints, Float[Tensor, "victims"]]]:
        """Any likelihood, by the divergence on some of the draws at a time."""
        where, phi = self._whitened(model, draws)
        noise = self._directions(leak, phi)
        few = slice(None, None, -(-phi.shape[1] // JUDGED_DRAWS))

        def judged() -> Float[Tensor, "victims"]:
            with torch.no_grad():
                at = (model, where, phi[:, few], logs.exp(), units(places), self.estimator, noise[:, few])
                return divergence(*at)

        logs, places = logs.clone().requires_grad_(), places.clone().requires_grad_()
        adam = torch.optim.Adam([logs, places], self.step_size)
        steps = self.iterations or DEFAULT_ITERATIONS["adam"]
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        draws_of_batches, many = _draws_of(leak, "batches"), min(self.batch, phi.shape[1])
        elements = torch.arange(len(phi), device=phi.device)[:, None]
        yield logs.detach().exp(), units(places.detach()), judged()
        for _ in progress(steps, self.name):
            some = torch.stack([torch.randint(phi.shape[1], (many,), generator=draw) for draw in draws_of_batches])
            some = some.to(phi.device)
            at = (model, where, phi[elements, some], logs.exp(), units(places), self.estimator, noise[elements, some])
            objective = divergence(*at)
            if not bool(objective.isfinite().all()):
                raise FedtapError(not_finite(model, int(some[~objective.isfinite()][0, 0])))
            logs.grad, places.grad = torch.autograd.grad(objective.sum(), [logs, places])
            adam.step()
            cosine.step()
        yield logs.detach().exp(), units(places.detach()), judged()


@dataclass(frozen=True)
class Units:
    """``point = centre + scale . place``: of the size of the data."""

    centre: Float[Tensor, "victims columns"]
    """Mean of the data, as the draws tell it."""
    scale: Float[Tensor, "victims columns"]
    """Standard deviation of the data, as the draws tell it."""

    def __call__(self, places: PseudoPoints) -> PseudoPoints:
        """The points."""
        return self.centre[:, None] + self.scale[:, None] * places

    @classmethod
    def of(cls, model: Likelihood, draws: Float[Tensor, "victims draws d"]) -> Units:
        """Where the draws alone say that the data of a regression are: ``Cov β ≈ σ² (ΨᵀΨ)⁻¹``; N(0, 1) elsewhere."""
        if not isinstance(model, LinearRegression):
            zero = torch.zeros(len(draws), model.columns).to(draws)
            return cls(zero, torch.ones_like(zero))
        beta, sigma = draws[..., :-1].mean(1), draws[..., -1].mean(1)
        centred = draws[..., :-1] - beta[:, None]
        covariance = centred.mT @ centred / (draws.shape[1] - 1)
        # Psi'Psi = sigma^2 Cov(beta)^-1
        gram = sigma.square()[:, None, None] * torch.linalg.pinv(covariance, hermitian=True)
        gram = gram / gram[:, :1, :1]  # the mean of ψψᵀ
        mean = gram[:, 0]
        # Cov psi = mean(psi psi') - mean(psi) mean(psi)'
        spread = gram - mean[:, :, None] * mean[:, None]
        # E y = beta'E psi, and Var y = sigma^2 + beta'Cov(psi) beta
        y = (beta * mean).sum(-1)
        noise = sigma.square() + (beta[:, None] @ spread @ beta[..., None])[:, 0, 0]
        inputs = slice(1, 1 + model.inputs)
        variance = torch.cat([spread.diagonal(dim1=-2, dim2=-1)[:, inputs], noise[:, None]], dim=1)
        return cls(torch.cat([mean[:, inputs], y[:, None]], dim=1), variance.clamp_min(1e-300).sqrt())


def _sums(
    model: LinearRegression, units: Units, logs: PseudoWeights, places: PseudoPoints
) -> Float[Tensor, "victims statistics"]:
    return (logs.exp()[..., None] * model.statistics(units(places))).sum(1)


def _derivative(
    model: LinearRegression, units: Units, logs: PseudoWeights, places: PseudoPoints
) -> Float[Tensor, "victims unknowns statistics"]:
    """``D``: by each point's log-weight, then by its places."""
    points = units(places)
    by_point = vmap(vmap(jacfwd(model.statistics)))(points).mT * units.scale[:, None, :, None]
    both = torch.cat([model.statistics(points)[..., None, :], by_point], dim=-2)
    return (logs.exp()[..., None, None] * both).flatten(1, 2)


def _root(h: Float[Tensor, "victims q q"]) -> tuple[Tensor, Tensor]:
    """``K`` of ``H = K Kᵀ``, and its inverse; directions in which H is rounding are left out of the inverse."""
    unit = h.diagonal(dim1=-2, dim2=-1).sqrt()
    values, vectors = torch.linalg.eigh(h / (unit[:, :, None] * unit[:, None]))
    kept = values > 1e-15
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(kept, root, torch.inf).reciprocal()
    return unit[:, :, None] * vectors * root[:, None], inverse[..., None] * (vectors / unit[:, :, None]).mT


def _draws_of(leak: Leak, what: str) -> list[torch.Generator]:
    """One generator a victim, from (client, round, restart) alone."""
    names = zip(leak.clients.tolist(), leak.rounds.tolist(), leak.restarts.tolist(), strict=True)
    return [generator(what, *name) for name in names]
