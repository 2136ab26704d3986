"""Evidence against a hypothesis that may be looked at after every observation: e-processes.

An e-process is a sequence of numbers from 0 that, if the hypothesis is true, has an expectation of 1 at most whenever
it is stopped. So it passes 1/α at any time with probability α at most (Ville's inequality), and a hypothesis is refuted
as soon as it does: Ramdas, Grünwald, Vovk and Shafer, Statistical Science 2023, https://arxiv.org/abs/2210.01948. Of H
hypotheses each is held against H/α (Bonferroni). All numbers here are natural logarithms.

Where a hypothesis is a set of distributions, the likelihood under an estimate from the past alone is divided by the
largest likelihood in that set, which is an e-process too (universal inference: Wasserman, Ramdas and Balakrishnan, PNAS
2020, https://arxiv.org/abs/1912.11436, section 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import brentq, minimize_scalar

MOST_EVIDENCE = 690.0
"""Logarithms above this are told as this: e^690 is about the largest number that JSON's readers hold."""


@dataclass
class Guesses:
    """Against: a guess is right with this probability at most, whatever came before. A bet on each guess.

    The stake is the best one for the share of right guesses so far, (right + 1/2) / (guesses + 1), and none is placed
    while that share is below the limit.
    """

    most: float
    """The limit, in (0, 1]."""
    right: int = 0
    """Guesses that were right."""
    made: int = 0
    """All guesses."""
    log_e: float = 0.0
    """The evidence."""

    def add(self, right: bool) -> None:
        """Take one more guess into account."""
        share = min((self.right + 0.5) / (self.made + 1), 1 - 1e-9)
        if self.most < share:
            self.log_e += math.log(share / self.most) if right else math.log((1 - share) / (1 - self.most))
        self.right += right
        self.made += 1


@dataclass
class Scale:
    """Residuals of noise whose density in each of some groups of entries is ``w^a exp(-w b)``, but for a constant.

    For Gaussian noise w = 1/σ², a = n/2 and b = Σr²/2 of n residuals r. For Laplace noise w is one over its scale,
    a = n and b = Σ|r|.
    """

    groups: int
    """How many groups there are."""
    a: np.ndarray = field(init=False)
    """Of each group, over all residuals."""
    b: np.ndarray = field(init=False)
    """Of each group, over all residuals."""
    predicted: np.ndarray = field(init=False)
    """Of each group, the logarithm of the likelihood under estimates from the past alone."""

    def __post_init__(self) -> None:
        self.a, self.b, self.predicted = (np.zeros(self.groups) for _ in range(3))

    def add(self, a: np.ndarray, b: np.ndarray, w: np.ndarray) -> None:
        """Take more residuals into account.

        Args:
            a, b: of these residuals, one number a group.
            w: estimate from residuals before these.
        """
        self.a += a
        self.b += b
        self.predicted += a * np.log(w) - b * w

    def __add__(self, other: Scale) -> Scale:
        both = Scale(self.groups)
        both.a, both.b = self.a + other.a, self.b + other.b
        both.predicted = self.predicted + other.predicted
        return both

    def against_enough(self, cost: np.ndarray, most: float) -> float:
        """Evidence against ``Σ cost w ≤ most``, so against there being noise enough.

        For Gaussian noise `cost` is the squared distance of neighbours in each group, and Σ cost w is μ².
        """
        used = (cost > 0) & (self.a > 0)
        if not used.any():
            return 0.0
        a, b, cost = self.a[used], self.b[used], cost[used]
        if len(a) == 1:
            w = np.minimum(a / np.maximum(b, 1e-300), most / cost)
            return float(self.predicted[used][0] - (a * np.log(w) - b * w)[0])

        def over(price: float) -> float:
            with np.errstate(divide="ignore"):
                return float((cost * a / (b + price * cost)).sum()) - most

        price = 0.0  # Lagrange's multiplier: the likeliest w under the limit is a / (b + price cost)
        if over(0.0) > 0:
            high = float(a.sum()) / most * (1 + 1e-9)  # there the sum is below the limit, whatever b is
            price = float(brentq(over, 0.0 if over(0.0) < math.inf else high * 1e-15, high, xtol=1e-300, rtol=1e-13))
        w = a / (b + price * cost) if price or (b > 0).all() else a / np.maximum(b, 1e-300)
        return float(self.predicted[used].sum() - (a * np.log(w) - b * w).sum())

    def most(self, group: int, threshold: float) -> float:
        """The least w of a group (so the largest scale) that evidence of `threshold` is not against; 0 for none."""
        a, b, predicted = self.a[group], self.b[group], self.predicted[group]
        if not a:
            return 0.0
        best = a / max(b, 1e-300)

        def evidence(log_w: float) -> float:
            return float(predicted - (a * log_w - b * math.exp(log_w)) - threshold)

        low = math.log(best) - 1.0
        if evidence(math.log(best)) >= 0:
            return float(best)
        while evidence(low) < 0:
            low -= 1.0
        return math.exp(brentq(evidence, low, math.log(best), xtol=1e-12))


def against_equal(one: Scale, other: Scale, ratio: Callable[[int], float]) -> float:
    """Evidence against: in each group the two scales' w differ by that group's factor at most.

    Args:
        ratio: of a group, the largest factor, from 1.
    """
    total = 0.0
    for group in range(one.groups):
        a, b = one.a[group], max(one.b[group], 1e-300)
        c, d = other.a[group], max(other.b[group], 1e-300)
        if not a or not c:
            continue
        limit = math.log(ratio(group))
        free = math.log(c / d) - math.log(a / b)
        if abs(free) <= limit:
            best = a * math.log(a / b) - a + c * math.log(c / d) - c
        else:  # the likeliest pair (w, factor w) with the factor at the limit
            factor = math.exp(math.copysign(limit, free))
            w = (a + c) / (b + factor * d)
            best = a * math.log(w) + c * math.log(factor * w) - (a + c)
        total += one.predicted[group] + other.predicted[group] - best
    return total


@dataclass
class MeanShift:
    """Against: neighbours lie `most` standard deviations apart at most, where neither distance nor noise is known.

    Each observation is the difference of two neighbours' releases over √2: Gaussian noise of deviation σ on each of n
    entries, and along one direction a shift of Δ/√2 besides.
    """

    most: float
    """Limit of Δ/σ."""
    seen: int = 0
    """Observations."""
    entries: int = 0
    """Entries beside the one along the direction, over all observations."""
    along: float = 0.0
    """Σz, z the entry along the direction."""
    squares: float = 0.0
    """Σz²."""
    rest: float = 0.0
    """Sum of squares of all other entries."""
    predicted: float = 0.0
    """Logarithm of the likelihood under estimates from the past."""

    def add(self, along: float, rest: float, entries: int) -> None:
        """Take one observation into account.

        Args:
            along: the entry along the direction.
            rest: sum of squares of the others.
            entries: how many others there are.
        """
        if self.seen:
            count = self.seen + self.entries
            mean = self.along / self.seen
            variance = max((self.squares - self.seen * mean**2 + self.rest) / max(count - 1, 1), 1e-300)
            if self.seen == 1 and not self.entries:
                variance = max(self.squares, 1e-300)
            apart = (along - mean) ** 2 + rest
            self.predicted += -0.5 * (entries + 1) * math.log(variance) - apart / (2 * variance)
        self.seen += 1
        self.entries += entries
        self.along += along
        self.squares += along**2
        self.rest += rest
        if self.seen == 1:  # the first observation makes the first estimate and is no evidence
            self._first = (along, rest, entries)

    def log_e(self, most: float | None = None) -> float:
        """The evidence, against the limit or another one."""
        limit = (self.most if most is None else most) / math.sqrt(2)
        if self.seen < 3:
            return 0.0
        first, rest_first, entries_first = self._first
        n, count = self.seen - 1, self.seen - 1 + self.entries - entries_first
        along, squares, rest = self.along - first, self.squares - first**2, self.rest - rest_first
        mean = along / n

        def loss(log_sigma: float) -> float:
            sigma = math.exp(log_sigma)
            shift = max(-limit * sigma, min(mean, limit * sigma))
            apart = max(squares - 2 * shift * along + n * shift**2, 0.0) + rest
            return count * log_sigma + apart / (2 * sigma**2)

        free = 0.5 * math.log(max((squares - n * mean**2 + rest) / count, 1e-300))
        widest = 0.5 * math.log(max((squares + rest) / count, 1e-300))
        best = minimize_scalar(loss, bounds=(free - 1e-9, widest + 1e-9), method="bounded", options={"xatol": 1e-10})
        return float(self.predicted + min(float(best.fun), loss(free), loss(widest)))

    def least(self, threshold: float) -> float:
        """The largest Δ/σ that evidence of `threshold` is against, 0 for none."""
        if self.log_e(0.0) < threshold:
            return 0.0
        high = 1e-3
        while self.log_e(high) >= threshold and high < 1e12:
            high *= 2
        return float(brentq(lambda limit: self.log_e(limit) - threshold, 0.0, high, xtol=1e-9, rtol=1e-9))
