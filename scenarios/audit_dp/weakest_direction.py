"""The direction in which noise is least, learnt from some releases and tested on later ones."""

from __future__ import annotations

import math

import numpy as np

from fedtap.scenarios.audit_dp.noise import Entries
from fedtap.simulator.auditing.evidence import Scale

_SUBSET = 48
"""Entries in which the direction is sought."""


class WeakestDirection:
    """A direction, and evidence on the noise along it."""

    def __init__(self) -> None:
        self.direction: np.ndarray | None = None
        """Of length 1, in a release's entries; None until it is learnt."""
        self.shift = 0.0
        """How far neighbours lie apart along it."""
        self._scale = Scale(1)
        self._seen: list[float] = []

    def learn(
        self, rows: np.ndarray, entries: Entries, size: np.ndarray, unit: np.ndarray | None, draw: np.random.Generator
    ) -> np.ndarray | None:
        """Learn it in some entries of each group; by what each entry of a unit's update is multiplied to point there.

        Args:
            rows: releases of the same update, `releases entries`.
            size: deviation of each entry.
            unit: direction of the unit's update; None where a release has none of its entries.
        """
        offsets = np.concatenate([np.nonzero(entries.part == group)[0] for group in range(entries.groups)])
        some = draw.permutation(offsets)[: _SUBSET // 3]
        most = max(2, _SUBSET // (2 * entries.groups))
        first = [np.nonzero(entries.part == group)[0][:most] for group in range(entries.groups)]
        chosen = np.unique(np.concatenate([some, *first]))
        if unit is not None:
            chosen = chosen[(unit[chosen] != 0) & entries.noisy[chosen]]
        if len(chosen) < 2:
            return None
        _, vectors = np.linalg.eigh(np.cov((rows[:, chosen] / size[chosen]).T))
        found = np.zeros(rows.shape[1])
        found[chosen] = vectors[:, 0] / size[chosen]
        found /= np.linalg.norm(found)
        self.direction = found
        self._seen = [float(row @ found) for row in rows]
        signs = np.zeros(len(found))
        if unit is not None:
            signs[chosen] = found[chosen] / unit[chosen]
        return signs

    def add(self, row: np.ndarray, least: float) -> None:
        """Take one more release of the same update into account.

        Args:
            least: a variance below which none is estimated.
        """
        assert self.direction is not None
        value, before = float(row @ self.direction), self._seen
        mean, count = float(np.mean(before)), len(before)
        variance = max(float(np.var(before, ddof=1)), least)
        rest = (value - mean) * math.sqrt(count / (count + 1))
        recent = self._scale.b[0] * 2, self._scale.a[0] * 2
        learnt = (recent[0] + 4 * variance) / (recent[1] + 4)
        self._scale.add(np.array([0.5]), np.array([rest**2 / 2]), np.array([1 / max(learnt, 1e-300)]))
        before.append(value)

    def against_enough(self, cost: float, most: float) -> float:
        """Evidence against the squared distance `cost` being at most so many times the noise's variance."""
        return self._scale.against_enough(np.array([cost]), most)
