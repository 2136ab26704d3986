"""What an (ε, δ) allows noise of a known kind: how far scales may differ, and how far neighbours may lie apart."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import gamma


@lru_cache(maxsize=4096)
def largest_ratio(size: float, epsilon: float, delta: float, one_way: bool = False) -> float:
    """The largest factor between two scales' w that (ε, δ) allows: noise whose summed size is Gamma(size) / w.

    Between densities w1^k exp(-w1 b) and w2^k exp(-w2 b) the privacy loss is k log(w1/w2) - (w1 - w2) b, both ways.

    Args:
        one_way: whether (ε, δ) bounds the probabilities of one of the two by those of the other, and not the reverse.
    """
    stricter = min if one_way else max

    def delta_of(factor: float) -> float:
        # P has w = factor and Q has w = 1: loss > ε where b < at; and the other way where b > at
        step = factor - 1
        low = (size * math.log(factor) - epsilon) / step
        one = gamma.cdf(low * factor, size) - _times(epsilon, gamma.logcdf(low, size)) if low > 0 else 0.0
        high = (size * math.log(factor) + epsilon) / step
        other = gamma.sf(high, size) - _times(epsilon, gamma.logsf(high * factor, size))
        return float(stricter(one, other)) - max(delta, 1e-12)

    high = 2.0
    while delta_of(high) < 0:
        high = high**2
        if high > 1e100:
            return high
    return float(brentq(delta_of, 1 + 1e-9, high, xtol=1e-12)) if delta_of(1 + 1e-9) < 0 else 1 + 1e-9


def _times(epsilon: float, log_probability: float) -> float:
    return math.exp(min(epsilon + log_probability, 0.0))


def laplace_limit(shift: np.ndarray, epsilon: float, delta: float, rounds: int) -> float:
    """The largest Σ|Δ|/b that Laplace noise of one scale b may have between neighbours: ε over the rounds if δ is 0.

    Of more, the whole distribution of the privacy loss is computed on a grid, each loss rounded down, so that δ comes
    out too small and the limit too large, if anything.
    """
    total = float(np.abs(shift).sum())
    if not delta:
        return epsilon / rounds
    sizes = np.abs(shift[shift != 0])
    if len(sizes) == 1 and rounds == 1:  # δ = 1 - exp((ε - Δ/b) / 2)
        return epsilon - 2 * math.log1p(-delta)
    if len(sizes) * rounds > 4096 or np.ptp(sizes) > 1e-3 * sizes.max():
        return math.inf  # not computed here
    count = len(sizes) * rounds

    def delta_at(each: float) -> float:
        return _laplace_delta(each, count, epsilon) - delta

    high = epsilon
    while delta_at(high) < 0:
        high *= 2
    each = float(brentq(delta_at, epsilon / count * 0.5, high, rtol=1e-4))
    return total / float(sizes.mean()) * each


def _laplace_delta(each: float, count: int, epsilon: float) -> float:
    """δ at ε of `count` Laplace releases that are each shifted by `each` scales: at least so much."""
    steps = max(20, min(400, 200_000 // count))
    width = 2 * each / steps
    # loss |x - a| - |x| at x ~ Laplace(0): a where x < 0, -a where x > a, a - 2x between, each rounded down to the grid
    edges = np.exp(-np.arange(steps + 1) * width / 2)
    single = np.zeros(steps + 1)
    single[:steps] = 0.5 * (edges[:-1] - edges[1:])[::-1]
    single[0] += 0.5 * math.exp(-each)
    single[steps] += 0.5
    length = count * steps + 1
    spectrum = np.fft.rfft(single, 2 ** math.ceil(math.log2(length)))
    whole = np.fft.irfft(spectrum**count, 2 ** math.ceil(math.log2(length)))[:length]
    losses = -count * each + width * np.arange(length)
    above = losses > epsilon
    return float((np.maximum(whole[above], 0) * -np.expm1(epsilon - losses[above])).sum())
