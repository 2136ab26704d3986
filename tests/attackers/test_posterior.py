"""Reconstruction from posteriors: estimators against closed forms, optimisers against oracles, samplers, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fedtap.attackers.posteriors.fisher import ESTIMATORS, coordinates, directions, divergence, reduced
from fedtap.attackers.posteriors.posterior_mmd import PosteriorMMD, Units
from fedtap.clients.bayesian import exact, hmc, laplace_approximation
from fedtap.scenarios.posteriors.posterior import Posterior
from fedtap.scenarios.posteriors.scoring import all_of, apart, sums_in, sums_of
from fedtap.simulator.attack import PseudoData
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import PosteriorLeak, Protocol
from fedtap.simulator.models.likelihoods import BayesianNetwork, Likelihood, LinearRegression, Prior

MODELS = (LinearRegression(1, 1, Prior(2.5)), LinearRegression(3), LinearRegression(1, 3, Prior(0.5)))


def records(many: int = 300, inputs: int = 1, seed: int = 0) -> Tensor:
    """Inputs around 10, and an output of all of them with noise of 3."""
    draw = torch.Generator().manual_seed(seed)
    x = 10 + 2 * torch.randn(many, inputs, generator=draw).double()
    y = 4 + x.sum(1, keepdim=True) * 1.5 + 3 * torch.randn(many, 1, generator=draw).double()
    return torch.cat([x, y], dim=1)


def leak_of(model: Likelihood, observed: dict[str, Tensor], clients: list[int] | None = None) -> PosteriorLeak:
    names = torch.tensor(clients or list(range(len(next(iter(observed.values()))))))
    words = str(model.sigma) if isinstance(model, LinearRegression) else "normal(1)"
    return PosteriorLeak(
        observed=observed,
        protocol=Protocol(model=str(model), shape=(model.inputs,), classes=1, batch=1, prior=words),
        network=model.network(),
        weights=None,
        buffers={},
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
    )


def leaked(victims: int = 1, draws: int = 4000, model: LinearRegression = MODELS[0]) -> PosteriorLeak:
    """Posteriors of clients with records of their own."""
    each = [exact(model, records(200 + 50 * v, model.inputs, seed=v), draws, seed=v) for v in range(victims)]
    return leak_of(model, {"draws": torch.stack(each)})


def pseudo(model: Likelihood, seed: int = 0, victims: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(victims, 7, model.columns, generator=draw).double()
    return torch.rand(victims, 7, generator=draw).double() + 0.1, points


def posterior_like(model: Likelihood, seed: int = 0, victims: int = 2, draws: int = 40) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    theta = 0.3 * torch.randn(victims, draws, len(model.parameters), generator=draw).double()
    theta[..., [*model.positive]] = 1.5 + theta[..., [*model.positive]].tanh()
    return theta


def by_hand(model: LinearRegression, theta: Tensor, weights: Tensor, points: Tensor) -> Tensor:
    """J of one victim in raw θ: the equations as one writes them, draw by draw and point by point."""
    total = torch.tensor(0.0).double()
    for one in theta:
        beta, sigma = one[:-1], one[-1]
        s = model.sigma.scale
        slope = torch.cat([torch.zeros_like(beta), (-2 * sigma / (s**2 + sigma**2))[None]])
        trace = -2 * (s**2 - sigma**2) / (s**2 + sigma**2) ** 2
        if math.isinf(s):
            slope, trace = torch.zeros_like(one), torch.tensor(0.0).double()
        for weight, point in zip(weights, points, strict=True):
            psi = torch.cat([torch.ones(1).double(), *(point[:-1] ** power for power in range(1, model.degree + 1))])
            r = point[-1] - psi @ beta
            slope = slope + weight * torch.cat([r * psi / sigma**2, (-1 / sigma + r**2 / sigma**3)[None]])
            trace = trace + weight * (-(psi @ psi) / sigma**2 + 1 / sigma**2 - 3 * r**2 / sigma**4)
        total = total + trace + 0.5 * slope @ slope
    return total / len(theta)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_divergence_is_the_closed_form(model: LinearRegression) -> None:
    theta, (weights, points) = posterior_like(model), pseudo(model)
    raw = coordinates(theta, model.parameters, whiten=False)
    found = divergence(model, raw, raw.inside(theta), weights, points, "exact", torch.zeros_like(theta))
    wanted = [by_hand(model, *one) for one in zip(theta, weights, points, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_quadratic_in_the_statistics_is_the_divergence(model: LinearRegression, estimator: str) -> None:
    theta, (weights, points) = posterior_like(model), pseudo(model)
    where = coordinates(theta, model.parameters)
    phi = where.inside(theta)
    noise = directions(phi, estimator, torch.Generator().manual_seed(1))
    sums = (weights[..., None] * model.statistics(points)).sum(1)
    found = reduced(model, where, phi, estimator, noise)(sums)
    torch.testing.assert_close(found, divergence(model, where, phi, weights, points, estimator, noise))


def test_whitening_is_a_change_of_coordinates() -> None:
    theta = posterior_like(MODELS[1], draws=500)
    where = coordinates(theta, MODELS[1].parameters)
    phi = where.inside(theta)
    torch.testing.assert_close(where.mean[:, None] + phi @ where.factor.mT, theta)
    for one in phi:
        torch.testing.assert_close(torch.cov(one.T), torch.eye(5).double(), atol=1e-8, rtol=0)


def test_slices_and_noise_estimate_the_trace() -> None:
    model = MODELS[0]
    leak = leaked(draws=10_000)
    exact_one = PosteriorMMD().quadratic(leak).minimum()
    for estimator in ("sliced", "denoising"):
        other = PosteriorMMD(estimator=estimator).quadratic(leak).minimum()
        assert not torch.equal(other, exact_one)
        torch.testing.assert_close(other, exact_one, rtol=0.05, atol=0)
    assert len(model.monomials) == 6


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_an_exponential_family_says_the_same_twice(inputs: int, degree: int, seed: int) -> None:
    model = LinearRegression(inputs, degree if inputs == 1 else 1)
    theta, (_, points) = posterior_like(model, seed, 1, 3)[0], pseudo(model, seed, 1)
    for one in theta:
        direct = torch.stack([model.log_likelihood(one, point) for point in points[0]])
        torch.testing.assert_close(model.statistics(points[0]) @ model.natural(one), direct)
    columns = 1 + inputs * model.degree + 1
    assert len(model.monomials) == (columns * (columns + 1) // 2 if model.degree == 1 else 3 * model.degree + 3)


def statistics(guess: PseudoData) -> dict[str, Tensor]:
    return Posterior().statistics(sums_of(*all_of(guess)), LinearRegression(guess.points.shape[-1]))


@pytest.mark.parametrize("points", [50, 200, 800])
def test_the_optimiser_reaches_the_oracle(points: int) -> None:
    leak, attack = leaked(2), PosteriorMMD(points)
    oracle = Posterior().statistics(sums_in(MODELS[0], attack.quadratic(leak).minimum()), MODELS[0])
    found = statistics(attack(leak))
    for name, value in oracle.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)


def test_adam_reaches_it_slowly_and_not_at_all_in_raw_parameters() -> None:
    leak = leak_of(MODELS[0], {"draws": exact(MODELS[0], Posterior().made(), 2000)[None]})
    off = {}
    for whiten in (True, False):
        attack = PosteriorMMD(50, whiten=whiten, optimiser="adam", iterations=800, step_size=0.05)
        oracle = Posterior().statistics(sums_in(MODELS[0], attack.quadratic(leak).minimum()), MODELS[0])
        off[whiten] = float((statistics(attack(leak))["var_x"] / oracle["var_x"] - 1).abs())
    assert off[True] < 0.05
    assert off[False] > 0.5


def test_a_client_s_statistics_come_back_and_a_stranger_s_do_not() -> None:
    guess = statistics(PosteriorMMD()(leaked(2, 20_000)))
    for victim, many in enumerate((200, 250)):
        own = Posterior().statistics(sums_of(torch.ones(1, many).double(), records(many, seed=victim)[None]), MODELS[0])
        close = {"sum_w": 0.05, "mean_x": 0.01, "mean_y": 0.01, "var_x": 0.06, "var_y": 0.05}
        for name, off in close.items():
            assert abs(float(guess[name][victim] / own[name][0]) - 1) < off, name
        assert abs(float(guess["sum_w"][1 - victim] / many) - 1) > 0.1


def test_a_stack_is_attacked_as_each_of_it_alone() -> None:
    leak, attack = leaked(3), PosteriorMMD(30)
    together = attack(leak)
    for victim in range(3):
        alone = attack(leak[victim])
        torch.testing.assert_close(together.points[victim], alone.points[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.objective[victim], alone.objective[0])
    before = leak.observed["draws"].clone()
    assert torch.equal(attack(leak).points, together.points)
    assert torch.equal(leak.observed["draws"], before)


def test_two_guesses_of_equal_divergence_lie_far_apart() -> None:
    leak, attack = leaked(), PosteriorMMD(60)
    start = attack.begin(leak, 0)
    one, other = attack(leak, start=start), attack(leak, start=Posterior().elsewhere(start))
    torch.testing.assert_close(one.objective, other.objective, rtol=1e-8, atol=0)
    assert apart(one, other)[0] > 0.5
    assert apart(one, one)[0] < 1e-6


def test_the_objective_is_that_of_the_guess() -> None:
    leak, attack = leaked(draws=300), PosteriorMMD(20, iterations=3)
    guess = attack(leak)
    where = coordinates(leak.observed["draws"], MODELS[0].parameters)
    phi = where.inside(leak.observed["draws"])
    wanted = divergence(MODELS[0], where, phi, *all_of(guess), "exact", torch.zeros_like(phi))
    torch.testing.assert_close(guess.objective, wanted)


def test_mean_and_covariance_serve_as_well_as_draws() -> None:
    mean, covariance = laplace_approximation(MODELS[0], records(400))
    leak = leak_of(MODELS[0], {"mean": mean[None], "covariance": covariance[None]})
    found = statistics(PosteriorMMD()(leak))
    assert float(found["sum_w"]) == pytest.approx(400, rel=0.03)
    assert float(found["var_x"]) == pytest.approx(float(records(400)[:, 0].var(correction=0)), rel=0.03)


def test_a_mode_that_is_none_has_no_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.clients.bayesian.hessian", lambda function: lambda at: torch.eye(len(at)).to(at))
    with pytest.raises(FedtapError, match="no definite curvature"):
        laplace_approximation(MODELS[0], records(400))


@pytest.mark.parametrize(
    "wrong", [{"inputs": 0}, {"hidden": 0}, {"hidden": 10**9}, {"noise": 0.0}, {"noise": math.nan}, {"noise": math.inf}]
)
def test_a_network_that_cannot_be_sampled_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(FedtapError, match="no network that can be sampled"):
        BayesianNetwork(**wrong)  # type: ignore[arg-type]


def test_a_networks_posterior_is_attacked_by_its_likelihood_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.clients.bayesian.WARM_UP_DRAWS", 20)
    model = BayesianNetwork(1, 2, 0.3)
    x = torch.linspace(-1, 1, 30).double()
    data = torch.stack([x, (2 * x).tanh()], dim=1)
    leak = leak_of(model, {"draws": hmc(model, data, 200)[None]})
    attack = PosteriorMMD(10, iterations=25, step_size=0.1, batch=16)
    course = [objective for *_, objective in attack.path(leak, attack.begin(leak, 0))]
    assert float(course[-1]) < float(course[0]) - 1
    where = coordinates(leak.observed["draws"], model.parameters)
    phi = where.inside(leak.observed["draws"])[:, :3]
    weights, points = pseudo(model, victims=1)
    found = divergence(model, where, phi, weights, points, "exact", phi)
    plain = []
    for one in phi[0]:

        def energy(phi: Tensor) -> Tensor:
            theta = where.mean[0] + where.factor[0] @ phi
            logs = torch.stack([model.log_likelihood(theta, point) for point in points[0]])
            return model.log_prior(theta) + weights[0] @ logs

        slope = torch.autograd.functional.jacobian(energy, one)
        plain.append(torch.autograd.functional.hessian(energy, one).trace() + 0.5 * slope @ slope)
    torch.testing.assert_close(found[0], torch.stack(plain).mean())


def test_batches_of_draws_do_not_depend_on_neighbours() -> None:
    model = BayesianNetwork(1, 2, 0.3)
    leak = leak_of(model, {"draws": torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0)).double()})
    attack = PosteriorMMD(pseudo=4, iterations=5, batch=8)
    together = attack(leak)
    for victim in range(2):
        torch.testing.assert_close(attack(leak[victim]).points[0], together.points[victim], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.5, 3.0, 40.0, math.inf])
def test_exact_draws_have_the_posterior_s_distribution(scale: float) -> None:
    """σ against its density, integrated on a grid; β against its mean and covariance; of few records."""
    data, model = records(12), LinearRegression(1, 1, Prior(scale))
    drawn = exact(model, data, 20_000).numpy()
    psi = np.stack([np.ones(12), data[:, 0].numpy()], axis=1)
    beta, (rest,), *_ = np.linalg.lstsq(psi, data[:, 1].numpy(), rcond=None)
    grid = np.linspace(1e-3, 60, 60_000)
    logs = -(12 - 2) * np.log(grid) - rest / (2 * grid**2) - np.log1p((grid / scale) ** 2)
    mass = np.cumsum(np.exp(logs - logs.max()))
    assert stats.kstest(drawn[:, 2], lambda s: np.interp(s, grid, mass / mass[-1])).pvalue > 1e-3
    whitened = (drawn[:, :2] - beta) @ np.linalg.cholesky(psi.T @ psi) / drawn[:, 2:]
    for column in whitened.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3


def test_hamiltonian_draws_are_those_of_the_exact_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.clients.bayesian.WARM_UP_DRAWS", 50)
    model, data = MODELS[0], records(60)
    one, other = exact(model, data, 20_000), hmc(model, data, 2000)
    spread = one.std(0)
    assert float(((one.mean(0) - other.mean(0)) / spread).abs().max()) < 0.1
    assert float((other.std(0) / spread - 1).abs().max()) < 0.1


def test_units_are_where_the_data_are() -> None:
    units = Units.of(MODELS[0], exact(MODELS[0], records(500), 5000)[None])
    data = records(500)
    torch.testing.assert_close(units.centre[0], data.mean(0), rtol=0.02, atol=0)
    torch.testing.assert_close(units.scale[0], data.std(0), rtol=0.05, atol=0)
