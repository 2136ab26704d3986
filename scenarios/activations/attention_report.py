"""Charts of attacks on attention outputs: how the error falls, and what starts, noise and gamma do to it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from fedtap.simulator.report.charts import GREY, Panel, Series, chart, unzipped
from fedtap.simulator.report.columns import Column, Group, grouped, legend, listing, setting

FOUND = 1e-6
"""Relative error from which an input counts as found."""

FEW = 10
"""Steps that a good method needs, from a start near the input."""

TAIL = (1e-7, 1e-2)
"""Errors between which convergence should be quadratic: below, rounding takes over."""

TOLERANCES = tuple(10.0**-power for power in range(2, 11, 2))

AGAINST = {"start_off": "start's distance from the input", "gamma": "gamma", "noise": "noise on the output"}
"""Settings that are charted when swept."""

Path = Sequence[tuple[int, float]]


def charts(rows: Group, swept: Mapping[str, str]) -> dict[str, str]:
    """Heading -> figures or a chart, of the rows of a run.

    Args:
        swept: the settings that have several values in it.
    """
    groups = _labelled(rows, [*swept])
    columns = [Column("", over="same", of=lambda some: _label(some, rows, [*swept])), *COLUMNS]
    figures = f"{listing([*groups.values()], columns)}<p class='pale'>{escape(legend(columns, [*groups.values()]))}</p>"
    made = {"How often, and how fast": figures}
    if any(row["path"] for row in rows):
        made["Error after each step"] = _paths(groups)
    for name, words in AGAINST.items():
        if name in swept:
            others = _labelled(rows, [other for other in swept if other != name])
            made[f"Against the {words}"] = _against(others, name, words)
    return made


def _label(some: Group, rows: Group, names: Sequence[str]) -> str:
    """The values of these settings, and the attack where there are several."""
    several = len({row["attack"] for row in rows}) > 1
    words = [f"{name.replace('_', ' ')} {some[0][name]}" for name in names if name in some[0]]
    return ", ".join([some[0]["attack"]] * several + words) or str(some[0]["attack"])


def _labelled(rows: Group, names: Sequence[str]) -> dict[str, Group]:
    return {_label(some, rows, names): some for some in grouped(rows, [*map(setting, ("attack", *names))])}


def found(rows: Group, steps: float = math.inf) -> float:
    """Share of the victims whose input was found, in at most this number of steps."""
    if steps == math.inf:
        return statistics.fmean(row["relative_error"] <= FOUND for row in rows)
    return statistics.fmean((reached(row["path"], FOUND) or math.inf) <= steps for row in rows)


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


def _pathes(rows: Group) -> list[Path]:
    return [row["path"] for row in rows if row["path"]]


def _steps_to(tolerance: float) -> Column:
    def median(rows: Group) -> float | None:
        there = [step for path in _pathes(rows) if (step := reached(path, tolerance)) is not None]
        return statistics.median(there) if there and 2 * len(there) >= len(_pathes(rows)) else None

    said = "median steps until the error is at most this" if tolerance == TOLERANCES[0] else ""
    return Column(f"to {tolerance:g}", said, of=median)


COLUMNS = (
    Column("found", f"relative error at most {FOUND:g}", form=".0%", of=found),
    Column(f"in {FEW} steps", form=".0%", of=lambda rows: found(rows, FEW) if _pathes(rows) else None),
    Column("iterations", "until the attack stopped", "median steps"),
    Column("order", f"slope of log error on the log error a step before, in {TAIL[0]:g} … {TAIL[1]:g}", form=".2f",
           of=lambda rows: order(_pathes(rows))),
    *map(_steps_to, TOLERANCES),
)  # fmt: skip


def _paths(groups: Mapping[str, Group]) -> str:
    """Each victim's error in pale, and the median in full: after its last step an attack keeps its error."""
    series = []
    for label, rows in groups.items():
        paths = _pathes(rows)
        series += [Series("", *unzipped(path), "faint", like=label) for path in paths]
        stops = sorted({step for path in paths for step, _ in path})
        ends = [[next(error for step, error in reversed(path) if step <= stop) for path in paths] for stop in stops]
        if paths:
            series.append(Series(label, stops, [statistics.median(errors) for errors in ends]))
    panel = Panel("step", "relative error (median; pale: victims)", series, levels={"found": FOUND}, log=True)
    return chart([panel], "relative error after each step")


def _against(groups: Mapping[str, Group], name: str, words: str) -> str:
    """Error, and share of inputs found, against a setting."""
    errors: list[Series] = []
    shares: list[Series] = []
    ticks: set[float] = set()
    for label, rows in groups.items():
        here = {
            value: [row for row in rows if row[name] == value]
            for value in sorted({row[name] for row in rows if row[name] is not None})
        }
        ends = [
            [_quantile([row["relative_error"] for row in some], at) for some in here.values()]
            for at in (0.25, 0.5, 0.75)
        ]
        errors.append(Series(label, [*here], ends[1], low=ends[0], high=ends[2]))
        shares.append(Series(label, [*here], [found(some) for some in here.values()]))
        ticks |= here.keys()
    if name == "gamma" and (known := sorted(ticks - {0.0})):
        errors.append(Series("error = gamma", [known[0], known[-1]], [known[0], known[-1]], "dotted", color=GREY))
    panels = [Panel(words, "relative error (median, quartiles)", errors, log=True, ticks=[*ticks])]
    panels += [Panel(words, f"inputs found, to {FOUND:g}", shares, share=True, ticks=[*ticks])]
    return chart(panels, f"relative error, and inputs found, against {words}")


def _quantile(values: Sequence[float], at: float) -> float:
    return statistics.median(values) if at == 0.5 else sorted(values)[round(at * (len(values) - 1))]
