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

from attackers.parts.fisher import Coordinates, directions, divergence
from attackers.parts.gradients import WARM_UP, Match, squared_distance
from simulator.leaks import GradientLeak, Protocol
from simulator.likelihoods import BayesianNetwork
from simulator.models import build

SHAPE, CLASSES = (3, 32, 32), 10
ROUNDS = 15


def main() -> None:
    """Print one line for each device and number of lanes."""
    torch.set_num_threads(1)
    _table("cpu", _processor(), (1, 16))
    if torch.cuda.is_available():
        _table("cuda", torch.cuda.get_device_name(), (16, 64, 256))
    _slices()


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


def _slices() -> None:
    """One step of the attack on a posterior, for each draw: the whole Hessian's trace over one slice of it."""
    print("One step on a Bayesian network's posterior, 8 pseudo-points, for each draw: exact / sliced divergence")
    for hidden in (3, 33, 333):
        model = BayesianNetwork(1, hidden, 0.1)
        d = len(model.parameters)
        few, many = (max(2, numbers // (8 * hidden)) for numbers in (10**6 // d, 10**5))  # arithmetic, not overhead
        took = []
        for _ in range(5):
            exact, sliced = (
                _seconds(_step(model, "exact", few), "cpu", 1),
                _seconds(_step(model, "sliced", many), "cpu", 1),
            )
            took.append((exact / few, sliced / many))
        ratio = statistics.median(exact / sliced for exact, sliced in took)
        print(f"  d = {d:4}: {ratio:6.1f} times the time ({1e6 * min(sliced for _, sliced in took):.1f} µs sliced)")


def _step(model: BayesianNetwork, estimator: str, draws: int) -> Callable[[], object]:
    """Objective and slope on so many draws."""
    draw, d = torch.Generator().manual_seed(0), len(model.parameters)
    phi = torch.randn(1, draws, d, generator=draw).double()
    where = Coordinates(torch.zeros(1, d).double(), torch.eye(d).double()[None])
    logs = torch.zeros(1, 8).double().requires_grad_()
    points = torch.randn(1, 8, 2, generator=draw).double().requires_grad_()
    noise = directions(phi, estimator, draw)

    def step() -> object:
        objective = divergence(model, where, phi, logs.exp(), points, estimator, noise)
        return torch.autograd.grad(objective.sum(), [logs, points])

    return step


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
