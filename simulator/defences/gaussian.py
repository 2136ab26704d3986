"""The Gaussian mechanism in numbers: ε, δ and the largest success, of a distance μ between neighbours.

μ is the sensitivity over the noise's standard deviation, above 0. Balle and Wang, ICML 2018,
https://arxiv.org/abs/1805.06530; Hayes, Mahloujifar and Balle, NeurIPS 2023, https://arxiv.org/abs/2302.07225; Balle,
Cherubin and Hayes, S&P 2022, https://arxiv.org/abs/2201.04845.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import beta, binom

CONFIDENCE = 0.999
"""Probability with which a Monte Carlo bound is no smaller than the true one."""


def delta_of(distance: float, epsilon: float) -> float:
    """δ at ε of one Gaussian release: Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) (1805.06530, theorem 8).

    Args:
        distance: μ, sensitivity over standard deviation, above 0.
    """
    first = log_ndtr(distance / 2 - epsilon / distance)
    second = epsilon + log_ndtr(-distance / 2 - epsilon / distance)
    return float(np.exp(first) * -np.expm1(min(second - first, 0.0))) if np.isfinite(first) else 0.0


def epsilon_of(distance: float, delta: float) -> float:
    """ε at δ of one Gaussian release: where `delta_of` takes that value."""
    if delta_of(distance, 0.0) <= delta:
        return 0.0
    enough = distance**2 / 2 + distance * math.sqrt(2 * math.log(1 / delta))  # by concentrated DP
    return float(brentq(lambda epsilon: delta_of(distance, epsilon) - delta, 0.0, enough, xtol=1e-12))


def distance_for(epsilon: float, delta: float) -> float:
    """The largest μ that keeps this ε at this δ."""
    return math.exp(brentq(lambda power: delta_of(math.exp(power), epsilon) - delta, -25.0, 25.0, xtol=1e-13))


def bound(distance: float, kappa: float) -> float:
    """Φ(Φ⁻¹(κ) + μ): the largest probability under N(μ, 1) of an event of probability κ under N(0, 1)."""
    return float(ndtr(ndtri(kappa) + distance))


def renyi_bound(distance: float, kappa: float) -> float:
    """The older, looser bound on the same, by way of Rényi divergences (2201.04845).

    min over α of (κ exp(α μ²/2))^((α - 1)/α), which is exp(-(√(2 log 1/κ) - μ)²/2) where μ is less than that root.
    """
    return math.exp(-(max(math.sqrt(-2 * math.log(kappa)) - distance, 0.0) ** 2) / 2)


def sampled_epsilon(multiplier: float, rate: float, releases: int, delta: float) -> float:
    """Upper end of the ε of Poisson-sampled Gaussians, add/remove, by Opacus's privacy loss accountant."""
    return sampled_limits(multiplier, rate, releases, delta)[1]


_DIGITS = 1e-3
"""Share to which a distance under sampling is found; the two limits are moved apart by it."""

_FINEST = 60.0
"""ε above which the privacy loss accountant takes minutes and gigabytes, and Rényi divergences' bound is told."""


@lru_cache(maxsize=256)
def sampled_limits(multiplier: float, rate: float, releases: int, delta: float) -> tuple[float, float]:
    """Both ends of the ε of Poisson-sampled Gaussians, add/remove: within 0.04 of each other below _FINEST.

    Above it they are those of one release that is not sampled away, and of Rényi divergences.
    """
    high = renyi_epsilon(multiplier, rate, releases, delta)
    if high > _FINEST:
        # (1 - q) P + q Q ≤ e^ε P + δ says Q ≤ (1 + (e^ε - 1) / q) P + δ / q
        alone = epsilon_of(1 / multiplier, delta / rate) if delta < rate else 0.0
        return sampled_by(alone, rate), high
    from opacus.accountants import PRVAccountant  # takes seconds to import

    accountant: Any = PRVAccountant()
    accountant.history = [(multiplier, rate, releases)]
    error = delta / 1000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in renyi_epsilon, by which it sizes its grid
        low, _, above = accountant._get_dprv(0.01, error).compute_epsilon(delta, error, 0.01)
    return max(float(low), 0.0), max(min(float(above), high), 0.0)


def renyi_epsilon(multiplier: float, rate: float, releases: int, delta: float) -> float:
    """ε of Poisson-sampled Gaussians at most, add/remove, by Opacus's accountant of Rényi divergences."""
    from opacus.accountants.analysis import rdp

    orders = [1 + step / 10 for step in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the best order is the first or the last one
        divergences = rdp.compute_rdp(q=rate, noise_multiplier=multiplier, steps=releases, orders=orders)
        epsilon, _ = rdp.get_privacy_spent(orders=orders, rdp=divergences, delta=delta)
    return max(float(epsilon), 0.0)


def sampled_by(epsilon: float, rate: float) -> float:
    """ε of a release in which a unit is with probability q, of the ε of one that it is in: log(1 + q (e^ε - 1))."""
    return float(np.logaddexp(math.log1p(-rate), math.log(rate) + epsilon)) if rate < 1 else epsilon


@lru_cache(maxsize=64)
def sampled_distances(epsilon: float, delta: float, rate: float, releases: int) -> tuple[float, float]:
    """μ of one release from which on ε is passed for certain, and μ up to which it is kept for certain."""

    def at(end: int, start: float) -> float:
        def over(power: float) -> float:
            return sampled_limits(math.exp(power), rate, releases, delta)[end] - epsilon

        low = start  # the multiplier's logarithm, lowered until ε is passed
        while over(low) < 0:
            low -= 0.1
        return math.exp(-brentq(over, low, low + 0.1, xtol=_DIGITS)) if low < start else math.exp(-start)

    kept = brentq(lambda power: renyi_epsilon(math.exp(power), rate, releases, delta) - epsilon, -4.0, 12.0, xtol=1e-3)
    return at(0, kept + 0.01) * (1 + _DIGITS), at(1, kept + 0.01) * (1 - _DIGITS)


def sampled_bound(distance: float, rate: float, releases: int, kappa: float, draws: int, seed: int) -> float:
    """Monte Carlo of sup {P_ν(E) : P_μ(E) ≤ κ} (2302.07225, algorithm 1), rounded up on both sides.

    μ = N(0, I) and ν = N(μB, I), where B is 1 with probability `rate`, each release by itself. The best E holds the
    largest likelihood ratios.
    """
    random = np.random.default_rng(seed)
    without, within = np.zeros(draws), np.zeros(draws)
    for _ in range(releases):
        without += _log_ratio(random.standard_normal(draws), distance, rate)
        drawn = distance * (random.random(draws) < rate)
        within += _log_ratio(random.standard_normal(draws) + drawn, distance, rate)
    doubt = (1 - CONFIDENCE) / 2
    rank = int(binom.ppf(1 - doubt, draws, kappa)) + 1  # then P_μ(ratio ≥ threshold) ≥ κ, but with probability `doubt`
    if rank > draws:
        return 1.0
    threshold = np.partition(without, draws - rank)[draws - rank]
    won = int((within >= threshold).sum())
    return 1.0 if won == draws else max(kappa, float(beta.ppf(1 - doubt, won + 1, draws - won)))


def _log_ratio(at: np.ndarray, distance: float, rate: float) -> np.ndarray:
    """log(1 - q + q exp(μx - μ²/2)): density with the one sought over density without it, at x."""
    return np.logaddexp(math.log1p(-rate), math.log(rate) + distance * at - distance**2 / 2)
