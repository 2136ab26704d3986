"""What an auditor keeps of a mechanism's releases, and the hypotheses that it holds against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from fedtap.scenarios.audit_dp.noise import FIRST, Entries
from fedtap.simulator.auditing.evidence import Scale


@dataclass
class Hypothesis:
    """One thing that the promise implies, and the evidence against it."""

    name: str
    """What is tested, in some words."""
    fault: str
    """What it is called if it falls, before it is looked at more closely."""
    log_e: Callable[[], float]
    """The evidence so far."""
    probe: str = ""
    """Name of the probe that it is about."""
    highest: float = 0.0
    """The most evidence there was."""
    fell: int = 0
    """Releases after which it fell; 0 where it did not."""


@dataclass
class Releases:
    """What one input gave."""

    size: int
    """Entries of a release."""
    groups: int
    """Groups of entries."""
    count: int = 0
    """Releases."""
    mean: np.ndarray = field(init=False)
    """Of all of them."""
    scale: Scale = field(init=False)
    """Evidence on the noise in each group."""
    freedom: np.ndarray = field(init=False)
    """NoiseResiduals in each group."""
    squares: np.ndarray = field(init=False)
    """Their sums of squares."""

    def __post_init__(self) -> None:
        self.mean = np.zeros(self.size)
        self.scale = Scale(self.groups)
        self.freedom, self.squares = np.zeros(self.groups), np.zeros(self.groups)


@dataclass(frozen=True)
class Neighbours:
    """How far the means of two neighbours' releases lie apart."""

    one: str
    """Name of a probe, or `absent`."""
    other: str
    """Name of a probe."""
    shift: np.ndarray | None
    """The difference of the means; None where it is no constant that the same noise shows."""
    direction: np.ndarray | None
    """The direction of the difference of the inputs, of length 1, in a release's entries; None where they have none."""


_WEIGHT = 4.0
"""Releases for which what all inputs have in common counts, where a scale is estimated from an input's own ones."""


class NoiseResiduals:
    """What is left of releases without their means, as evidence on the scale of the noise at each input.

    Args:
        rows: the first releases without a unit, `releases entries`, which are no evidence.
        entries: their groups.
        laplace: whether the noise is taken for Laplace's, and not for Gaussian noise.
        least: variances below this are taken for it.
    """

    def __init__(self, rows: np.ndarray, entries: Entries, laplace: bool, least: float) -> None:
        self.at: dict[str, Releases] = {}
        self.center = rows.mean(0)
        self.size = np.sqrt(np.maximum(rows.var(0, ddof=1), 0))
        self.pooled = len(rows) - 1.0, entries.sums(rows.var(0, ddof=1) * (len(rows) - 1))
        """Degrees of freedom, and sums of squares of residuals in each group, of all inputs together."""
        self.least = least
        self._entries, self._laplace = entries, laplace

    def begin(self, names: Iterable[str]) -> None:
        """Be ready for releases of these inputs; those without a unit, `absent`, have a mean already."""
        self.at = {name: Releases(len(self.center), self._entries.groups) for name in names}
        self.at["absent"].count, self.at["absent"].mean = FIRST, self.center.copy()

    def add(self, name: str, row: np.ndarray, shift: np.ndarray | None) -> None:
        """Take one release of this input into account.

        Args:
            shift: by how much its mean differs from that of `absent`, for Laplace noise; None where it is not known.
        """
        at = self.at[name]
        if self._laplace:
            self._add_laplace(at, row, np.zeros(len(row)) if name == "absent" else shift)
        else:
            self._add_gaussian(at, row)
        at.count += 1
        at.mean += (row - at.mean) / at.count

    def scale_of(self, names: Iterable[str]) -> Scale:
        """The evidence at these inputs together."""
        scale = Scale(self._entries.groups)
        for name in names:
            scale = scale + self.at[name].scale
        return scale

    def distance(self, shift: np.ndarray) -> float:
        """How many deviations of the noise without a unit lie between neighbours whose means differ by `shift`."""
        absent = self.at["absent"]
        with np.errstate(divide="ignore", invalid="ignore"):
            return math.sqrt(np.nansum(self._entries.sums(shift**2) * absent.freedom / absent.squares))

    def _add_gaussian(self, at: Releases, row: np.ndarray) -> None:
        """NoiseResiduals after the mean so far, times √(k / (k + 1)), are independent Gaussian noise (Helmert)."""
        if not at.count:
            return
        rest = (row - at.mean) * math.sqrt(at.count / (at.count + 1))
        rest[np.abs(rest) <= 1e-12 * np.abs(row)] = 0.0  # what rounding leaves of the mean
        squares, counts = self._entries.sums(rest**2), self._entries.counts
        times, all_squares = self.pooled
        common = all_squares / (times * counts)
        variance = (at.squares + _WEIGHT * common) / (at.freedom + _WEIGHT)
        at.scale.add(counts / 2, squares / 2, 1 / np.maximum(variance, self.least))
        at.freedom += counts
        at.squares += squares
        self.pooled = times + 1, all_squares + squares

    def _add_laplace(self, at: Releases, row: np.ndarray, shift: np.ndarray | None) -> None:
        if shift is None:
            return
        # the center without a unit is 0 where nothing speaks against it
        doubtful = np.abs(self.center) > 7 * self.size / math.sqrt(FIRST)
        sizes = self._entries.sums(np.abs(row - np.where(doubtful, self.center, 0.0) - shift))
        counts = self._entries.counts
        common = np.sqrt(self.pooled[1] / (self.pooled[0] * counts) / 2)  # of the first releases, b = σ/√2
        scale = (at.squares + _WEIGHT * common) / (at.freedom + _WEIGHT)
        at.scale.add(counts.astype(float), sizes, 1 / np.maximum(scale, math.sqrt(self.least)))
        at.freedom += counts
        at.squares += sizes
