"""The Gaussian mechanism in numbers: ε, δ and the largest success, of a distance μ between neighbours.

μ is the sensitivity over the noise's standard deviation, above 0. Balle and Wang, ICML 2018,
https://arxiv.org/abs/1805.06530; Hayes, Mahloujifar and Balle, NeurIPS 2023, https://arxiv.org/abs/2302.07225; Balle,
Cherubin and Hayes, S&P 2022, https://arxiv.org/abs/2201.04845.
"""

from __future__ import annotations

import math
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
    from opacus.accountants import PRVAccountant  # takes seconds to import

    accountant: Any = PRVAccountant()
    accountant.history = [(multiplier, rate, releases)]
    return max(float(accountant.get_epsilon(delta)), 0.0)


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
