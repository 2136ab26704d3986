"""Two runs beside each other: rows of the same attack and setting, and the difference of each figure with its interval.

Over the same victims the difference is paired, with Student's interval for the mean of differences; over others it is
Welch's, of two means with unequal variances (Biometrika 34, 1947, https://doi.org/10.1093/biomet/34.1-2.28).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.report.columns import BOOKKEEPING, AnyRow, Column, said
from fedtap.simulator.report.saved_run import BLINDS, SavedRun, same_victims

_LEVEL = 0.95
"""Of the intervals."""

_FIRST = "recognisable"
"""The figure that leads, where rows have it: the share of a victim's images that came back."""


@dataclass(frozen=True)
class Difference:
    """One figure of one attack in one setting, in two runs."""

    label: str
    """The attack, and the settings that vary within the runs."""
    figure: str
    """Name of the column."""
    first: float
    """Mean over the first run's victims."""
    second: float
    """Mean over the second run's victims."""
    counts: tuple[int, int]
    """Rows in either run."""
    low: float
    """Lower end of the 95 % interval of `second - first`; NaN where there are too few victims."""
    high: float
    """Its upper end."""
    paired: bool
    """Whether the victims are the same, so that the interval is that of the mean of their differences."""


def differences(
    first: SavedRun, second: SavedRun, columns: Sequence[Column], figures: Sequence[str] = ()
) -> list[Difference]:
    """The figures of all attacks and settings that both runs have.

    Args:
        columns: of the rows of both: what they measure.
        figures: names of the columns that are compared; unless said, those that a terminal shows.

    Raises:
        FedtapError: the runs have no attack and setting in common, no figure, or none of this name.
    """
    keys = _keys(first, second, columns)
    left, right = _groups(first.rows, keys), _groups(second.rows, keys)
    if not (both := [key for key in left if key in right]):
        has = [short("; ".join(map(_label, some)) or "no rows", 70) for some in (left, right)]
        raise FedtapError(
            "No attack and setting is in both runs, so nothing can be compared: the first has "
            f"{has[0]}, the second {has[1]}."
        )
    known = _figures([*first.rows, *second.rows], columns)
    for name in figures:
        if name not in known:
            raise unknown("figure", name, known)
    chosen = list(figures) or [name for name, terminal in known.items() if terminal]
    alike = _data(first) == _data(second)
    found = []
    for key in both:
        for name in chosen:
            one, other = ([row for row in side[key] if _value(row, name) is not None] for side in (left, right))
            if one and other:
                found.append(_difference(_label(key), name, one, other, alike and same_victims(one, other)))
    if not found:
        raise FedtapError(
            f"The runs have {short(_label(both[0]))} in common and no figure of it, since each victim's row lacks a "
            "result: look at their errors, fedtap show RUN."
        )
    return found


def options_that_differ(first: SavedRun, second: SavedRun) -> list[str]:
    """A line for each option that has other values in the second run."""
    one, other = first.options, second.options
    told = {name: [", ".join(map(said, side.get(name, ()))) for side in (one, other)] for name in {**one, **other}}
    return [f"{name.replace('_', ' ')}: {a or '–'} | {b or '–'}" for name, (a, b) in told.items() if a != b]


def _keys(first: SavedRun, second: SavedRun, columns: Sequence[Column]) -> list[str]:
    """The settings that vary within one of the runs: what rows are matched by, beside the attack."""
    measured = {column.name for column in columns if column.over != "same"}
    left_out = {*measured, *BOOKKEEPING, "error", "attack"}
    names = dict.fromkeys(name for run in (first, second) for row in run.rows for name in row)
    return [
        name
        for name in names
        if name not in left_out
        and any(len({said(row.get(name), "g") for row in run.rows if name in row}) > 1 for run in (first, second))
    ]


_Key = tuple[tuple[str, str], ...]


def _groups(rows: Sequence[AnyRow], keys: Sequence[str]) -> dict[_Key, list[AnyRow]]:
    groups: dict[_Key, list[AnyRow]] = {}
    for row in rows:
        key = tuple((name, said(row.get(name), "g")) for name in ("attack", *keys) if name in row)
        groups.setdefault(key, []).append(row)
    return groups


def _label(key: _Key) -> str:
    return ", ".join(value if name == "attack" else f"{name.replace('_', ' ')} {value}" for name, value in key)


def _figures(rows: Sequence[AnyRow], columns: Sequence[Column]) -> dict[str, bool]:
    """Column of numbers -> whether it is compared unless others are named."""
    named = {_FIRST: True}
    for column in columns:
        if column.over != "same":
            shown = not column.page and column.over in ("median", "mean", "share") and column.name not in BLINDS
            named.setdefault(column.name, shown)
    numbers = {name for row in rows for name in row if _value(row, name) is not None}
    return {name: shown for name, shown in named.items() if name in numbers - {*BOOKKEEPING}}


def _value(row: AnyRow, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _data(run: SavedRun) -> object:
    """What decides which data the victims hold, as far as run.json says; of saved leaks it has the digest."""
    names = ("dataset", "target_dataset", "target_classes", "size", "batch", "seed", "corpus", "documents", "records")
    return run.about.get("leak"), {name: sorted(map(said, run.options.get(name, ()))) for name in names}


def _difference(label: str, name: str, one: list[AnyRow], other: list[AnyRow], paired: bool) -> Difference:
    if paired:
        second = {tuple(row.get(part) for part in ("client", "round", "seed")): row for row in other}
        other = [second[tuple(row.get(part) for part in ("client", "round", "seed"))] for row in one]
    a, b = ([_value(row, name) or 0.0 for row in side] for side in (one, other))
    low, high = paired_interval(a, b) if paired else welch_interval(a, b)
    return Difference(label, name, statistics.fmean(a), statistics.fmean(b), (len(a), len(b)), low, high, paired)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of ``second - first``; NaN of fewer than two pairs."""
    moved = [b - a for a, b in zip(first, second, strict=True)]
    if len(moved) < 2:
        return math.nan, math.nan
    return _interval(statistics.fmean(moved), statistics.variance(moved) / len(moved), len(moved) - 1)


def welch_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Welch's 95 % interval of ``mean(second) - mean(first)``; NaN where one of them has fewer than two values."""
    if min(len(first), len(second)) < 2:
        return math.nan, math.nan
    parts = [(statistics.variance(some) / len(some), len(some) - 1) for some in (first, second)]
    total = sum(part for part, _ in parts)
    # Welch and Satterthwaite: ν = (Σ s²/n)² / Σ (s²/n)² / (n - 1)
    freedom = total**2 / sum(part**2 / less for part, less in parts) if total else 1.0
    return _interval(statistics.fmean(second) - statistics.fmean(first), total, freedom)


def _interval(middle: float, variance: float, freedom: float) -> tuple[float, float]:
    from scipy.stats import t

    half = float(t.ppf((1 + _LEVEL) / 2, freedom)) * math.sqrt(variance)
    return middle - half, middle + half
