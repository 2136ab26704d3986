"""Lower bounds on ε at a δ, each wrong with probability `doubt` at most, from scores of canaries that were in and out.

A score is higher where an attacker rather believes that the canary was in. Trials: Jagielski, Ullman and Oprea, NeurIPS
2020, https://arxiv.org/abs/2006.07709. One run with many canaries: Steinke, Nasr and Jagielski, NeurIPS 2023,
https://arxiv.org/abs/2305.08846, and Mahloujifar, Melis and Chaudhuri, ICML 2025, https://arxiv.org/abs/2410.22235,
whose curve here is the Gaussian mechanism's. Gaussian scores: Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar, ICLR
2024, https://arxiv.org/abs/2302.03098, with exact limits (noncentral t) in the place of its estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri
from scipy.stats import binom, nct

from fedtap.simulator.defences import gaussian
from fedtap.simulator.scores import limits, lower_limit

UNBOUNDED = 1e12
"""ε that stands for no bound at all: nothing here tells larger ones."""


def epsilon_of_distance(distance: float, delta: float) -> float:
    """ε at δ of Gaussian releases μ standard deviations apart, UNBOUNDED at most."""
    if distance <= 0:
        return 0.0
    if distance**2 / 2 >= UNBOUNDED or math.isinf(distance):
        return UNBOUNDED
    if not delta:
        return UNBOUNDED  # no Gaussian noise is (ε, 0)-differentially private
    return min(gaussian.epsilon_of(distance, delta), UNBOUNDED)


def of_trials(present: Sequence[float], absent: Sequence[float], threshold: float, doubt: float, delta: float) -> float:
    """From independent trials: log of (rate of true positives - δ) over that of false ones, at Clopper and Pearson's
    limits.

    Args:
        threshold: chosen without these scores; a canary counts as seen from it on.
    """
    seen, wrong = (int((np.asarray(some) >= threshold).sum()) for some in (present, absent))
    low, high = lower_limit(seen, len(present), doubt / 2), limits(wrong, len(absent), doubt / 2)[1]
    return _of_rates(low, high, delta)


def of_gaussian_trials(
    present: Sequence[float] | np.ndarray,
    absent: Sequence[float] | np.ndarray,
    threshold: float,
    doubt: float,
    delta: float,
) -> float:
    """From independent trials of a Gaussian mechanism: μ = Φ⁻¹(rate of true positives) - Φ⁻¹(rate of false ones), at
    Clopper and Pearson's limits, as an ε at δ (Nasr et al., USENIX Security 2023, https://arxiv.org/abs/2302.07956).

    Args:
        threshold: chosen without these scores, or without knowing which of them are in; a canary counts as seen from it
            on.
    """
    seen, wrong = (int((np.asarray(some) >= threshold).sum()) for some in (present, absent))
    low, high = lower_limit(seen, len(present), doubt / 2), limits(wrong, len(absent), doubt / 2)[1]
    return epsilon_of_distance(float(ndtri(low) - ndtri(high)), delta) if low > 0 and high < 1 else 0.0


def of_split_trials(present: Sequence[float], absent: Sequence[float], doubt: float, delta: float) -> float:
    """`of_trials` on one half of the trials, at the threshold that is best on the other half."""
    if min(len(present), len(absent)) < 4:
        return 0.0
    tried = [float(at) for at in np.quantile([*present[::2], *absent[::2]], _SHARES)]
    best = max(tried, key=lambda at: of_trials(present[::2], absent[::2], at, doubt, delta))
    return of_trials(present[1::2], absent[1::2], best, doubt, delta)


_SHARES = np.linspace(0, 1, 101)
"""Quantiles of the scores that are tried as thresholds."""


def _of_rates(true: float, false: float, delta: float) -> float:
    return max(math.log((true - delta) / false), 0.0) if true > delta and false > 0 else 0.0


def of_one_run(canaries: int, guesses: int, right: int, doubt: float, delta: float) -> float:
    """From one run with canaries each in or out by a fair coin, on some of which is guessed (2305.08846, theorem 5.2).

    Each canary has to be a unit of its own. Under ε alone, as many guesses are right as of coins that fall on the right
    side with probability e^ε / (1 + e^ε); δ adds 2 m δ max_i P(right - i ≤ coins < right) / i.
    """

    def doubt_at(epsilon: float) -> float:
        chance = expit(epsilon)
        tail = binom.sf(right - 1, guesses, chance)
        steps = np.arange(1, right + 1)
        most = np.max((binom.sf(right - steps - 1, guesses, chance) - tail) / steps, initial=0.0) if delta else 0.0
        return float(tail + 2 * canaries * delta * most)

    return _largest(lambda epsilon: doubt - doubt_at(epsilon))


def of_f_dp_one_run(canaries: int, guesses: int, right: int, doubt: float, delta: float) -> float:
    """From the same run, against the whole trade-off curve of a Gaussian mechanism (2410.22235, algorithm 3)."""

    def passed(epsilon: float) -> float:
        distance = gaussian.distance_for(epsilon, delta) if epsilon > 0 else _distance_of_nothing(delta)
        r, h = doubt * right / canaries, doubt * (guesses - right) / canaries
        for i in range(right - 1, -1, -1):
            higher = max(h, float(ndtr(ndtri(r) - distance)))
            if higher == h:
                break
            r, h = min(r + i / (guesses - i) * (higher - h), 1.0), higher
        return r + h - guesses / canaries

    return _largest(passed)


def _distance_of_nothing(delta: float) -> float:
    """The μ at which ε = 0 at δ: 2 Φ(μ/2) - 1 = δ."""
    return 2 * float(ndtri((1 + delta) / 2))


def _largest(refuted: Callable[[float], float]) -> float:
    """The largest ε at which `refuted` is above 0, which falls with ε."""
    if refuted(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) > 0:
        low, high = high, 2 * high
    return float(brentq(refuted, low, high, xtol=1e-9))


def distance_of_scores(
    present: Sequence[float] | np.ndarray, absent: Sequence[float] | np.ndarray, doubt: float
) -> float:
    """The least μ of independent Gaussian scores of one variance, whose means are μ deviations apart.

    With n and m scores, (mean - mean') / (s √(1/n + 1/m)) has a noncentral t distribution of n + m - 2 degrees of
    freedom at μ / √(1/n + 1/m).
    """
    n, m = len(present), len(absent)
    if min(n, m) < 1 or n + m < 3:
        return 0.0
    one, other = np.asarray(present, float), np.asarray(absent, float)
    free = n + m - 2
    spread = math.sqrt((((one - one.mean()) ** 2).sum() + ((other - other.mean()) ** 2).sum()) / free)
    unit = math.sqrt(1 / n + 1 / m)
    apart = float(one.mean() - other.mean())
    if spread <= 1e-12 * abs(apart):
        return math.inf if apart > 0 else 0.0
    t = apart / (spread * unit)

    def above(shift: float) -> float:
        return float(nct.sf(t, free, shift)) - doubt

    if t <= 0 or above(0.0) >= 0:
        return 0.0
    high = t
    while above(high) < 0:
        high *= 2
    return float(brentq(above, 0.0, high, xtol=1e-9)) * unit


def of_gaussian_one_run(present: Sequence[float], absent: Sequence[float], doubt: float, delta: float) -> float:
    """ε of the Gaussian mechanism whose scores these are: `distance_of_scores`, as an ε at δ."""
    return epsilon_of_distance(distance_of_scores(present, absent, doubt), delta)
