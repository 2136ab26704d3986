"""Charts of pseudo-data: how their statistics converge, where the points lie, and which statistics are the data's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fedtap.simulator.report.curves import GREY, STYLE, element

LARGEST = 60.0
"""Area of the heaviest point, in square points."""


@dataclass(frozen=True)
class Course:
    """One statistic while an attack runs, in units in which the truth is 1 (or, of a mean, off by deviations)."""

    label: str
    values: Sequence[float]
    oracle: float | None = None


def convergence(panels: Mapping[str, Sequence[Course]], iterations: Sequence[int], reference: str) -> str:
    """Panels beside each other, each with some statistics against the iterations, and where they ought to end."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.0), layout="constrained")
        for axes, (title, courses) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for number, course in enumerate(courses):
                axes.plot(iterations, course.values, label=course.label, color=f"C{number}")
                if course.oracle is not None:
                    axes.axhline(course.oracle, color=f"C{number}", linestyle=":", label=f"{course.label}, oracle")
            axes.axhline(0.0 if "deviation" in title else 1.0, color=GREY, linestyle="--", label=reference)
            axes.set_title(title, fontsize=10, color=GREY)
            axes.set_xlabel("iteration")
            spread = [value for course in courses for value in course.values if value > 0]
            if "deviation" not in title and spread and max(spread) > 10 * min(spread):
                axes.set_yscale("log")
            if iterations[-1] > 100:
                axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(left=0)
            axes.grid(color=GREY, alpha=0.2)
            axes.legend(fontsize=8)
        return element(figure, "statistics of the pseudo-data against iterations")


def points(
    real: Float[Tensor, "records columns"] | None,
    guesses: Mapping[str, tuple[Float[Tensor, "pseudo columns"], Float[Tensor, "pseudo"]]],
    names: tuple[str, str],
) -> str:
    """The first and the last column: real records, and each guess's points, as large as their weights."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        subplots = figure.subplots(1, len(guesses), squeeze=False, sharex=True, sharey=True)[0]
        for number, (axes, (label, (found, weights))) in enumerate(zip(subplots, guesses.items(), strict=True)):
            if real is not None:
                axes.scatter(
                    real[:, 0], real[:, -1], s=8, color=GREY, alpha=0.45, linewidths=0, label="private records"
                )
            size = LARGEST * weights / weights.max()
            axes.scatter(
                found[:, 0], found[:, -1], s=size, label=label, facecolors="none", edgecolors=f"C{number}", alpha=0.8
            )
            axes.set_xlabel(names[0])
            axes.set_ylabel(names[1])
            axes.grid(color=GREY, alpha=0.2)
            axes.legend(fontsize=8, loc="upper left", frameon=True, framealpha=0.6)
        return element(figure, "pseudo-data over the private records")


def ratios(
    series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, ticks: Sequence[str] | None = None
) -> str:
    """Points (across, up) of some series, and the line at 1."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (label, some) in enumerate(series.items()):
            shift = 0.08 * (number - (len(series) - 1) / 2)
            axes.plot([x + shift for x, _ in some], [y for _, y in some], "o", label=label, color=f"C{number}")
        axes.axhline(1.0, color=GREY, linestyle="--", label="truth")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks)
        axes.grid(color=GREY, alpha=0.2)
        figure.legend(loc="outside lower center", ncols=6)
        return element(figure, f"{up} against {across}")


def differences(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], told: Mapping[str, float], across: str
) -> str:
    """Panels of relative differences against the order of a moment; a line after the last that is told."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        subplots = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, series) in zip(subplots, panels.items(), strict=True):
            for number, (label, some) in enumerate(series.items()):
                sound = [(x, y) for x, y in some if math.isfinite(y)]
                axes.plot(*zip(*sound, strict=True), "o-", label=label, color=f"C{number}", markersize=4)
            axes.axvline(told[title] + 0.5, color=GREY, linestyle="--")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_yscale("log")
            axes.set_title(title, fontsize=10, color=GREY)
            axes.set_xlabel(across)
            axes.grid(color=GREY, alpha=0.2)
        subplots[0].set_ylabel("relative difference")
        handles, labels = subplots[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return element(figure, f"relative difference against {across}")
