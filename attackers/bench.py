"""How fast the attacks' heart is: objective and slope of a gradient match, against the plain loop of double backwards.

`python -m attackers.bench` prints the time per restart-iteration (LeNet, batch 1, 32x32, one thread) and its ratio to
the plain loop, both measured in turn in one run; on a CUDA device too, where there is one.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from attackers.parts.gradients import WARM_UP, Match, squared_distance
from simulator.leaks import GradientLeak, Protocol
from simulator.models import build

SHAPE, CLASSES = (3, 32, 32), 10
ROUNDS = 15


def main() -> None:
    """Print one line for each device and number of lanes."""
    torch.set_num_threads(1)
    _table("cpu", _processor(), (1, 16))
    if torch.cuda.is_available():
        _table("cuda", torch.cuda.get_device_name(), (16, 64, 256))


def _table(device: str, hardware: str, counts: tuple[int, ...]) -> None:
    print(f"{hardware}, torch {torch.__version__}: ms per restart-iteration, and how often faster than the plain loop")
    print(f"{'lanes':>5} {'plain':>8} {'vmapped':>16} {'compiled':>16}")
    for lanes in counts:
        plain, vmapped, compiled = _times(device, lanes)
        print(f"{lanes:5} {plain:8.3f} {vmapped:8.3f} {plain / vmapped:6.1f}x {compiled:8.3f} {plain / compiled:6.1f}x")


def _times(device: str, lanes: int) -> list[float]:
    """Milliseconds a lane of plain, vmapped and compiled: medians over rounds in which the three take turns."""
    network = build("lenet", SHAPE, CLASSES, seed=1234).to(device)
    draw = torch.Generator().manual_seed(0)
    images, guess = (torch.rand(lanes, 1, *SHAPE, generator=draw).to(device) for _ in range(2))
    labels = torch.randint(CLASSES, (lanes, 1), generator=draw).to(device)
    weights = dict(network.named_parameters())
    gradients = [
        torch.autograd.grad(F.cross_entropy(network(x), y), list(weights.values()))
        for x, y in zip(images, labels, strict=True)
    ]
    leak = GradientLeak(
        observed={name: torch.stack([each[i] for each in gradients]) for i, name in enumerate(weights)},
        protocol=Protocol(model="lenet", shape=SHAPE, classes=CLASSES, batch=1),
        network=build("lenet", SHAPE, CLASSES),
        weights={name: weight.detach() for name, weight in weights.items()},
        buffers={},
        clients=torch.arange(lanes),
        rounds=torch.ones(lanes, dtype=torch.long),
        restarts=torch.zeros(lanes, dtype=torch.long),
    )

    def plain() -> None:
        for lane in range(lanes):
            x = guess[lane].clone().requires_grad_()
            loss = F.cross_entropy(network(x), labels[lane])
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            misfit = torch.stack(
                [
                    (slope - leak.observed[name][lane]).square().sum()
                    for name, slope in zip(weights, slopes, strict=True)
                ]
            ).sum()
            torch.autograd.grad(misfit, x)

    vmapped, compiled = (Match(leak, squared_distance, compiled=compiled) for compiled in (False, True))
    contenders: list[Callable[[], object]] = [
        plain,
        lambda: vmapped.with_slope(guess, labels),
        lambda: compiled.with_slope(guess, labels),
    ]
    for _ in range(WARM_UP + 3):
        contenders[1]()
    contenders[2]()
    took: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        for times, contender in zip(took, contenders, strict=True):
            times.append(_seconds(contender, device))
    return [1e3 * statistics.median(times) / lanes for times in took]


def _seconds(step: Callable[[], object], device: str, repeats: int = 3) -> float:
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
