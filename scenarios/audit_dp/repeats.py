"""Noise that comes again: releases of the same update that are nearer to each other than fresh noise would be."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.stats import chi2

from fedtap.scenarios.audit_dp.noise import FIRST
from fedtap.simulator.auditing.evidence import MOST_EVIDENCE

_KEPT = 500
"""Releases of the same update that are kept, to be compared with each other."""

_COMPARED = 256
"""Entries of a release that are compared, at most."""

_EQUAL = 1e-12
"""Probability with which two honest releases are so near to each other as those that count as equal, at most."""


class Repeats:
    """Releases of the same update, each compared with all before it.

    Args:
        rows: the first of them, `releases entries`.
        noisy: of each entry, whether it has noise.
        size: deviation of each entry in these.
        freedom: how many independent entries are as good as all that have noise.
        draw: chooses the entries that are compared.
    """

    def __init__(
        self, rows: np.ndarray, noisy: np.ndarray, size: np.ndarray, freedom: float, draw: np.random.Generator
    ) -> None:
        self.rows = list(rows)
        self.equal = self.shared = 0.0
        """Evidence that an earlier release of this mechanism was the same, and one of another client's process."""
        self._noisy, self._size, self._freedom = noisy, size, freedom
        self._compared = np.nonzero(noisy)[0]
        if len(self._compared) > _COMPARED:
            self._compared = np.sort(draw.choice(self._compared, _COMPARED, replace=False))
        self._reduced = np.zeros((_KEPT, len(self._compared)))
        self._reduced[: len(rows)] = rows[:, self._compared] / np.maximum(size[self._compared], 1e-300)

    def add(self, row: np.ndarray) -> None:
        """Compare one more release with those before."""
        if len(self.rows) >= _KEPT or not self._noisy.any():
            return
        count = len(self.rows)
        reduced = row[self._compared] / np.maximum(self._size[self._compared], 1e-300)
        nearest = float(((self._reduced[:count] - reduced) ** 2).sum(1).min()) / 2
        self._reduced[count] = reduced
        self.rows.append(row)
        self.equal = max(self.equal, _nearness(nearest, len(reduced), self._freedom, count * (count + 1) // 2))

    def compare_with(self, theirs: np.ndarray, first: int) -> None:
        """Compare the first releases with those of another client's process, where these are as many."""
        rows = np.stack(self.rows[:first])
        if theirs.shape != rows.shape:
            return
        noise = np.where(self._noisy, self._size, 0.0)
        if not self._noisy.any():  # noise that is the same in each call, or none at all
            noise = np.abs(rows[0])
        used = noise > 0
        if len(np.unique(rows[0][used])) < FIRST:  # a few constants, such as a number of examples, are no noise
            return
        for mine in rows:
            for other in theirs:
                near = float((((mine - other)[used] / noise[used]) ** 2).sum()) / 2
                self.shared = max(self.shared, _nearness(near, int(used.sum()), self._freedom, len(rows) ** 2))


def _nearness(near: float, size: int, freedom: float, pairs: int) -> float:
    """Evidence against independence of noise, where the nearest of so many pairs is so near.

    Args:
        near: sum of squares of half the differences, in deviations, over so many entries.
        freedom: how many independent entries are as good as all of a release; the noise of these may be correlated.
    """
    limit, log_chance = _equal_limit(max(int(min(size, freedom / 2)), 1))
    return 0.0 if near * min(freedom / 2 / size, 1.0) > limit else min(-log_chance - math.log(pairs), MOST_EVIDENCE)


@lru_cache(maxsize=64)
def _equal_limit(size: int) -> tuple[float, float]:
    """The squared distance below which two releases count as equal, and the logarithm of its probability."""
    limit = min(size / 2, float(chi2.ppf(_EQUAL, size)))
    return limit, max(float(chi2.logcdf(limit, size)), -2 * MOST_EVIDENCE)
