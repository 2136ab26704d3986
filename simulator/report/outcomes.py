"""What rows say came back: images counted one by one, with the interval that so few of them leave."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedtap.simulator.report.columns import AnyRow
from fedtap.simulator.scores import LEVELS, limits, median_interval

DOUBT = 0.05
"""How often an interval may miss what it is about."""

MEASURE = "recognisable"
"""What counts as a success, unless a run names a PSNR of its own (`success_db`), which is then the only measure."""


@dataclass(frozen=True)
class Outcome:
    """Images of some rows that came back."""

    images: int
    """Attacked ones: those of victims that gave an answer."""
    won: int
    """Recognisable ones, or those with a PSNR of `success_db` at least."""
    identical: int | None
    """None where a PSNR is the measure."""
    measure: str

    @property
    def share(self) -> float | None:
        """Of images that came back, in [0, 1]; None where there are none."""
        return self.won / self.images if self.images else None

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's for the share, 95 %: as if images came back independently of each other."""
        return limits(self.won, self.images, DOUBT / 2)

    def __str__(self) -> str:
        """Such as `100% [63–100]`."""
        if self.share is None:
            return "–"
        low, high = self.interval
        return f"{self.share:.0%} [{100 * low:.0f}–{100 * high:.0f}]"


def outcome(rows: Sequence[AnyRow]) -> Outcome:
    """What came back of these rows' images; rows without levels (a failed victim, no truth) count for nothing."""
    scored = [row for row in rows if row.get("levels")]
    asked = next((row["success_db"] for row in scored if row.get("success_db")), None)
    found = [level for row in scored for level in row["levels"]]
    if asked:
        won = sum(value >= asked for row in scored for value in row.get("psnr_images") or ())
        return Outcome(len(found), won, None, f"≥{asked:g} dB")
    won = sum(level != LEVELS[0] for level in found)
    return Outcome(len(found), won, sum(level == LEVELS[2] for level in found), MEASURE)


def psnrs(rows: Sequence[AnyRow], column: str = "psnr") -> list[float]:
    """PSNR of each image, in dB; a row that has no list of them, or one without a truth, has its own or none."""
    return [
        float(value) for row in rows for value in row.get(f"{column}_images") or [row.get(column)] if value is not None
    ]


def median(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None


def ranged(values: Sequence[float]) -> str:
    """The median and its 95 % interval, by order statistics, such as `48.0 [45–52]`; of one value that alone."""
    if not values:
        return "–"
    low, high = median_interval(values, DOUBT)
    return f"{statistics.median(values):.1f}" + (f" [{low:.0f}–{high:.0f}]" if len(values) > 1 else "")
