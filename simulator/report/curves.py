"""Curves: what each attack got, against a swept knob or against ε; drawn by matplotlib for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

GREY = "#808795"
"""Of lines and words: it is read on white and on black."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedtap",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 10,
}

MANY = 8
"""Values from which on the axis shows only some."""


class Curve:
    """One attack: at each value of the knob its PSNR (median and quartiles, dB) and its mean squared error."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.points: list[tuple[float, float, float, float, float]] = []

    def add(self, value: float, psnr: float, low: float, high: float, mse: float) -> None:
        """What it got at this value."""
        self.points.append((value, psnr, low, high, mse))


def svg(knob: str, curves: Sequence[Curve], floor: float | None) -> str:
    """Two charts beside each other, PSNR and MSE against the knob, as an SVG element that stretches to its place.

    Args:
        floor: PSNR of the blind guess, in dB.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        quality, error = figure.subplots(1, 2)
        values = sorted({point[0] for curve in curves for point in curve.points})
        for number, curve in enumerate(curves):
            at, psnr, low, high, mse = zip(*sorted(curve.points), strict=True)
            how = {"color": f"C{number % 10}", "marker": "o", "markersize": 4, "linestyle": LINES[number // 10 % 3]}
            quality.plot(at, psnr, label=curve.label, **how)
            quality.fill_between(at, low, high, color=how["color"], alpha=0.12, linewidth=0)
            error.plot(at, mse, **how)
        if floor is not None:
            quality.axhline(floor, color=GREY, linestyle=":", label="blind guess")
        error.set_yscale("log")
        quality.set_ylabel("PSNR, dB (median, quartiles)")
        error.set_ylabel("MSE (mean)")
        for axes in (quality, error):
            axes.set_xlabel(knob)
            axes.grid(color=GREY, alpha=0.2)
            scale(axes, values)
        figure.legend(loc="outside lower center", ncols=3)
        return element(figure, f"PSNR and MSE against {knob}")


@dataclass(frozen=True)
class Success:
    """At one ε how often an attacker succeeded, the limits of what that may mean, and the bound; all in [0, 1]."""

    epsilon: float
    success: float
    low: float
    high: float
    bound: float


def success_svg(series: Mapping[str, Sequence[Success]]) -> str:
    """Success with its limits, and the bound as a line, against ε; as an SVG element that stretches to its place."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (label, points) in enumerate(series.items()):
            points = sorted(points, key=lambda point: point.epsilon)
            at, won, bound = zip(*((point.epsilon, point.success, point.bound) for point in points), strict=True)
            limits = zip(*((point.success - point.low, point.high - point.success) for point in points), strict=True)
            axes.errorbar(at, won, tuple(limits), label=label, fmt="o", markersize=4, capsize=3, color=f"C{number}")
            axes.plot(at, bound, label=f"{label}: bound", color=f"C{number}", linestyle=LINES[1])
        axes.set_xlabel("ε")
        axes.set_ylabel("share of games won")
        axes.grid(color=GREY, alpha=0.2)
        scale(axes, sorted({point.epsilon for points in series.values() for point in points}))
        figure.legend(loc="outside lower center", ncols=2)
        return element(figure, "success against ε")


@dataclass(frozen=True)
class Trade:
    """What a defence leaves to an attacker, and to the model."""

    label: str
    accuracy: float
    """On test data, in [0, 1]."""
    psnr: float
    """Median over images, over that of a blind guess, in dB."""
    success: float
    """Share of images that came back, in [0, 1]."""


def trade_svg(series: Mapping[str, Sequence[Trade]], share: str) -> str:
    """PSNR over the blind guess, and success, against accuracy, each defence named at the right; as `svg` does.

    Args:
        share: what success is a share of.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        quality, success = figure.subplots(1, 2)
        for number, (label, points) in enumerate(series.items()):
            for axes, name in ((quality, "psnr"), (success, "success")):
                at, got = [point.accuracy for point in points], [getattr(point, name) for point in points]
                how = {"color": f"C{number % 10}", "markersize": 7 - 2 * (number % 3), "zorder": 3}
                axes.plot(at, got, "osD"[number % 3], label=label if axes is quality else None, **how)
        quality.axhline(0, color=GREY, linestyle=":", label="blind guess")
        quality.set_ylabel("PSNR over a blind guess, dB (median)")
        success.set_ylabel(share)
        success.set_ylim(-0.05, 1.05)
        for axes, name in ((quality, "psnr"), (success, "success")):
            axes.set_xlabel("test accuracy of the trained model")
            axes.margins(0.08)
            axes.grid(color=GREY, alpha=0.2)
            _name(axes, [point for points in series.values() for point in points], name)
        figure.legend(loc="outside lower center", ncols=4)
        return element(figure, "privacy against accuracy")


def _name(axes: Axes, points: Sequence[Trade], height: str) -> None:
    """Each label at the right of the axes, with a line to the highest of its points."""
    highest: dict[tuple[str, float], float] = {}
    for point in points:
        key = point.label, point.accuracy
        highest[key] = max(highest.get(key, -math.inf), getattr(point, height))
    low, high = axes.get_ylim()
    names = sorted(highest, key=lambda key: (highest[key], key[1]))
    places = apart([(highest[key] - low) / (high - low) for key in names], LINE)
    for (label, across), place in zip(names, places, strict=True):
        axes.annotate(
            label,
            (across, highest[label, across]),
            xytext=(1.03, place),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GREY, "alpha": 0.45, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3},
        )


LINE = 0.055
"""Height of a label's line, as a share of the axes'."""


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising numbers, moved as little (by least squares) as a gap between them allows; in [0, 1] where they fit."""
    shifted = [height - number * gap for number, height in enumerate(heights)]
    blocks: list[tuple[float, int]] = []  # isotonic regression: neighbours that would overlap share their mean
    for value in shifted:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (one, many), (other, more) = blocks[-2:]
            blocks[-2:] = [((one * many + other * more) / (many + more), many + more)]
    last = max(1 - gap * (len(shifted) - 1), 0.0)
    even = [min(max(value, 0.0), last) for value, count in blocks for _ in range(count)]
    return [value + number * gap for number, value in enumerate(even)]


def element(figure: Figure, words: str) -> str:
    """A figure as an SVG element that stretches to its place; `words` are for those who do not see it."""
    content = BytesIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue().decode()
    return text[text.index("<svg") :].replace("<svg ", f"<svg role='img' aria-label='{words}' ", 1)


LINES = ("-", "--", ":")


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values span more than one order of magnitude, with room for a zero; their own ticks."""
    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and positive[-1] > 10 * positive[0]:
        if positive == list(values):
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
            axes.set_xlim(left=-positive[0] / 4)
    ticks = values if len(values) <= MANY else values[:: -(-len(values) // MANY)]
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def share_svg(knob: str, series: Mapping[str, Sequence[tuple[float, float]]], limit: float | None = None) -> str:
    """A share of right guesses, in [0, 1], against a knob: (value, share) of each run, and their means as a line.

    Args:
        limit: a value of the knob that is marked.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (label, points) in enumerate(series.items()):
            at = sorted({value for value, _ in points})
            means = [[share for value, share in points if value == here] for here in at]
            axes.plot(
                [value for value, _ in points], [share for _, share in points], "o", color=f"C{number}", alpha=0.3
            )
            axes.plot(at, [sum(shares) / len(shares) for shares in means], color=f"C{number}", label=label)
        if limit is not None:
            axes.axvline(limit, color=GREY, linestyle=":")
        axes.set_xlabel(knob)
        axes.set_ylabel("share of tokens that are right")
        axes.set_ylim(-0.05, 1.05)
        axes.grid(color=GREY, alpha=0.2)
        scale(axes, sorted({value for points in series.values() for value, _ in points}))
        figure.legend(loc="outside lower center", ncols=3)
        return element(figure, f"share of right tokens against {knob}")
