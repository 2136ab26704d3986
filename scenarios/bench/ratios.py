"""What is timed in turns: how many times as long one thing takes as another, in one run on one machine.

A machine's speed changes from minute to minute, and a ratio of two things timed one after the other does not: `Ratio`
keeps that of each turn. `bench_changes` tells a change between two benches from their scatter.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import mannwhitneyu

from fedtap.clients.cost import TURNS
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import read_json, write_atomically

BENCH_FORMAT = 1
"""Version of a bench's file; a reader refuses any other."""

_LEAST_SECONDS = 0.02
"""A side that takes less than this is repeated within its turn until it does."""

_DOUBT, _LEAST_CHANGE = 0.001, 0.05
"""A change counts where the turns of two benches would differ so by chance with at most this probability, and their
medians differ by this share at least."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long `slow` takes as `fast`, turn by turn."""

    what: str
    """The work, its size and the two ways to do it."""
    device: str
    """`cpu`, or the GPU's name."""
    turns: tuple[float, ...]
    fast_seconds: float
    """The least time that the fast one took."""
    group: str = "others"
    """Under which heading it is printed."""
    is_cost: bool = False
    """Whether it says what something costs, so that less is better."""

    @property
    def median(self) -> float:
        """The middle turn's."""
        return statistics.median(self.turns)

    def line(self) -> str:
        """The ratio in a line: median, range and the fast side's time."""
        return (
            f"  {self.what}: {self.median:.2f}x [{min(self.turns):.2f}, {max(self.turns):.2f}], "
            f"{_duration(self.fast_seconds)}"
        )


@dataclass(frozen=True)
class WorkCost:
    """How long one piece of work takes at each of several sizes."""

    what: str
    unit: str
    """What the sizes count: elements, images, pixels, clients, pairs."""
    device: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    """The least time at each size."""


def in_turns(
    what: str,
    slow: Callable[[], object],
    fast: Callable[[], object],
    *,
    group: str,
    device: str = "cpu",
    turns: int = TURNS,
    scale: float = 1.0,
    is_cost: bool = False,
) -> Ratio:
    """Time both, one after the other, `turns` times; the first time of each is not counted.

    Args:
        scale: the slow side's work over what is timed of it, where only a part is.
    """
    often = []
    for work in (slow, fast):
        work()
        took = clocked(work, device)
        often.append(max(1, round(_LEAST_SECONDS / max(took, 1e-9))))
    pairs = [
        tuple(clocked(work, device, many) for work, many in zip((slow, fast), often, strict=True)) for _ in range(turns)
    ]
    return Ratio(
        what,
        card(device),
        tuple(scale * one / other for one, other in pairs),
        min(quick for _, quick in pairs),
        group,
        is_cost,
    )


def clocked(work: Callable[[], object], device: str = "cpu", times: int = 1) -> float:
    """Seconds of one call, a mean of `times`: of this process on a CPU, on the wall's clock on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    began = clock()
    for _ in range(times):
        work()
    if device != "cpu":
        torch.cuda.synchronize()
    return (clock() - began) / times


def card(device: str) -> str:
    """`cpu`, or the GPU's name."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def processor() -> str:
    """The CPU's name."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def write_bench(path: Path, ratios: Iterable[Ratio], costs: Iterable[WorkCost]) -> None:
    """Write a bench.

    Raises:
        FedtapError: the file cannot be written.
    """
    document = {
        "format": BENCH_FORMAT,
        "processor": processor(),
        "torch": str(torch.__version__),
        "fedtap": version("fedtap"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "ratios": [asdict(ratio) for ratio in ratios],
        "costs": [asdict(cost) for cost in costs],
    }
    write_atomically(path, json.dumps(document, indent=1).encode() + b"\n")


def read_bench(path: Path) -> dict[tuple[str, str], Ratio]:
    """The ratios of a bench by what they are of, and on which device.

    Raises:
        FedtapError: there is no such file, or it is not a bench's.
    """
    document = read_json(path)
    try:
        if document["format"] != BENCH_FORMAT:
            raise ValueError(f"a format other than {BENCH_FORMAT}")
        found = [_ratio(one) for one in document["ratios"]]
    except (KeyError, TypeError, ValueError) as error:
        raise FedtapError(
            f"{short(path, 90)} is no bench ({type(error).__name__}: {short(error, 90)}): give the files that "
            "`fedtap bench run --out FILE` leaves."
        ) from error
    return {(ratio.what, ratio.device): ratio for ratio in found}


def _ratio(one: Mapping[str, Any]) -> Ratio:
    turns = tuple(float(turn) for turn in one["turns"])
    if not turns or not all(0 < turn < float("inf") for turn in turns):
        raise ValueError("turns are positive numbers")
    return Ratio(
        str(one["what"]), str(one["device"]), turns, float(one["fast_seconds"]), str(one["group"]), bool(one["is_cost"])
    )


def bench_changes(before: Path, after: Path) -> tuple[list[str], bool]:
    """A line for each ratio that both have, and whether any has become worse.

    The turns of the two are compared by Mann and Whitney's test.

    Raises:
        FedtapError: one of them is no bench, or they have no ratio in common.
    """
    old, new = read_bench(before), read_bench(after)
    both = [key for key in old if key in new]
    if not both:
        raise FedtapError("The two benches have no ratio in common: compare two on one kind of device.")
    lines, worse = [], False
    for key in both:
        one, other = old[key], new[key]
        change = other.median / one.median - 1
        doubt = float(mannwhitneyu(one.turns, other.turns).pvalue)
        told = "noise"
        if doubt <= _DOUBT and abs(change) >= _LEAST_CHANGE:
            told = "better" if (change < 0) == other.is_cost else "WORSE"
            worse |= told == "WORSE"
        lines.append(f"{told:>6} {change:+7.1%}  {one.median:.2f}x -> {other.median:.2f}x  {one.what} ({one.device})")
    return lines, worse


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
