"""What theory allows: closed forms against accountants and integrals, bounds against the games they bound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.integrate import quad
from scipy.stats import norm

from fedtap.simulator.defences.accountant import ADJACENCIES, Gaussian, flower_local_dp, mechanism_of, noise_for
from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.defences.dp_sgd import DPSGD
from fedtap.simulator.defences.gaussian import bound, delta_of, epsilon_of
from fedtap.simulator.defences.laplace import Laplace
from fedtap.simulator.defences.local_dp import LocalDP
from fedtap.simulator.defences.noise import Noise
from fedtap.simulator.defences.prune import Prune
from fedtap.simulator.defences.sign import Sign
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import tensors_of

DISTANCES = st.floats(0.05, 30)
DELTAS = st.floats(1e-12, 0.1)
KAPPAS = st.floats(1e-6, 1)


def client(sigma: float, clip: float = 1.0, **more: Any) -> Gaussian:
    return Gaussian(sigma, clip, protects="client", adjacency="add/remove", **more)


def composed(accountant: Any, sigma: float, rate: float = 1.0, releases: int = 1) -> Any:
    accountant.history = [(sigma, rate, releases)]
    return accountant


@given(DISTANCES, st.floats(1.01, 3), DELTAS)
def test_more_noise_and_a_larger_delta_give_a_smaller_epsilon(distance: float, factor: float, delta: float) -> None:
    assert epsilon_of(distance / factor, delta) <= epsilon_of(distance, delta)
    assert epsilon_of(distance, min(delta * factor, 0.99)) <= epsilon_of(distance, delta)


@given(st.floats(0.05, 100), DELTAS, st.floats(1e-3, 1e3))
def test_noise_for_an_epsilon_gives_that_epsilon(epsilon: float, delta: float, sensitivity: float) -> None:
    sigma = noise_for(epsilon, delta, sensitivity)
    assert epsilon_of(sensitivity / sigma, delta) == pytest.approx(epsilon, rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(st.floats(0.05, 6), st.floats(0, 20))
def test_delta_is_the_integral_that_defines_it(distance: float, epsilon: float) -> None:
    # ∫ max(0, ν - e^ε μ), where ν > e^ε μ: to the right of ε/d + d/2
    low = epsilon / distance + distance / 2
    integral, _ = quad(lambda x: norm.pdf(x - distance) - math.exp(epsilon) * norm.pdf(x), low, low + 40, limit=200)
    assert delta_of(distance, epsilon) == pytest.approx(integral, rel=1e-4, abs=1e-9)


@settings(max_examples=12, deadline=None)
@given(st.floats(0.5, 5), st.integers(1, 4), st.sampled_from([1e-6, 1e-5, 1e-3]))
def test_the_closed_form_agrees_with_opacus(sigma: float, releases: int, delta: float) -> None:
    exact = client(sigma, releases=releases).guarantee(delta).epsilon
    assert exact - 1e-3 <= composed(PRVAccountant(), sigma, 1 - 1e-9, releases).get_epsilon(delta) <= exact + 0.02
    assert exact <= composed(RDPAccountant(), sigma, 1.0, releases).get_epsilon(delta) + 1e-9


def test_sampling_is_opacus_s_and_helps() -> None:
    sampled = client(1.0, clip=2.0, releases=100, rate=0.01).guarantee(1e-5)
    assert sampled.epsilon == composed(PRVAccountant(), 0.5, 0.01, 100).get_epsilon(1e-5)
    assert sampled.epsilon < client(1.0, clip=2.0, releases=100).guarantee(1e-5).epsilon


@pytest.mark.parametrize("mechanism", [client(1.0, clip=math.inf), client(0.0), client(0.0, clip=math.inf)])
def test_without_noise_or_clip_there_is_no_guarantee(mechanism: Gaussian) -> None:
    assert mechanism.guarantee(1e-5).epsilon == math.inf
    assert mechanism.bound(0.1) == mechanism.renyi_bound(0.1) == 1.0


def test_a_guarantee_says_of_whom_and_against_what() -> None:
    said = str(Gaussian(2.0, 1.0, protects="client", adjacency="replace").guarantee(1e-5))
    assert said == "ε = 4.377 at δ = 1e-05 for a client (replace, sensitivity 2)"
    assert (
        str(Gaussian(2.0, math.inf, protects="example", adjacency="add/remove").guarantee(1e-5))
        == "ε = ∞ at δ = 1e-05 for an example (add/remove, no clip)"
    )


@given(DISTANCES, st.floats(1.01, 3), KAPPAS)
def test_bounds_lie_between_the_blind_guess_and_certainty(distance: float, factor: float, kappa: float) -> None:
    mechanism = client(1 / distance)
    bound = mechanism.bound(kappa)
    assert kappa <= bound + 1e-12 <= mechanism.renyi_bound(kappa) + 2e-12 <= 1 + 3e-12
    assert client(factor / distance).bound(kappa) <= bound
    assert mechanism.bound(kappa / factor) <= bound


def test_the_renyi_bound_is_its_minimum_over_orders() -> None:
    orders = np.linspace(1.0001, 200, 400_000)
    for sigma, kappa in ((0.7, 0.1), (3.0, 0.5), (1.0, 1e-4)):
        over = np.exp((1 - 1 / orders) * (math.log(kappa) + orders / (2 * sigma**2)))
        assert client(sigma).renyi_bound(kappa) == pytest.approx(min(1.0, over.min()), rel=1e-4)


@pytest.mark.parametrize(("sigma", "kappa"), [(1.0, 0.1), (0.6, 0.5), (4.0, 0.02)])
def test_monte_carlo_meets_the_closed_form_from_above(sigma: float, kappa: float) -> None:
    exact = client(sigma, releases=3).bound(kappa)
    drawn = client(sigma, releases=3, rate=1 - 1e-9).bound(kappa)
    assert exact <= drawn <= exact + 0.03


def test_the_monte_carlo_bound_lies_under_the_renyi_bound_and_sampling_lowers_it() -> None:
    sigma, rate, releases, kappa = 1.0, 0.05, 50, 0.1
    sampled = client(sigma, releases=releases, rate=rate).bound(kappa)
    orders = [1 + number / 10 for number in range(1, 300)]
    renyi = compute_rdp(q=rate, noise_multiplier=sigma, steps=releases, orders=orders)
    over = min((kappa * math.exp(spent)) ** (1 - 1 / order) for order, spent in zip(orders, renyi, strict=True))
    assert kappa < sampled < over
    assert sampled < client(sigma, releases=releases).bound(kappa)


@settings(max_examples=20, deadline=None)
@given(DISTANCES.filter(lambda distance: distance < 4), st.integers(2, 6), st.integers(0, 99))
def test_no_prior_of_equal_candidates_lets_any_attacker_pass_the_bound(distance: float, many: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    candidates = random.standard_normal((many, 4))
    candidates *= random.random((many, 1)) ** 0.2 / np.linalg.norm(candidates, axis=1, keepdims=True)
    truth = random.integers(many, size=4000)
    seen = distance * candidates[truth] + random.standard_normal((4000, 4))
    guess = (distance * seen @ candidates.T - (distance * np.linalg.norm(candidates, axis=1)) ** 2 / 2).argmax(1)
    spread = 5 * 0.5 / math.sqrt(4000)
    assert (guess == truth).mean() <= bound(distance, 1 / many) + spread


@pytest.mark.parametrize(("sigma", "rate", "releases"), [(0.7, 0.2, 10), (1.5, 0.5, 30), (0.5, 0.05, 20)])
def test_the_likeliest_of_two_opposite_canaries_stays_under_the_monte_carlo_bound(
    sigma: float, rate: float, releases: int
) -> None:
    random, games = np.random.default_rng(0), 20_000
    truth = random.choice([-1.0, 1.0], (games, 1))
    heard = truth / sigma * (random.random((games, releases)) < rate) + random.standard_normal((games, releases))
    plus, minus = (np.log1p(rate * np.expm1(side * heard / sigma - 0.5 / sigma**2)).sum(1) for side in (1, -1))
    success = (np.where(plus > minus, 1.0, -1.0) == truth[:, 0]).mean()
    bound = client(sigma, releases=releases, rate=rate).bound(0.5)
    assert 0.55 < success <= bound + 4 * 0.5 / math.sqrt(games)
    assert success > 0.9 * bound


def test_flowers_local_dp_adds_the_noise_that_is_said() -> None:
    app, size = ClientApp(mods=[LocalDpMod(2.0, 1.5, 10.0, 1e-5)]), 20_000

    @app.train()
    def train(order: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord({"a": torch.ones(size)})}), reply_to=order)

    grid = LocalGrid(app, 1)
    np.random.seed(0)  # what the mod draws from
    content = RecordDict({"arrays": ArrayRecord({"a": torch.zeros(size)})})
    (answer,) = grid.send_and_receive([Message(content, next(iter(grid.get_node_ids())), "train")])
    noise = tensors_of(answer.content.array_records["arrays"])["a"] - 2.0 / math.sqrt(size)  # 2: the update's norm
    assert float(noise.std()) == pytest.approx(flower_local_dp(2.0, 1.5, 10.0, 1e-5, "replace").sigma, rel=0.02)


def test_flowers_local_dp_under_noises_where_epsilon_is_large_or_the_sensitivity_too_small() -> None:
    def real(sensitivity: float, epsilon: float, adjacency: str) -> float:
        return flower_local_dp(1.0, sensitivity, epsilon, 1e-5, adjacency).guarantee(1e-5).epsilon

    assert real(1.0, 1.0, "add/remove") < 1
    assert real(1.0, 10.0, "add/remove") > 10.3
    assert real(1.0, 1.0, "replace") > 1.6
    assert real(0.01, 1.0, "add/remove") > 100
    assert real(0.0, 1.0, "add/remove") == math.inf


CLIP, NOISE, SIGN, PRUNE = Clip(2.0), Noise(0.5), Sign(), Prune(0.1)


@pytest.mark.parametrize(
    ("parts", "sigma", "clip"),
    [
        ([], 0.0, math.inf),
        ([CLIP], 0.0, 2.0),
        ([NOISE], 0.5, math.inf),
        ([CLIP, NOISE], 0.5, 2.0),
        ([NOISE, CLIP], 0.5, math.inf),
        ([CLIP, PRUNE, NOISE, SIGN], 0.5, 2.0),
        ([CLIP, SIGN, NOISE], 0.5, math.inf),
        ([CLIP, Clip(3.0), NOISE], 0.5, 2.0),
        ([SIGN, CLIP, NOISE, NOISE], 0.5, 2.0),
        ([LocalDP(3.0, 1.0, 2.0, 1e-5)], 1.2112013156513473 * 2, 3.0),
    ],
)
def test_a_chain_of_defences_is_worth_its_clip_and_its_noise(parts: list[Defence], sigma: float, clip: float) -> None:
    found = mechanism_of(parts, "add/remove", releases=3)
    assert found == Gaussian(found.sigma, clip, "client", "add/remove", 3)
    assert found.sigma == pytest.approx(sigma)
    assert (found.guarantee(1e-5).epsilon < math.inf) == (sigma > 0 and clip < math.inf)


def test_dp_sgd_protects_an_example_in_every_step() -> None:
    for adjacency in ADJACENCIES:  # of clients: examples are replaced, since their number is public
        found = mechanism_of([DPSGD(2.0, 1.5), CLIP, NOISE], adjacency, releases=3, steps=4)
        assert found == Gaussian(3.0, 2.0, "example", "replace", releases=12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: client(1.0).guarantee(1.0), "δ is a probability"),
        (lambda: client(1.0).guarantee(0.0), "δ is a probability"),
        (lambda: client(1.0).guarantee(math.nan), "δ is a probability"),
        (lambda: client(-1.0), "Noise of standard deviation -1"),
        (lambda: client(math.inf), "Noise of standard deviation inf"),
        (lambda: client(1.0, clip=0.0), "A clip to norm 0"),
        (lambda: client(1.0, clip=math.nan), "A clip to norm nan"),
        (lambda: client(1.0, releases=0), "0 releases"),
        (lambda: client(1.0, rate=0.0), "sampling rate of 0"),
        (lambda: client(1.0, rate=0.5, sampling="shuffled"), "covers Poisson sampling, and shuffled"),
        (lambda: Gaussian(1.0, 1.0, "client", "replace", rate=0.5), "covers Poisson sampling for add/remove alone"),
        (lambda: Gaussian(1.0, 1.0, "batch", "replace"), "no unit of privacy named 'batch'"),
        (lambda: Gaussian(1.0, 1.0, "client", "swap"), "no adjacency named 'swap'"),
        (lambda: client(1.0, rate=0.5, sampling="epochs"), "no sampling named 'epochs'"),
        (lambda: client(1.0).bound(0.0), "κ is the chance of a blind guess"),
        (lambda: client(1.0, rate=0.5).renyi_bound(0.1), "does not cover sampling"),
        (lambda: mechanism_of([CLIP, Laplace(1.0)], "replace"), "No ε is known here for Laplace"),
        (lambda: noise_for(0.0, 1e-5, 1.0), "an ε of 0"),
        (lambda: noise_for(1.0, 1.5, 1.0), "δ is a probability"),
        (lambda: noise_for(1.0, 1e-5, 0.0), "a sensitivity of 0"),
        (lambda: flower_local_dp(1.0, 1.0, 0.0, 1e-5, "replace"), "an ε of 0"),
        (lambda: flower_local_dp(0.0, 1.0, 1.0, 1e-5, "replace"), "A clip to norm 0"),
        (lambda: flower_local_dp(1.0, -1.0, 1.0, 1e-5, "replace"), "A sensitivity of -1"),
    ],
)
def test_what_no_theory_covers_is_refused(make: Any, said: str) -> None:
    with pytest.raises(FedtapError, match=said) as caught:
        make()
    assert str(caught.value).endswith(".")


def test_adjacency_sets_the_sensitivity() -> None:
    assert {name: Gaussian(1.0, 3.0, "client", name).sensitivity for name in ADJACENCIES} == {
        "add/remove": 3.0,
        "replace": 6.0,
    }
