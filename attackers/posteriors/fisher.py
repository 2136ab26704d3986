"""The Fisher divergence between a posterior, known by its draws, and that of weighted pseudo-data.

Hyvärinen 2005, https://jmlr.org/papers/v6/hyvarinen05a.html (by parts, so that the data are not needed); Song, Garg,
Shi and Ermon 2019, https://arxiv.org/abs/1905.07088 (sliced); Vincent 2011, https://doi.org/10.1162/NECO_a_00142
(denoising). With log π_{w,Z}(θ) = log p(θ) + Σ_m w_m log l(θ, z_m), up to a constant that the pseudo-data do not move::

    exact      J = mean_t [ Tr ∇² log π_{w,Z}(θ_t) + ½ |∇ log π_{w,Z}(θ_t)|² ]
    sliced     Tr ∇² → vᵀ ∇² v, one random sign vector v a draw
    denoising  J = mean_t [ ½ |s(θ_t + εn)|² + n . s(θ_t + εn) / ε ],  s = ∇ log π_{w,Z},  n ~ N(0, 1), and with −n

All of it in whitened coordinates φ, θ = mean + factor φ, where the draws have unit covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

from fedtap.simulator.errors import FedtapError, unknown
from fedtap.simulator.models.likelihoods import Likelihood, LinearRegression

ESTIMATORS = ("exact", "sliced", "denoising")

DENOISING_NOISE = 0.05
"""ε of the denoising estimator, in the posterior's own standard deviations: it sees a covariance 1 + ε² as wide."""

DRAWS_AT_ONCE = 8192
"""Draws that are differentiated at once, to bound memory."""

SINGULAR = 1e-12
"""Share of its mean below which an eigenvalue of the draws' correlations is rounding."""

Point = Float[Tensor, "d"]
Field = Callable[[Point], Tensor]


@dataclass(frozen=True)
class Coordinates:
    """``θ = mean + factor φ``, for each victim."""

    mean: Float[Tensor, "victims d"]
    """Mean of the draws."""
    factor: Float[Tensor, "victims d d"]
    """Cholesky factor of the draws' covariance; the identity where they are not whitened."""

    def inside(self, draws: Float[Tensor, "victims draws d"]) -> Float[Tensor, "victims draws d"]:
        """The draws' φ."""
        phi: Tensor = torch.linalg.solve_triangular(self.factor, (draws - self.mean[:, None]).mT, upper=False)
        return phi.mT


def coordinates(draws: Float[Tensor, "victims draws d"], names: tuple[str, ...], whiten: bool = True) -> Coordinates:
    """Those in which the draws have mean 0 and, whitened, covariance 1: ``factor factorᵀ = Cov θ_t``.

    Raises:
        FedtapError: no more draws than parameters, or draws that do not vary in some direction, which is named.
    """
    victims, many, d = draws.shape
    if many <= d:
        raise FedtapError(
            f"{many} draws of {d} parameters have a singular covariance, since it needs more draws than parameters: "
            f"give at least {d + 1}, better thousands."
        )
    mean = draws.mean(1)
    centred = draws - mean[:, None]
    # unbiased
    covariance = centred.mT @ centred / (many - 1)
    check_covariance(covariance, names)
    if not whiten:
        return Coordinates(mean, torch.eye(d).to(draws).expand(victims, d, d))
    return Coordinates(mean, torch.linalg.cholesky(covariance))


def check_covariance(covariance: Float[Tensor, "victims d d"], names: tuple[str, ...]) -> None:
    """Refuse a covariance that is not positive definite, and name the direction in which it is singular.

    Raises:
        FedtapError: a parameter does not vary, or a combination of several does not.
    """
    spread = covariance.diagonal(dim1=-2, dim2=-1)
    if not bool(covariance.isfinite().all()):
        raise FedtapError(
            "The covariance of the posterior is not finite, as its draws are too large to be squared: give them in "
            "other units."
        )
    if bool((spread <= 0).any()):
        which = ", ".join(names[at] for at in sorted(set((spread <= 0).nonzero()[:, 1].tolist())))
        raise FedtapError(
            f"The covariance of the posterior is singular, as {which} does not vary: leave out what is fixed, or give "
            "the draws of a chain that moved."
        )
    scale = spread.sqrt()
    # of the correlations, which do not depend on the parameters' units
    values, vectors = torch.linalg.eigh(covariance / (scale[:, :, None] * scale[:, None]))
    if bool((values[:, 0] < SINGULAR).any()):
        victim = int((values[:, 0] < SINGULAR).nonzero()[0])
        direction = vectors[victim, :, 0] / scale[victim]
        direction = direction / direction.abs().max()
        said = " ".join(
            f"{value:+.3g} {name}" for value, name in zip(direction.tolist(), names, strict=True) if abs(value) > 1e-6
        )
        raise FedtapError(
            f"The covariance of the posterior is singular, as {said} does not vary: the inputs are dependent there, "
            "or the draws are copies; leave out one of these parameters."
        )


def check_draws(draws: Float[Tensor, "victims draws d"], model: Likelihood) -> None:
    """Refuse draws that are of another model, or outside of this one's parameters.

    Raises:
        FedtapError: naming the parameter and the draw.
    """
    names = model.parameters
    if draws.shape[-1] != len(names):
        raise FedtapError(
            f"The draws are of {draws.shape[-1]} parameters and {model} has {len(names)} ({', '.join(names)}): name "
            "the inputs of the regression whose draws they are, --x."
        )
    for at in model.positive:
        if bool((draws[..., at] <= 0).any()):
            worst = draws[..., at].flatten().argmin()
            raise FedtapError(
                f"{names[at]} is {float(draws[..., at].flatten()[worst]):g} in draw {int(worst) % draws.shape[1] + 1}, "
                "and a standard deviation is over 0: give the draws on their own scale, not as logarithms."
            )


def estimator_named(name: str) -> str:
    """The name, if it is one.

    Raises:
        FedtapError: there is none of this name.
    """
    if name not in ESTIMATORS:
        raise unknown("estimator", name, ESTIMATORS)
    return name


def directions(like: Float[Tensor, "*draws d"], estimator: str, draw: torch.Generator) -> Float[Tensor, "*draws d"]:
    """What an estimator needs at random, for each draw: signs, normal noise, or nothing (zeros)."""
    if estimator == "exact":
        return torch.zeros_like(like)
    noise = torch.randn(like.shape, generator=draw, dtype=like.dtype).to(like.device)
    return noise.sign() if estimator == "sliced" else noise


def divergence(
    model: Likelihood,
    where: Coordinates,
    phi: Float[Tensor, "victims draws d"],
    weights: Float[Tensor, "victims pseudo"],
    points: Float[Tensor, "victims pseudo columns"],
    estimator: str,
    noise: Float[Tensor, "victims draws d"],
) -> Float[Tensor, "victims"]:
    """J of each victim's pseudo-data, for any likelihood that can be differentiated twice; autograd goes through."""

    def at_draw(phi: Point, noise: Point, mean: Point, factor: Tensor, weights: Tensor, points: Tensor) -> Tensor:
        def log_posterior(phi: Point) -> Tensor:
            theta = mean + factor @ phi
            logs = vmap(model.log_likelihood, (None, 0))(theta, points)
            return model.log_prior(theta) + weights @ logs

        score = grad(log_posterior)
        if estimator == "exact":
            # Tr of the Hessian: sum_i e_i' H e_i
            bent = vmap(lambda v: v @ _along(score, phi, v)[1])(torch.eye(len(phi)).to(phi))
            return bent.sum() + 0.5 * score(phi).square().sum()  # type: ignore[no-any-return]
        if estimator == "sliced":
            gradient, along = _along(score, phi, noise)
            return noise @ along + 0.5 * gradient.square().sum()
        # antithetic noise +n and -n: terms of odd order cancel
        one, other = score(phi + DENOISING_NOISE * noise), score(phi - DENOISING_NOISE * noise)
        # n'(s(+) - s(-)) / 2 eps
        bent = noise @ (one - other) / (2 * DENOISING_NOISE)
        return bent + 0.25 * (one.square().sum() + other.square().sum())  # type: ignore[no-any-return]

    over_draws = vmap(at_draw, (0, 0, None, None, None, None))
    return vmap(over_draws)(phi, noise, where.mean, where.factor, weights, points).mean(1)


def _along(f: Field, phi: Point, v: Point) -> tuple[Tensor, Tensor]:
    """f, and its derivative along v."""
    value, gradient = jvp(f, (phi,), (v,))[:2]
    return value, gradient


@dataclass(frozen=True)
class Quadratic:
    """``J(S) = g . S + ½ Sᵀ H S + constant``, S the sums of the pseudo-data's sufficient statistics."""

    h: Float[Tensor, "victims statistics statistics"]
    """H: mean over draws of the product of the statistics' gradients."""
    g: Float[Tensor, "victims statistics"]
    """g: the linear term."""
    constant: Float[Tensor, "victims"]
    """J without pseudo-data."""

    def __call__(self, sums: Float[Tensor, "victims statistics"]) -> Float[Tensor, "victims"]:
        """J."""
        return (sums * (self.g + 0.5 * self.times(sums))).sum(-1) + self.constant

    def times(self, sums: Float[Tensor, "victims statistics"]) -> Float[Tensor, "victims statistics"]:
        """``H S``."""
        return (self.h * sums[:, None]).sum(-1)

    def gradient(self, sums: Float[Tensor, "victims statistics"]) -> Float[Tensor, "victims statistics"]:
        """``g + H S``."""
        return self.g + self.times(sums)

    def minimum(self) -> Float[Tensor, "victims statistics"]:
        """The oracle ``S* = −H⁻¹ g``, in units in which H has a unit diagonal.

        Raises:
            FedtapError: the draws do not tell all statistics.
        """
        unit = self.h.diagonal(dim1=-2, dim2=-1).rsqrt()
        scaled = self.h * unit[:, :, None] * unit[:, None]
        if bool((torch.linalg.eigvalsh(scaled)[:, 0] < 1e-14).any()):
            raise FedtapError(
                "The draws do not tell all of the data's sufficient statistics, as H is singular to working precision: "
                "there are too few different draws, or one is extreme (a σ near 0?): give more, or leave that one out."
            )
        found: Tensor = torch.linalg.solve(scaled, (unit * self.g)[..., None])
        return -unit * found[..., 0]


def reduced(
    model: LinearRegression,
    where: Coordinates,
    phi: Float[Tensor, "victims draws d"],
    estimator: str,
    noise: Float[Tensor, "victims draws d"],
) -> Quadratic:
    """The draws, once and for all, as H and g: J depends on pseudo-data through their statistics' sums alone.

    log π is ``f(φ) . (1, S)`` with f = (log p, natural), so its gradient and Hessian are as linear in S as f's are.

    Raises:
        FedtapError: a second derivative of the likelihood is not finite at one of the draws.
    """
    victims, many, d = phi.shape
    size = 1 + len(model.monomials)
    second, first = torch.zeros(victims, size, size).to(phi), torch.zeros(victims, size).to(phi)

    def at_draw(phi: Point, noise: Point, mean: Point, factor: Tensor) -> tuple[Tensor, Tensor]:
        def f(phi: Point) -> Tensor:
            theta = mean + factor @ phi
            return torch.cat([model.log_prior(theta)[None], model.natural(theta)])

        def bent(v: Point) -> Tensor:
            return _along(lambda p: _along(f, p, v)[1], phi, v)[1]

        if estimator == "denoising":
            one, other = jacfwd(f)(phi + DENOISING_NOISE * noise), jacfwd(f)(phi - DENOISING_NOISE * noise)
            return 0.5 * (one @ one.T + other @ other.T), (one - other) @ noise / (2 * DENOISING_NOISE)
        gradient = jacfwd(f)(phi)
        trace = bent(noise) if estimator == "sliced" else vmap(bent)(torch.eye(d).to(phi)).sum(0)
        return gradient @ gradient.T, trace

    many_draws = vmap(vmap(at_draw, (0, 0, None, None)))
    for start in range(0, many, DRAWS_AT_ONCE):
        part = slice(start, start + DRAWS_AT_ONCE)
        squares, traces = many_draws(phi[:, part], noise[:, part], where.mean, where.factor)
        finite = squares.isfinite().flatten(2).all(-1) & traces.isfinite().all(-1)
        if not bool(finite.all()):
            raise FedtapError(not_finite(model, start + int((~finite).nonzero()[0, 1])))
        # sum over draws of grad f grad f', whose mean is H with f = (log p, natural)
        second += squares.sum(1)
        first += traces.sum(1)
    second, first = second / many, first / many
    return Quadratic(second[:, 1:, 1:], first[:, 1:] + second[:, 1:, 0], first[:, 0] + 0.5 * second[:, 0, 0])


def not_finite(model: Likelihood, draw: int) -> str:
    """What is said of a divergence that is not finite at draw number `draw` (from 0)."""
    return (
        f"The Hessian or gradient of {model} is not finite at draw {draw + 1}, so that no divergence can be had from "
        "it: leave that draw out, or give a likelihood that can be differentiated twice there."
    )
