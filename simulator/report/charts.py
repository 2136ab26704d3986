"""Charts, drawn by matplotlib as SVG: panels of series in, an element of a page out, equal to the byte each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = "#808795"
"""Of lines and words: it is read on white and on black."""

COLORS = ("#2478b5", "#c25a00", "#1b8a5a", "#b0529c", "#8a7300", "#128299", "#d0433f", "#7766cc", "#7a7a7a", "#a86032")
"""Of series: each is told from a white and from a dark page by a contrast of 3:1 at least."""

_STYLE: Any = {
    "axes.prop_cycle": f"cycler('color', {[color.removeprefix('#') for color in COLORS]})",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fedtap",  # ids that would be random
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 10,
}

MANY = 8
"""Values from which on the axis names only some."""

LINE = 0.055
"""Height of a point's name beside a panel, as a share of the panel's."""

_KINDS: dict[str, dict[str, Any]] = {
    "line": {"linestyle": "-", "marker": "o", "markersize": 4},
    "smooth": {"linestyle": "-"},
    "dashed": {"linestyle": "--"},
    "dotted": {"linestyle": ":"},
    "faint": {"linestyle": "-", "alpha": 0.2, "linewidth": 0.8},
    "dots": {"linestyle": "", "marker": "o", "markersize": 6},
    "pale": {"linestyle": "", "marker": "o", "markersize": 5, "alpha": 0.35},
    "specks": {"linestyle": "", "marker": "o", "markersize": 3, "alpha": 0.45, "markeredgewidth": 0},
    "open": {"linestyle": "", "marker": "o", "markersize": 5, "alpha": 0.7, "markerfacecolor": "none"},
    "bars": {"linestyle": "", "marker": "o", "markersize": 4, "capsize": 3},
}


@dataclass(frozen=True)
class Series:
    """Points of one kind, drawn in one colour."""

    label: str
    """In the legend, where it is said once; of several series without one, each has that of another, `like`."""
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["line", "smooth", "dashed", "dotted", "faint", "dots", "pale", "specks", "open", "bars"] = "line"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """The ends of what y may be: a band around a line, or bars."""
    sizes: Sequence[float] = ()
    """Of each point, its weight, as an area."""
    names: Sequence[str] = ()
    """Of each point, its name, which stands at the right of the panel."""
    like: str = ""
    """Label of the series whose colour it has; its own unless said."""
    color: str = ""
    """For what is no result, such as GREY."""


@dataclass(frozen=True)
class Panel:
    """Series on one pair of axes."""

    across: str
    """What the axis across is about, in words with units."""
    up: str
    series: Sequence[Series]
    title: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)
    """Label -> a height that is marked by a line, such as that of a blind guess."""
    mark: float | None = None
    """A value across that is marked by a line."""
    log: bool = False
    """Whether the axis up is logarithmic."""
    share: bool = False
    """Whether it runs from 0 to 1."""
    ticks: Sequence[float] = ()
    """The values that the axis across names, as `scale` does; matplotlib's unless said."""
    ticknames: Sequence[str] = ()
    """What stands at 0, 1, 2, … across, where these are no numbers."""
    row_names: Sequence[str] = ()
    """What stands at 0, 1, 2, … from the top down, where these are no numbers."""


def unzipped(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """The x and the y of points (x, y)."""
    return [x for x, _ in points], [y for _, y in points]


def chart(panels: Sequence[Panel], words: str, height: float = 4.2, across: int = 3) -> str:
    """Panels beside each other, with one legend, as an SVG element that stretches to its place.

    Args:
        words: what is seen, for those who do not see it.
        height: of a row of panels, of which the width is 11, or 9 where there is one.
        across: panels in a row, at most; they share an axis that has the same words.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = -(-len(panels) // across)
    with rc_context(_STYLE):
        width = 11 if len(panels) > 1 else 9
        figure = Figure(figsize=(width, height * lines), layout="constrained")
        one_x, one_y = (
            len(panels) > 1 and len({*axis}) == 1 and "" not in axis
            for axis in ([panel.across for panel in panels], [panel.up for panel in panels])
        )
        grid = figure.subplots(lines, -(-len(panels) // lines), sharex=one_x, sharey=one_y, squeeze=False)
        places = grid.flatten()
        colors: dict[str, str] = {}
        entries: dict[str, Any] = {"": None}
        for axes, panel in zip(places, panels, strict=False):
            for series in panel.series:
                name = series.like or series.label
                color = series.color or colors.setdefault(name, f"C{len(colors) % 10}")
                entries.setdefault(series.label, _draw(axes, series, color))
            for label, level in panel.levels.items():
                entries.setdefault(label, axes.axhline(level, color=GREY, linestyle=":"))
            if panel.mark is not None:
                axes.axvline(panel.mark, color=GREY, linestyle="--")
            axes.set(xlabel=_plain(panel.across), ylabel=_plain(panel.up))
            axes.set_title(_plain(panel.title), fontsize=10, color=GREY)
            axes.grid(color=GREY, alpha=0.2)
            if panel.log:
                axes.set_yscale("log")
            if panel.share:
                axes.set_ylim(-0.05, 1.05)
            if panel.row_names:
                axes.set_yticks(range(len(panel.row_names)), map(_plain, panel.row_names))
                axes.set_ylim(len(panel.row_names) - 0.5, -0.5)
            if panel.ticks:
                scale(axes, sorted({*panel.ticks}))
            elif panel.ticknames:
                axes.set_xticks(range(len(panel.ticknames)), panel.ticknames)
            elif all(isinstance(value, int) for series in panel.series for value in series.x):
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
                if axes.get_xlim()[1] > 100:
                    axes.set_xscale("symlog", linthresh=10)
            _name(axes, panel.series)
        for axes in grid[:, 1:].flatten() if one_y else ():
            axes.set_ylabel("")
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        del entries[""]
        columns = max(1, min(4, 13 * width // (8 + max(map(len, entries)))))
        figure.legend([*entries.values()], map(_plain, entries), loc="outside lower center", ncols=columns)
        content = BytesIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue().decode().replace(f": {GREY}", ": currentColor")  # the page's own, light or dark
    kind = "panels" if len(panels) > 1 else "panel"
    return text[text.index("<svg") :].replace(
        "<svg ", f"<svg role='img' aria-label='{escape(words)}' class='{kind}' ", 1
    )


def _plain(words: str) -> str:
    """A $ is a $, and begins no formula."""
    return words.replace("$", r"\$")


def _draw(axes: Axes, series: Series, color: str) -> Any:
    """What the legend shows of it."""
    x, y = series.x, series.y
    if series.sizes:
        return axes.scatter(x, y, s=series.sizes, edgecolors=color, facecolors="none", alpha=0.8)
    if series.kind == "bars":
        limits = [
            [b - a for a, b in zip(series.low, y, strict=True)],
            [b - a for a, b in zip(y, series.high, strict=True)],
        ]
        return axes.errorbar(x, y, limits, color=color, **_KINDS["bars"])
    if series.low:
        axes.fill_between(x, series.low, series.high, color=color, alpha=0.12, linewidth=0)
    how = {**_KINDS[series.kind], "color": color}
    if series.kind in ("line", "dots") and color.startswith("C"):  # told apart without colour too
        how["marker"] = "osD^v"[int(color[1:]) % 5]
    if series.names:  # points of several series at one place do not hide each other
        number = int(color[1:]) % 3
        how |= {"marker": "osD"[number], "markersize": 7 - 2 * number, "zorder": 3}
    return axes.plot(x, y, **how)[0]


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values span more than one order of magnitude, with room for a zero; their own ticks."""
    from matplotlib.ticker import NullLocator

    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and positive[-1] > 10 * positive[0]:
        if positive == list(values):
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
            axes.set_xlim(left=-positive[0] / 4)
    ticks = values if len(values) <= MANY else values[:: -(-len(values) // MANY)]
    axes.set_xticks(ticks, [f"{value:.3g}" for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _name(axes: Axes, series: Sequence[Series]) -> None:
    """Each point's name at the right of the panel, with a line to the highest point of that name and place."""
    highest: dict[tuple[str, float], float] = {}
    for one in series:
        for name, x, y in zip(one.names, one.x, one.y, strict=False):
            highest[name, x] = max(highest.get((name, x), -math.inf), y)
    low, high = axes.get_ylim()
    ranked = sorted(highest, key=lambda key: (highest[key], key[1]))
    places = _apart([(highest[key] - low) / (high - low) for key in ranked], LINE) if ranked else []
    arrow = {"arrowstyle": "-", "color": GREY, "alpha": 0.45, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3}
    for (name, x), place in zip(ranked, places, strict=True):
        at: Any = {"xy": (x, highest[name, x]), "xytext": (1.03, place), "textcoords": "axes fraction"}
        axes.annotate(_plain(name), **at, fontsize=8, va="center", annotation_clip=False, arrowprops=arrow)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising numbers, moved as little (by least squares) as a gap between them allows; in [0, 1] where they fit."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    gaps = gap * np.arange(len(heights))
    last = max(1 - gap * (len(heights) - 1), 0.0)
    return (isotonic_regression(np.asarray(heights) - gaps).x.clip(0, last) + gaps).tolist()  # type: ignore[no-any-return]
