"""All benches that `make bench` runs, in one go: printed, written as JSON, and drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fedtap.scenarios.bench.attacks import attack_ratios, work_costs
from fedtap.scenarios.bench.documents import document_ratios
from fedtap.scenarios.bench.federation import federation_ratios
from fedtap.scenarios.bench.ratios import Ratio, WorkCost, processor, write_bench

_HEADINGS = {
    "federation": "The federation in this process",
    "defences": "A client's step with each defence",
    "match": "An iteration of gradient matching",
    "attention": "Attention's inputs by Newton's method",
    "posterior": "The attack on a posterior",
    "documents": "Documents' gradients",
}


def run_benches(out: Path) -> None:
    """Print each ratio as it is measured: median [least, largest] of its turns, and the faster side's time.

    Args:
        out: file of the ratios and costs; beside it, with the ending .svg, goes the plot of cost against work.

    Raises:
        FedtapError: the file cannot be written.
    """
    torch.set_num_threads(1)
    print(f"{processor()}, torch {torch.__version__}, 1 thread: how many times as long the first takes as the second")
    ratios, heading = list[Ratio](), ""
    for ratio in _ratios():
        if ratio.group != heading:
            heading = ratio.group
            print(_HEADINGS[heading])
        print(ratio.line() + ("" if ratio.device == "cpu" else f" ({ratio.device})"), flush=True)
        ratios.append(ratio)
    found = list(work_costs())
    for cost in found:
        steps = ", ".join(f"{size}: {1e3 * took:.3g}" for size, took in zip(cost.sizes, cost.seconds, strict=True))
        print(f"WorkCost of {cost.what} by {cost.unit}, ms ({cost.device}): {steps}")
    write_bench(out, ratios, found)
    plot_costs(found, out.with_suffix(".svg"))
    print(f"Figures: {out}   plot: {out.with_suffix('.svg')}")


def _ratios() -> Iterator[Ratio]:
    yield from federation_ratios()
    yield from attack_ratios()
    yield from document_ratios()


def plot_costs(found: Sequence[WorkCost], path: Path) -> None:
    """Time against work, one panel a kind of work, one line a device."""
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(cost.unit for cost in found))
    columns = math.ceil(math.sqrt(len(units)))
    figure = Figure(figsize=(4 * columns, 3.2 * math.ceil(len(units) / columns)), layout="constrained")
    for place, unit in enumerate(units, 1):
        axes = figure.add_subplot(math.ceil(len(units) / columns), columns, place)
        for cost in (one for one in found if one.unit == unit):
            axes.plot(cost.sizes, [1e3 * took for took in cost.seconds], marker="o", label=cost.device)
            axes.set_title(cost.what, fontsize=9)
        axes.set(xscale="log", yscale="log", xlabel=unit, ylabel="ms")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
