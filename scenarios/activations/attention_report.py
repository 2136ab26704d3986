"""Charts of attacks on attention outputs: how the error falls, and what starts, noise and gamma do to it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from fedtap.simulator.report.charts import GREY, Panel, Series, chart, unzipped
from fedtap.simulator.report.columns import Column, Group, grouped, label, legend, listing, setting

_FOUND = 1e-6
"""Relative error from which an input counts as found."""

_FEW = 10
"""Steps that a good method needs, from a start near the input."""

TAIL = (1e-7, 1e-2)
"""Errors between which convergence should be quadratic: below, rounding takes over."""

TOLERANCES = tuple(10.0**-power for power in range(2, 11, 2))

AGAINST = {"start_near_truth": "start's distance from the input", "gamma": "gamma", "noise": "noise on the output"}
"""Settings that are charted when swept."""

Path = Sequence[tuple[int, float]]


def attention_charts(rows: Group, swept: Mapping[str, str]) -> dict[str, str]:
    """Heading -> figures or a chart, of the rows of a run.

    Args:
        swept: the settings that have several values in it.
    """
    groups = _labelled(rows, [*swept])
    columns = [Column("attack", of=lambda some: next(name for name, one in groups.items() if one == some)), *_COLUMNS]
    some = [*groups.values()]
    made = {"How often, and how fast": f"{listing(some, columns)}<p class='pale'>{escape(legend(columns, some))}</p>"}
    if any(row["path"] for row in rows):
        made["Error after each step"] = _paths(groups)
    for name, words in AGAINST.items():
        if name in swept:
            others = _labelled(rows, [other for other in swept if other != name])
            made[f"Against the {words}"] = _against(others, name, words)
    return made


def _labelled(rows: Group, names: Sequence[str]) -> dict[str, Group]:
    """Rows that have the attack and these settings alike, by what is not the same in all; by the attack if all is."""
    keys = [setting(name) for name in ("attack", *names)]
    vary = [key for key in keys if len(grouped(rows, [key])) > 1] or keys[:1]
    return {label(some, vary): some for some in grouped(rows, keys)}


def found(rows: Group, steps: float = math.inf) -> float:
    """Share of the victims whose input was found, in at most this number of steps."""
    if steps == math.inf:
        return statistics.fmean(row["relative_error"] <= _FOUND for row in rows)
    return statistics.fmean((reached(row["path"], _FOUND) or math.inf) <= steps for row in rows)


def reached(path: Path, tolerance: float) -> int | None:
    """Steps until the error was first at most this, where it ever was."""
    return next((step for step, error in path if error <= tolerance), None)


def order(paths: Sequence[Path]) -> float | None:
    """Slope of log e_(k+1) on log e_k by least squares, over steps that begin in the tail: 2 where it is quadratic."""
    pairs = [
        (math.log(before), math.log(after))
        for path in paths
        for (step, before), (following, after) in itertools.pairwise(path)
        if following == step + 1 and TAIL[0] <= before <= TAIL[1] and after > 0
    ]
    if len({before for before, _ in pairs}) < 2:
        return None
    return statistics.linear_regression(*zip(*pairs, strict=True)).slope


def _played(rows: Group) -> list[Path]:
    return [row["path"] for row in rows if row["path"]]


def _steps_to(tolerance: float) -> Column:
    def median(rows: Group) -> float | None:
        there = [step for path in _played(rows) if (step := reached(path, tolerance)) is not None]
        return statistics.median(there) if there and 2 * len(there) >= len(_played(rows)) else None

    said = "median steps until the error is at most this" if tolerance == TOLERANCES[0] else ""
    return Column(f"to {tolerance:g}", said, of=median)


_COLUMNS = (
    Column("found", f"relative error at most {_FOUND:g}", form=".0%", of=found),
    Column(f"in {_FEW} steps", form=".0%", of=lambda rows: found(rows, _FEW) if _played(rows) else None),
    Column("iterations", "until the attack stopped", "median steps"),
    Column("order", f"slope of log error on the log error a step before, in {TAIL[0]:g} … {TAIL[1]:g}", form=".2f",
           of=lambda rows: order(_played(rows))),
    *map(_steps_to, TOLERANCES),
)  # fmt: skip


def _paths(groups: Mapping[str, Group]) -> str:
    """Each victim's error in pale, and the median in full: after its last step an attack keeps its error."""
    series = []
    for name, rows in groups.items():
        paths = _played(rows)
        series += [Series("", *unzipped(path), "faint", like=name) for path in paths]
        stops = sorted({step for path in paths for step, _ in path})
        ends = [[next(error for step, error in reversed(path) if step <= stop) for path in paths] for stop in stops]
        if paths:
            series.append(Series(name, stops, [statistics.median(errors) for errors in ends]))
    panel = Panel("step", "relative error (median; pale: victims)", series, levels={"found": _FOUND}, log=True)
    return chart([panel], "relative error after each step")


def _against(groups: Mapping[str, Group], name: str, words: str) -> str:
    """Error, and share of inputs found, against a setting."""
    errors, shares = [], []
    ticks = sorted({row[name] for rows in groups.values() for row in rows if row[name] is not None})
    for said, rows in groups.items():
        here = {value: some for value in ticks if (some := [row for row in rows if row[name] == value])}
        spread = [sorted(row["relative_error"] for row in some) for some in here.values()]
        low, high = ([ends[round(at * (len(ends) - 1))] for ends in spread] for at in (0.25, 0.75))
        errors.append(Series(said, [*here], [*map(statistics.median, spread)], low=low, high=high))
        shares.append(Series(said, [*here], [found(some) for some in here.values()]))
    if name == "gamma" and any(ticks):
        ends = [min(filter(None, ticks)), ticks[-1]]
        errors.append(Series("error = gamma", ends, ends, "dotted", color=GREY))
    panels = [Panel(words, "relative error (median, quartiles)", errors, log=True, ticks=ticks)]
    panels += [Panel(words, f"inputs found, to {_FOUND:g}", shares, share=True, ticks=ticks)]
    return chart(panels, f"relative error, and inputs found, against {words}")
