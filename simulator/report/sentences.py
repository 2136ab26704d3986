"""The answer of rows about other data than images, in sentences: each attack's first figure, and the blind guess's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fedtap.simulator.report.columns import AnyRow, Column, Group, grouped, label, said, setting, settings, telling
from fedtap.simulator.report.saved_run import BLINDS

_MOST = 8
"""Settings of an attack that its sentence names one by one."""


def figures_said(rows: Group, columns: Sequence[Column], leads: str = "") -> list[str]:
    """A sentence for each attack; none where rows hold no figure.

    Args:
        leads: the column that is told; the first one that terminals show unless said.
    """
    figure = _leading(rows, columns, leads)
    if figure is None:
        return []
    return [_sentence(some, figure, columns) for some in grouped(rows, [setting("attack")]) if _values(some, figure)]


def _leading(rows: Group, columns: Sequence[Column], leads: str) -> Column | None:
    for column in columns:
        wanted = column.name == leads if leads else not column.page and column.name not in BLINDS
        if wanted and column.over in ("median", "mean", "share") and _values(rows, column):
            return column
    return None


def _values(rows: Group, column: Column) -> list[float]:
    found = (column.value([row]) for row in rows)
    return [float(value) for value in found if isinstance(value, int | float) and math.isfinite(value)]


def _sentence(rows: Sequence[AnyRow], figure: Column, columns: Sequence[Column]) -> str:
    who = f"{rows[0]['attack']}: " if rows[0].get("attack") else ""
    blinds = _blinds(rows, figure, columns)
    blind = f"blind guess {said(statistics.median(blinds), figure.form)}" if blinds else ""
    after, within = (f"; {blind}", f" ({blind})") if blind else ("", "")
    keys = [key for key in settings(rows, columns) if key.name != "attack"]
    groups = [some for some in grouped(rows, keys) if _values(some, figure)]
    names = telling([key for key in keys if len({key.cell(some) for some in groups}) > 1], groups)
    if len(groups) == 1:
        return f"{who}{figure.title} {_middle(rows, figure)}{after}."
    if len(groups) > _MOST:
        groups.sort(key=lambda some: statistics.median(_values(some, figure)))
        ends = " to ".join(f"{_middle(some, figure)} ({label(some, names)})" for some in (groups[0], groups[-1]))
        return f"{who}{figure.title} over {len(groups)} settings from {ends}{after}."
    each = "; ".join(f"{label(some, names)}: {_middle(some, figure)}" for some in groups)
    return f"{who}{figure.title}{within}: {each}."


def _blinds(rows: Group, figure: Column, columns: Sequence[Column]) -> list[float]:
    """What a blind guess got of the same figure."""
    known = {column.name for column in columns if column.over != "hidden"}
    names = (f"{figure.name}_blind", f"blind_{figure.name}", "blind")
    name = next((name for name in names if name in known), "")
    return [float(row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _middle(rows: Group, figure: Column) -> str:
    """The median, and over how many values it is taken, from which to which."""
    values = _values(rows, figure)
    if len(values) == 1:
        return said(values[0], figure.form)
    middle, low, high = (said(value, figure.form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} (median of {len(values)}, {low} to {high})" if low != high else f"{middle} ({len(values)} times)"
