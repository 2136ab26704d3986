"""The Bayesian client: it sends draws of its posterior, or its mean and covariance, in the place of weights.

Linear regression with unknown σ is drawn exactly: β given σ is normal, and σ² is inverse gamma but for its prior, which
a rejection accounts for (more than half of the proposals stay). Any other likelihood is drawn by Hamiltonian Monte
Carlo (Neal 2011, https://arxiv.org/abs/1206.1901), many chains at once, in the coordinates of Laplace's approximation
at a mode, where all of them start; a network's other modes are not visited.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value, hessian, vmap

from fedtap.simulator.attack import generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.likelihoods import Likelihood, LinearRegression

SAMPLERS = ("exact", "hmc", "laplace")
"""Exact draws of a linear regression; Hamiltonian Monte Carlo; or mean and covariance, after Laplace."""

CHAINS, WARM_UP_DRAWS, LEAPS, ACCEPTED = 64, 150, 8, 0.8
"""Chains at once, their steps before any is kept, leapfrogs a step, and the share accepted that its size aims at."""

Records = Float[Tensor, "records columns"]
Draws = Float[Tensor, "draws d"]


def posterior_reply(
    message: Message, client: int, model: Likelihood, records: Records, sampler: str, draws: int, seed: int
) -> Message:
    """The reply to `train.posterior`.

    Raises:
        FedtapError: the records are too few or too alike for a posterior, or the sampler is not for this model.
    """
    if sampler == "laplace":
        mean, covariance = laplace_approximation(model, records, seed)
        return posterior(message, client, {"mean": mean, "covariance": covariance})
    if sampler == "hmc":
        return posterior(message, client, {"draws": hmc(model, records, draws, seed, client)})
    if not isinstance(model, LinearRegression):
        raise FedtapError(f"There is no exact sampler of {model}'s posterior: use --sampler hmc, or laplace.")
    return posterior(message, client, {"draws": exact(model, records, draws, seed, client)})


def posterior(message: Message, client: int, tensors: dict[str, Tensor]) -> Message:
    """The reply with these tensors; it does not hold the number of records."""
    content = RecordDict({"posterior": ArrayRecord(tensors), "metrics": MetricRecord({"partition": client})})
    return Message(content, reply_to=message)


def exact(model: LinearRegression, records: Records, draws: int, seed: int = 0, client: int = 0) -> Draws:
    """Independent draws of (β, σ) given the records, β flat and σ under the model's prior.

    p(σ | data) ∝ p(σ) σ^−(n−k) exp(−RSS / 2σ²), so that σ² is inverse gamma under a prior 1 or σ^−2; Half-Cauchy's
    density is s²/(s²+σ²) times the one and σ²/(s²+σ²) times the other, up to constants: the better of both proposes.

    Raises:
        FedtapError: fewer records than parameters, dependent inputs, or outputs that the inputs give without an error.
    """
    psi, y = model.features(records[:, :-1]), records[:, -1]
    many, k = psi.shape
    if many < k + 2:
        raise FedtapError(
            f"{many} records give no posterior of {k + 1} parameters under a flat prior: a client needs {k + 2} at "
            "least, so give it more, or use fewer clients."
        )
    scale = psi.norm(dim=0)
    q, r = torch.linalg.qr(psi / scale)
    if bool((r.diagonal().abs() < 1e-11 * r.diagonal().abs().max()).any()):
        which = model.parameters[int((r.diagonal().abs() / scale.clamp_min(1e-300)).argmin())]
        raise FedtapError(
            f"The inputs of the regression are dependent ({which} adds nothing to those before it), so that its "
            "posterior is improper: leave out an input of --x."
        )
    beta = torch.linalg.solve_triangular(r, (q.T @ y)[:, None], upper=True)[:, 0]
    rest = float((y - psi / scale @ beta).square().sum())
    if not rest > 1e-24 * float(y.square().sum()):
        raise FedtapError(
            "The outputs follow from the inputs without an error, so that σ has no posterior: give other data."
        )
    noise = np.random.default_rng(generator(seed, "posterior", client).initial_seed())
    s2 = model.sigma.scale**2
    wide = rest / (many - k) > s2  # σ is beyond the prior's scale, where Half-Cauchy is nearly σ^−2
    shape = (many - k + (1 if wide else -1)) / 2
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < draws:
        variance = 0.5 * rest / noise.gamma(shape, size=2 * draws + 16)
        chance = variance / (s2 + variance) if wide else 1 / (1 + variance / s2)
        kept.append(variance[noise.random(len(variance)) < chance])
    sigma = torch.from_numpy(np.sqrt(np.concatenate(kept)[:draws]))
    normal = torch.from_numpy(noise.standard_normal((k, draws)))
    deviation = torch.linalg.solve_triangular(r, normal, upper=True) * sigma
    return torch.cat([((beta[:, None] + deviation) / scale[:, None]).T, sigma[:, None]], dim=1)


def laplace_approximation(
    model: Likelihood, records: Records, seed: int = 0
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """A mode of the posterior, and the inverse of the negative log-posterior's Hessian there.

    Raises:
        FedtapError: no mode was found, or the Hessian is not positive definite there.
    """
    theta = _start(model, records, seed).requires_grad_()
    descent = torch.optim.LBFGS([theta], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def energy() -> Tensor:
        descent.zero_grad()
        loss = -_log_posterior(model, theta, records)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    descent.step(energy)  # type: ignore[no-untyped-call]
    mode = theta.detach()
    bent = -hessian(lambda at: _log_posterior(model, at, records))(mode)
    factor, failed = torch.linalg.cholesky_ex(bent)
    if bool(failed) or not bool(bent.isfinite().all()):
        raise FedtapError(
            f"The log-posterior of {model} has no definite curvature where its descent ended, so that Laplace's "
            "approximation is none: give more records, or another --sampler."
        )
    return mode, torch.cholesky_inverse(factor)


def hmc(model: Likelihood, records: Records, draws: int, seed: int = 0, client: int = 0) -> Draws:
    """Draws of the posterior, those of each chain in a row.

    Raises:
        FedtapError: as `laplace` does.
    """
    mean, covariance = laplace_approximation(model, records, seed)
    factor = torch.linalg.cholesky(covariance)
    noise = generator(seed, "hmc", client)
    chains = min(CHAINS, draws)

    def log_posterior(phi: Tensor) -> Tensor:
        return _log_posterior(model, mean + factor @ phi, records)

    value_and_gradient = vmap(grad_and_value(log_posterior))
    phi = torch.zeros(chains, len(mean), dtype=mean.dtype)
    gradient, value = value_and_gradient(phi)
    size, kept = 0.5, []
    for step in range(WARM_UP_DRAWS + -(-draws // chains)):
        momentum = torch.randn(phi.shape, generator=noise, dtype=phi.dtype)
        there, p, turned, height = phi, momentum, gradient, value
        for _ in range(LEAPS):
            p = p + 0.5 * size * turned
            there = there + size * p
            turned, height = value_and_gradient(there)
            p = p + 0.5 * size * turned
        gain = height - value + 0.5 * (momentum.square().sum(1) - p.square().sum(1))
        taken = torch.rand(chains, generator=noise).log() < gain  # NaN, as at σ < 0, is not taken
        phi, gradient = torch.where(taken[:, None], there, phi), torch.where(taken[:, None], turned, gradient)
        value = torch.where(taken, height, value)
        if step < WARM_UP_DRAWS:
            size *= math.exp(0.1 * (float(taken.float().mean()) - ACCEPTED))
        else:
            kept.append(phi)
    every = torch.stack(kept, dim=1).flatten(0, 1)[:draws]
    return mean + every @ factor.T  # type: ignore[no-any-return]


def _log_posterior(model: Likelihood, theta: Float[Tensor, "d"], records: Records) -> Float[Tensor, ""]:
    logs = vmap(model.log_likelihood, (None, 0))(theta, records)
    return torch.stack([logs.sum(), model.log_prior(theta)]).sum()


def _start(model: Likelihood, records: Records, seed: int) -> Float[Tensor, "d"]:
    """Least squares, or a network of small weights."""
    if not isinstance(model, LinearRegression):
        draw = generator(seed, "mode")
        return 0.5 * torch.randn(len(model.parameters), generator=draw, dtype=records.dtype)
    psi, y = model.features(records[:, :-1]), records[:, -1:]
    beta = torch.linalg.lstsq(psi, y).solution
    return torch.cat([beta[:, 0], (y - psi @ beta).std()[None].clamp_min(1e-12)])
