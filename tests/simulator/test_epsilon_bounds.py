"""Lower bounds on ε: against a public implementation's numbers, closed forms of two Gaussians, and their confidence."""

from __future__ import annotations

import numpy as np
import pytest

from fedtap.simulator.auditing.epsilon_bounds import (
    UNBOUNDED,
    distance_of_scores,
    epsilon_of_distance,
    of_f_dp_one_run,
    of_gaussian_one_run,
    of_gaussian_trials,
    of_one_run,
    of_split_trials,
    of_trials,
)
from fedtap.simulator.defences.gaussian import epsilon_of

DELTA = 1e-5

JAX_PRIVACY = [
    (1000, 289, 75, 1.0309484977535488, 1.1289451045917893, 1.7302908139150526),
    (300, 248, 3, 3.2926062526341093, 3.4500984918510724, 6.348209507728155),
    (5000, 1224, 797, 0.3158283602780789, 0.352037877085822, 0.5028223007800267),
    (2000, 1994, 2, 5.618155007734594, 5.710267030948488, 10.270039368048732),
]
"""Canaries that were in, of which so many were seen, as were so many of as many that were out; and jax_privacy 2.0.0's
`CanaryScoreAuditor` with `Explicit` thresholds at significance 0.05, its root finding at a tolerance of 1e-12."""


@pytest.mark.parametrize(("canaries", "seen", "wrong", "trials", "one_run", "f_dp"), JAX_PRIVACY)
def test_the_bounds_are_a_public_implementations(
    canaries: int, seen: int, wrong: int, trials: float, one_run: float, f_dp: float
) -> None:
    present, absent = ([1.0] * some + [0.0] * (canaries - some) for some in (seen, wrong))
    assert of_trials(present, absent, 0.5, 0.05, DELTA) == pytest.approx(trials, abs=1e-6)
    assert of_one_run(2 * canaries, seen + wrong, seen, 0.05, DELTA) == pytest.approx(one_run, abs=1e-6)
    assert of_f_dp_one_run(2 * canaries, seen + wrong, seen, 0.05, DELTA) == pytest.approx(f_dp, abs=1e-6)


@pytest.mark.parametrize("distance", [0.3, 1.0, 4.0])
def test_two_gaussians_are_bounded_by_their_closed_form(distance: float) -> None:
    draw, truth = np.random.default_rng(1), epsilon_of(distance, DELTA)
    present, absent = draw.normal(distance, 1, 20_000).tolist(), draw.normal(0, 1, 20_000).tolist()
    gaussian = of_gaussian_one_run(present, absent, 1e-3, DELTA)
    assert 0.8 * truth < gaussian < truth
    assert 0 < of_split_trials(present, absent, 1e-3, DELTA) < truth


def test_a_gaussian_bound_is_wrong_as_seldom_as_it_says() -> None:
    draw, doubt = np.random.default_rng(2), 0.1
    bounds = [distance_of_scores(draw.normal(2, 3, 12), draw.normal(0, 3, 20), doubt) for _ in range(300)]
    wrong = sum(bound > 2 / 3 for bound in bounds)
    assert 10 <= wrong <= 55  # 30 expected


def test_scores_without_a_difference_bound_nothing_and_without_noise_everything() -> None:
    same = np.random.default_rng(3).normal(size=50).tolist()
    assert distance_of_scores(same, same, 0.05) == 0
    assert of_trials(same, same, 0.0, 0.05, DELTA) == 0
    assert of_gaussian_one_run([1.0] * 5, [0.0] * 5, 0.05, DELTA) == UNBOUNDED
    assert epsilon_of_distance(1e9, DELTA) == UNBOUNDED
    assert of_one_run(100, 50, 20, 0.05, DELTA) == 0


def test_gaussian_trials_come_near_epsilon_and_are_seldom_above() -> None:
    draw, true = np.random.default_rng(0), epsilon_of(0.5, DELTA)
    found = [
        of_gaussian_trials(draw.normal(0.5, 1, 2000), draw.normal(0, 1, 2000), 0.25, 0.05, DELTA) for _ in range(100)
    ]
    assert np.mean(found) > 0.7 * true
    assert sum(one > true for one in found) <= 10
    assert of_gaussian_trials([1.0] * 5, [1.0] * 5, 0.0, 0.05, DELTA) == 0
    assert of_gaussian_trials([0.0] * 5, [1.0] * 5, 0.5, 0.05, DELTA) == 0
