"""The noise in the first releases of one update: of which kind it is, and in which entries there is how much of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GAUSSIAN, LAPLACE, NO_NOISE, OTHER_NOISE = "Gaussian", "Laplace", "none", "neither Gaussian nor Laplace"

FIRST = 24
"""Releases of the same update by which the kind of noise is found, before any is evidence."""

_WEAK = 0.1
"""Entries whose noise has less than this share of their tensor's variance in the first releases are tested apart."""


@dataclass(frozen=True)
class Entries:
    """The entries of a release, in groups: each tensor is one, but for entries that have less noise than its others."""

    part: np.ndarray
    """Of each entry, the number of its group."""
    names: list[str]
    """Of each group."""
    counts: np.ndarray
    """Entries in each group."""
    noisy: np.ndarray
    """Of each entry, whether it has any noise."""
    discrete: np.ndarray
    """Of each entry, whether it is rounded to a whole number after the noise: how much there is, is no evidence."""

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.names)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Of values of the entries, over each group."""
        return np.bincount(self.part, values, self.groups)


def entries_of(rows: np.ndarray, keys: Sequence[str], sizes: Sequence[int]) -> Entries:
    """The groups that these releases show.

    Args:
        rows: releases of the same update, `releases entries`.
        keys, sizes: name and number of entries of each tensor.
    """
    variance = rows.var(0, ddof=1)
    # noise that rounding leaves of a number as long as this one is none
    floor = (1e-12 * np.abs(rows).max(0)) ** 2
    variance = np.where(variance <= floor, 0.0, variance)
    part = np.zeros(rows.shape[1], dtype=np.int64)
    names: list[str] = []
    start = 0
    for key, size in zip(keys, sizes, strict=True):
        here = slice(start, start + size)
        weak = variance[here] < _WEAK * np.median(variance[here]) if size else np.zeros(0, bool)
        if size and not np.median(variance[here]) and variance[here].any():
            weak = variance[here] == 0
        part[here] = len(names)
        names.append(key)
        if weak.any() and not weak.all():
            part[here] += weak
            names.append(f"{int(weak.sum())} of the {size} entries of {key}")
        start += size
    noisy = variance > 0
    discrete = noisy & (rows == np.rint(rows)).all(0)
    return Entries(part, names, np.bincount(part, minlength=len(names)), noisy, discrete)


def freedom_of(rows: np.ndarray) -> float:
    """How many independent entries are as good as these, from the spread of distances between releases (Satterthwaite);
    1 at least."""
    size = rows.std(0, ddof=1)
    if not rows.shape[1] or not (size > 0).any():
        return 1.0
    scaled = rows[:, size > 0] / size[size > 0]
    lengths = (scaled**2).sum(1)
    apart = (lengths[:, None] + lengths - 2 * scaled @ scaled.T)[np.triu_indices(len(rows), 1)]
    spread = float(apart.var())
    return max(min(2 * float(apart.mean()) ** 2 / spread if spread > 0 else math.inf, float(scaled.shape[1])), 1.0)


def noise_kind_of(rest: np.ndarray, independent: float) -> str:
    """The kind of noise of residuals, each entry by its own deviation; one of the four.

    Args:
        independent: how many independent residuals are as good as these.
    """
    size = rest.std(0, ddof=1)
    if not rest.size or not (size > 0).any():
        return NO_NOISE
    values = (rest / size)[:, size > 0].reshape(-1)
    doubt = 6 / math.sqrt(min(len(values), independent))
    flat = float(np.abs(values).mean())  # √(2/π) = 0.798 of Gaussian noise, 1/√2 of Laplace's, 0.866 of uniform noise
    excess = float((values**4).mean()) - 3
    # few releases an entry make its own deviation uncertain: of n the fourth moment is 3 (n - 1) / (n + 1) and not 3
    if abs(flat - 0.798) <= 0.012 + doubt and abs(excess) <= 0.35 + 10 * doubt:
        return GAUSSIAN
    if abs(flat - 0.715) <= 0.02 + doubt and 0.8 - 20 * doubt <= excess <= 4.0 + 20 * doubt:
        return LAPLACE
    return OTHER_NOISE
