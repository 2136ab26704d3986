"""Charts of attacks on attention outputs: how the error falls, and what starts, noise and gamma do to it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from fedtap.simulator.report.curves import GREY, STYLE, element, scale
from fedtap.simulator.scenario import Row

FOUND = 1e-6
"""Relative error from which an input counts as found."""

FEW = 10
"""Steps that a good method needs, from a start near the input."""

TAIL = (1e-7, 1e-2)
"""Errors between which convergence should be quadratic: below, rounding takes over."""

TOLERANCES = tuple(10.0**-power for power in range(2, 11, 2))

AGAINST = {"start_near_truth": "start's distance from the input", "gamma": "gamma", "noise": "noise on the output"}
"""Knobs that are charted when swept."""

Path = Sequence[tuple[int, float]]


def charts(rows: Sequence[Row], swept: Mapping[str, str]) -> dict[str, str]:
    """Heading -> figures or a chart, of the rows of a run.

    Args:
        swept: the knobs that have several values in it.
    """
    groups = grouped(rows, [*swept])
    made = {"How often, and how fast": _table(groups)}
    if any(row["path"] for row in rows):
        made["Error after each step"] = _paths(groups)
    for knob, words in AGAINST.items():
        if knob in swept:
            made[f"Against the {words}"] = _against(
                grouped(rows, [name for name in swept if name != knob]), knob, words
            )
    return made


def grouped(rows: Sequence[Row], knobs: Sequence[str]) -> dict[str, list[Row]]:
    """Rows that differ in the victim alone, by the values of these knobs and the attack."""
    several = len({row["attack"] for row in rows}) > 1
    groups: dict[str, list[Row]] = {}
    for row in rows:
        words = [f"{knob.replace('_', ' ')} {row[knob]}" for knob in knobs if knob in row]
        groups.setdefault(", ".join([row["attack"]] * several + words) or row["attack"], []).append(row)
    return groups


def found(rows: Sequence[Row], steps: float = math.inf) -> float:
    """Share of the victims whose input was found, in so many steps."""
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


def _table(groups: Mapping[str, Sequence[Row]]) -> str:
    head = ["", "found", f"in {FEW} steps", "median steps", "order", *(f"to {tolerance:g}" for tolerance in TOLERANCES)]
    body = []
    for label, rows in groups.items():
        paths = [row["path"] for row in rows if row["path"]]
        slope = order(paths)
        body.append(
            [
                label,
                f"{found(rows):.0%}",
                f"{found(rows, FEW):.0%}" if paths else "–",
                f"{statistics.median(row['iterations'] for row in rows):g}",
                "–" if slope is None else f"{slope:.2f}",
                *(_median([reached(path, tolerance) for path in paths]) for tolerance in TOLERANCES),
            ]
        )
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    said = (
        f"found: relative error at most {FOUND:g}; steps: until the attack stopped; order: slope of log error on the "
        f"log error a step before, in {TAIL[0]:g} … {TAIL[1]:g}; to …: median steps until the error is so small."
    )
    return f"<div class='scroll'><table><tr>{heads}</tr>{cells}</table></div><p class='pale'>{escape(said)}</p>"


def _median(steps: Sequence[int | None]) -> str:
    """Of those that got there; a dash where most did not."""
    there = [step for step in steps if step is not None]
    return f"{statistics.median(there):g}" if there and 2 * len(there) >= len(steps) else "–"


def _paths(groups: Mapping[str, Sequence[Row]]) -> str:
    """Each victim's error in pale, and the median in full."""
    with rc_context(STYLE):
        lines = -(-len(groups) // 3)
        figure = Figure(figsize=(9, 4.2 + 0.2 * lines), layout="constrained")
        axes = figure.subplots()
        axes.grid(color=GREY, alpha=0.2)
        for number, (label, rows) in enumerate(groups.items()):
            paths = [row["path"] for row in rows if row["path"]]
            for path in paths:
                axes.plot(*zip(*path, strict=True), color=f"C{number % 10}", alpha=0.2, linewidth=0.8)
            if paths:
                stops = sorted({step for path in paths for step, _ in path})
                median = [statistics.median(_at(path, stop) for path in paths) for stop in stops]
                axes.plot(stops, median, "o-", color=f"C{number % 10}", markersize=4, label=label)
        axes.set_yscale("log")
        if axes.get_xlim()[1] > 100:
            axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(left=-0.3)
        axes.axhline(FOUND, color=GREY, linestyle=":", label="found")
        axes.set_xlabel("step")
        axes.set_ylabel("relative error (median; pale: victims)")
        figure.legend(loc="outside lower center", ncols=3)
        return element(figure, "relative error after each step")


def _at(path: Path, stop: int) -> float:
    """The error after so many steps: the last, where the attack had stopped by then."""
    return next(error for step, error in reversed(path) if step <= stop)


def _against(groups: Mapping[str, Sequence[Row]], knob: str, words: str) -> str:
    """Error, and share of inputs found, against a knob."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        error, share = figure.subplots(1, 2)
        for number, (label, rows) in enumerate(groups.items()):
            values = sorted({row[knob] for row in rows if row[knob] is not None})
            here = [[row for row in rows if row[knob] == value] for value in values]
            errors = [sorted(row["relative_error"] for row in some) for some in here]
            color = f"C{number % 10}"
            error.plot(
                values, [statistics.median(some) for some in errors], "o-", color=color, markersize=4, label=label
            )
            low, high = ([_quantile(some, at) for some in errors] for at in (0.25, 0.75))
            error.fill_between(values, low, high, color=color, alpha=0.12, linewidth=0)
            share.plot(values, [found(some) for some in here], "o-", color=color, markersize=4)
        if knob == "gamma":
            ends = sorted({row[knob] for rows in groups.values() for row in rows if row[knob]})
            if ends:
                error.plot([ends[0], ends[-1]], [ends[0], ends[-1]], color=GREY, linestyle=":", label="error = gamma")
        error.set_yscale("log")
        error.set_ylabel("relative error (median, quartiles)")
        share.set_ylabel(f"inputs found, to {FOUND:g}")
        share.set_ylim(-0.05, 1.05)
        for axes in (error, share):
            scale(axes, sorted({row[knob] for rows in groups.values() for row in rows if row[knob] is not None}))
            axes.set_xlabel(words)
            axes.grid(color=GREY, alpha=0.2)
        figure.legend(loc="outside lower center", ncols=3)
        return element(figure, f"relative error, and inputs found, against {words}")


def _quantile(values: Sequence[float], at: float) -> float:
    return values[round(at * (len(values) - 1))]
