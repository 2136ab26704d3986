"""Charts about trained models: recovery against width, and scores of vulnerability against recovery."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from fedtap.simulator.report.curves import GREY, STYLE, element
from fedtap.simulator.scenario import Row

ACROSS = 3
"""Charts beside each other."""


def recovery_svg(rows: Sequence[Row]) -> str:
    """The share of examples recovered, each client a dot and their mean a line, against width, for each attack."""
    widths = sorted({row["width"] for row in rows})
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, attack in enumerate(dict.fromkeys((row["attack"], row["regulariser"]) for row in rows)):
            own = [row for row in rows if (row["attack"], row["regulariser"]) == attack]
            got = {width: [row["recovered"] for row in own if row["width"] == width] for width in widths}
            here = [width for width in widths if got[width]]
            label = ", ".join(attack)
            axes.plot(here, [statistics.mean(got[width]) for width in here], label=label, color=f"C{number}")
            dots = [(width, share) for width in here for share in got[width]]
            axes.plot(*zip(*dots, strict=True), "o", color=f"C{number}", markersize=4, alpha=0.4)
        blind = statistics.mean(row["blind"] for row in rows)
        axes.axhline(blind, color=GREY, linestyle=":", label="random points")
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_xlabel("width")
        axes.set_ylabel("share of examples recovered")
        axes.set_ylim(-0.05, 1.05)
        axes.grid(color=GREY, alpha=0.2)
        figure.legend(loc="outside lower center", ncols=2)
        return element(figure, "share recovered against width")


def scatter_svg(rows: Sequence[Row], named: Mapping[str, str]) -> str:
    """Recovery against each of some scores, a dot a case; those that the score was not chosen on are filled.

    Args:
        named: score's column -> what it is called.
    """
    with rc_context(STYLE):
        lines = -(-len(named) // ACROSS)
        figure = Figure(figsize=(11, 3.6 * lines), layout="constrained")
        places = figure.subplots(lines, ACROSS, squeeze=False).flatten()
        for axes in places[len(named) :]:
            axes.set_axis_off()
        for axes, (column, name) in zip(places, named.items(), strict=False):
            for number, regulariser in enumerate(dict.fromkeys(row["regulariser"] for row in rows)):
                for held, face in ((False, "none"), (True, f"C{number}")):
                    own = [row for row in rows if row["regulariser"] == regulariser and row["validation"] is held]
                    axes.plot(
                        [row[column] for row in own],
                        [row["recovered"] for row in own],
                        "o",
                        color=f"C{number}",
                        markerfacecolor=face,
                        markersize=5,
                        alpha=0.7,
                        label=regulariser if held and axes is figure.axes[0] else None,
                    )
            axes.set_xlabel(name)
            axes.set_ylim(-0.05, 1.05)
            axes.grid(color=GREY, alpha=0.2)
        for axes in places[::ACROSS]:
            axes.set_ylabel("share of examples recovered")
        figure.legend(loc="outside lower center", ncols=3, title="filled: not used to choose among the scores")
        return element(figure, "share recovered against scores of vulnerability")
