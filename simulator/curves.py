"""Curves: what each attack got, against a swept knob or against ε; drawn by matplotlib for the page."""

from __future__ import annotations

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
            _scale(axes, values)
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
        _scale(axes, sorted({point.epsilon for points in series.values() for point in points}))
        figure.legend(loc="outside lower center", ncols=2)
        return element(figure, "success against ε")


@dataclass(frozen=True)
class Trade:
    """What a defence at one ε leaves to an attacker, and to the model."""

    epsilon: str
    accuracy: float
    """On test data, in [0, 1]."""
    psnr: float
    """Median over victims, over that of a blind guess, in dB."""
    success: float
    """Share of victims, in [0, 1]."""


def trade_svg(series: Mapping[str, Sequence[Trade]]) -> str:
    """PSNR over the blind guess, and success, against accuracy, with ε at each point; as `svg` does."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        quality, success = figure.subplots(1, 2)
        for number, (label, points) in enumerate(series.items()):
            for axes, name in ((quality, "psnr"), (success, "success")):
                at, got = [point.accuracy for point in points], [getattr(point, name) for point in points]
                legend = label if axes is quality else None
                axes.plot(at, got, "o", markersize=6, color=f"C{number % 10}", label=legend)
                for point, x, y, step in zip(points, at, got, _stairs(at, got), strict=True):
                    place = {"xytext": (4, 6 + 11 * step), "textcoords": "offset points", "fontsize": 9}
                    axes.annotate(f"ε = {point.epsilon}", (x, y), **place)
        quality.axhline(0, color=GREY, linestyle=":", label="blind guess")
        quality.set_ylabel("PSNR over a blind guess, dB (median)")
        success.set_ylabel("success (share of victims)")
        success.set_ylim(-0.05, 1.25)
        for axes in (quality, success):
            axes.set_xlabel("test accuracy of the trained model")
            axes.margins(x=0.18)
            axes.grid(color=GREY, alpha=0.2)
        figure.legend(loc="outside lower center", ncols=3)
        return element(figure, "privacy against accuracy, ε at the points")


def _stairs(across: Sequence[float], up: Sequence[float]) -> list[int]:
    """How many lines each point's words are lifted, so that they do not cover those of a neighbour."""
    wide, high = (0.25 * (max(values) - min(values)) or 1.0 for values in (across, up))
    steps = [0] * len(across)
    done: list[int] = []
    for here in sorted(range(len(across)), key=lambda number: across[number]):
        near = {
            steps[there]
            for there in done
            if abs(across[here] - across[there]) < wide and abs(up[here] - up[there]) < high / 2
        }
        steps[here] = next(step for step in range(len(across)) if step not in near)
        done.append(here)
    return steps


def element(figure: Figure, words: str) -> str:
    """A figure as an SVG element that stretches to its place; `words` are for those who do not see it."""
    content = BytesIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue().decode()
    return text[text.index("<svg") :].replace("<svg ", f"<svg role='img' aria-label='{words}' ", 1)


LINES = ("-", "--", ":")


def _scale(axes: Axes, values: Sequence[float]) -> None:
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
        _scale(axes, sorted({value for points in series.values() for value, _ in points}))
        figure.legend(loc="outside lower center", ncols=3)
        return element(figure, f"share of right tokens against {knob}")
