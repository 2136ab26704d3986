"""E-processes: against slow oracles, and at an honest hypothesis they stay small."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import norm

from fedtap.simulator.auditing.evidence import Guesses, MeanShift, Scale, against_equal


def scale_of(*groups: tuple[float, float]) -> Scale:
    """With these a and b, and nothing predicted."""
    scale = Scale(len(groups))
    scale.a, scale.b = (np.array(values) for values in zip(*groups, strict=True))
    return scale


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 50), st.floats(0.1, 20), st.floats(0.01, 5)), min_size=1, max_size=3),
    st.floats(0.05, 20),
)
def test_the_likeliest_noise_under_a_limit_is_that_of_a_search(
    groups: list[tuple[float, float, float]], most: float
) -> None:
    a, b, cost = (np.array(values) for values in zip(*groups, strict=True))
    found = -scale_of(*zip(a, b, strict=True)).against_enough(cost, most)

    def loss(log_w: np.ndarray) -> float:
        return -float((a * log_w - b * np.exp(log_w)).sum())

    start = np.log(np.full(len(a), most / cost.sum() / 2))
    limit = {"type": "ineq", "fun": lambda log_w: most - float((cost * np.exp(log_w)).sum())}
    search = minimize(loss, start, method="SLSQP", constraints=[limit], options={"maxiter": 500, "ftol": 1e-12})
    assert found == pytest.approx(-float(search.fun), rel=1e-4, abs=1e-3)


def test_evidence_at_the_limit_of_an_honest_promise_stays_small() -> None:
    """Of 300 sequences of 30 releases of 4 entries, 1 in 20 may pass 20 at any time."""
    draw, passed = np.random.default_rng(0), 0
    for _ in range(300):
        scale, squares, entries = Scale(1), 4.0, 4.0
        for _ in range(30):
            rest = draw.normal(size=4)
            scale.add(np.array([2.0]), np.array([(rest**2).sum() / 2]), np.array([entries / squares]))
            squares, entries = squares + float((rest**2).sum()), entries + 4
            if scale.against_enough(np.array([1.0]), 1.0) >= math.log(20):
                passed += 1
                break
    assert passed <= 15


def test_half_the_noise_is_refuted_and_its_largest_scale_is_bounded() -> None:
    draw, scale = np.random.default_rng(1), Scale(1)
    for _ in range(40):
        rest = 0.5 * draw.normal(size=20)
        scale.add(np.array([10.0]), np.array([(rest**2).sum() / 2]), np.array([3.5]))
    assert scale.against_enough(np.array([1.0]), 1.0) > math.log(1e6)
    assert scale.against_enough(np.array([1.0]), 5.0) < 0
    assert 2.5 < scale.most(0, math.log(100)) < 4  # 1/σ² is 4


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 40), st.floats(0.1, 20), st.floats(1, 40), st.floats(0.1, 20), st.floats(1, 4))
def test_two_scales_within_a_ratio_are_as_likely_as_a_search_finds(
    a: float, b: float, c: float, d: float, ratio: float
) -> None:
    found = -against_equal(scale_of((a, b)), scale_of((c, d)), lambda group: ratio)
    factors = np.exp(np.linspace(-math.log(ratio), math.log(ratio), 2001))
    w = (a + c) / (b + factors * d)
    search = (a * np.log(w) + c * np.log(factors * w) - w * (b + factors * d)).max()
    assert found == pytest.approx(search, abs=1e-4)


def test_guesses_are_bets_on_right_ones() -> None:
    bet = Guesses(0.1)
    for right in (True, True, False, True):
        bet.add(right)
    shares = [0.5, 1.5 / 2, 2.5 / 3, 2.5 / 4]
    product = shares[0] / 0.1 * shares[1] / 0.1 * (1 - shares[2]) / 0.9 * shares[3] / 0.1
    assert bet.log_e == pytest.approx(math.log(product))
    honest, draw = [], np.random.default_rng(2)
    for _ in range(300):
        one, highest = Guesses(0.3), 0.0
        for right in draw.random(100) < 0.3:
            one.add(bool(right))
            highest = max(highest, one.log_e)
        honest.append(highest >= math.log(20))
    assert sum(honest) <= 27  # 15 at most are expected


def test_a_shift_is_found_by_averaging_and_an_honest_one_is_not() -> None:
    draw = np.random.default_rng(3)
    far, near = MeanShift(0.5), MeanShift(1.1)
    for _ in range(1500):
        z, rest = draw.normal() + 1 / math.sqrt(2), float((draw.normal(size=30) ** 2).sum())
        far.add(z, rest, 30)
        near.add(z, rest, 30)
    assert far.log_e() > math.log(1e4)
    assert near.log_e() < 0
    assert 0.7 < far.least(math.log(1000)) < 1


def test_the_shifts_evidence_is_a_ratio_of_likelihoods() -> None:
    shift, values = MeanShift(0.3), [0.4, 1.1, 0.7, 2.0]
    for z in values:
        shift.add(z, 0.5, 2)
    sigmas, shifts = np.meshgrid(np.exp(np.linspace(-3, 2, 4000)), np.linspace(-1, 1, 401))
    shifts = shifts * 0.3 / math.sqrt(2) * sigmas
    logs = sum(norm.logpdf(z, shifts, sigmas) for z in values[1:])
    logs += 3 * (-math.log(2 * math.pi) - 2 * np.log(sigmas) - 0.5 / (2 * sigmas**2))
    predicted, seen, squares = 0.0, [values[0]], 0.5
    for count, z in enumerate(values[1:], start=1):
        mean = sum(seen) / count
        spread = sum((one - mean) ** 2 for one in seen) + squares
        variance = spread / (3 * count - 1)
        if count == 1:
            variance = squares / 2
        predicted += norm.logpdf(z, mean, math.sqrt(variance)) - math.log(2 * math.pi * variance) - 0.25 / variance
        seen, squares = [*seen, z], squares + 0.5
    assert shift.log_e() == pytest.approx(predicted - float(logs.max()), abs=2e-2)
