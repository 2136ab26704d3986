"""How fast the attacks' heart is: objective and slope of a gradient match, against the plain loop of double backwards.

`python -m fedtap.scenarios.bench.attacks` prints the time per restart-iteration (LeNet, batch 1, 32x32, one thread) and
its ratio to the plain loop, both measured in turn in one run; on a CUDA device too, where there is one. Likewise of
Newton's method on attention: 64 victims at once against one after the other, and against a loop with autograd's
Jacobian.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtap.attackers.activations.attention_newton import AttentionNewton
from fedtap.attackers.activations.block import block_of
from fedtap.attackers.parts.gradients import CALLS_BEFORE_TRACING, Match, squared_distance
from fedtap.attackers.posteriors.fisher import Coordinates, directions, divergence
from fedtap.simulator.leaks import AttentionLeak, GradientLeak, Protocol
from fedtap.simulator.models.attention import Attention
from fedtap.simulator.models.likelihoods import BayesianNetwork
from fedtap.simulator.models.registry import build

_SHAPE, CLASSES = (3, 32, 32), 10
_ROUNDS = 15
VICTIMS, _FEW = 64, 4
"""On attention; autograd's loop is timed on a few of them."""


def main() -> None:
    """Print one line for each device and number of lanes."""
    torch.set_num_threads(1)
    _table("cpu", _processor(), (1, 16))
    if torch.cuda.is_available():
        _table("cuda", torch.cuda.get_device_name(), (16, 64, 256))
    _slices()
    _attention()


def _attention() -> None:
    """Victims at once, in a loop, and in a loop that takes each Jacobian from autograd."""
    print(f"attention_newton, {VICTIMS} victims, start 10 % off: times the time of all at once, 1 thread")
    print(f"{'n, d, heads':>12} {'ms a victim':>12} {'one by one':>12} {'autograd':>12}")
    for n, d, heads in ((4, 4, 1), (4, 4, 4), (8, 8, 4)):
        leak, start = _attention_leak(n, d, heads)
        attack = AttentionNewton(steps=20)
        contenders: list[Callable[[], object]] = [
            lambda attack=attack, leak=leak, start=start: attack(leak, start=start),  # type: ignore[misc]
            lambda attack=attack, leak=leak, start=start: [  # type: ignore[misc]
                attack(leak[victim], start=start[victim : victim + 1]) for victim in range(VICTIMS)
            ],
            lambda leak=leak, start=start: _by_autograd(leak[:_FEW], start[:_FEW]),  # type: ignore[misc]
        ]
        took: list[list[float]] = [[], [], []]
        for _ in range(3):
            for times, contender in zip(took, contenders, strict=True):
                times.append(_seconds(contender, "cpu", repeats=1))
        once, loop, slow = (statistics.median(times) for times in took)
        label = f"{n}, {d}, {heads}"
        print(f"{label:>12} {1e3 * once / VICTIMS:12.2f} {loop / once:11.1f}x {slow * VICTIMS / _FEW / once:11.1f}x")


def _attention_leak(n: int, d: int, heads: int) -> tuple[AttentionLeak, Tensor]:
    """What clients with standard normal tokens send, and starts near those."""
    draw = torch.Generator().manual_seed(0)
    network = Attention(d, heads).double()
    network.reset_parameters(draw)
    x, way = (torch.randn(VICTIMS, n, d, generator=draw, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        output = network(x)
    names = torch.arange(VICTIMS)
    leak = AttentionLeak(
        observed={"output": output},
        protocol=Protocol(model="attention", shape=(n, d), classes=1, batch=1),
        network=Attention(d, heads).to("meta"),
        weights={name: weight.detach() for name, weight in network.named_parameters()},
        buffers={},
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
    )
    return leak, x + 0.1 * way


def _by_autograd(leak: AttentionLeak, start: Tensor) -> None:
    """Newton's method as a few lines would have it: each victim by itself, its Jacobian row by row."""
    block = block_of(leak)
    for x, target in zip(start, leak.observed["output"], strict=True):
        for _ in range(6):
            misfit = (block(x[None])[0] - target).flatten()
            slope = torch.autograd.functional.jacobian(lambda x: block(x[None])[0].flatten(), x)  # type: ignore[no-untyped-call]
            flat = slope.flatten(1)
            x = x - torch.linalg.solve(flat.T @ flat + 1e-9 * torch.eye(len(flat.T)), flat.T @ misfit).view_as(x)


def _table(device: str, hardware: str, counts: tuple[int, ...]) -> None:
    print(f"{hardware}, torch {torch.__version__}: ms per restart-iteration, and how often faster than the plain loop")
    print(f"{'lanes':>5} {'plain':>8} {'vmapped':>16} {'compiled':>16}")
    for lanes in counts:
        plain, vmapped, compiled = _times(device, lanes)
        print(f"{lanes:5} {plain:8.3f} {vmapped:8.3f} {plain / vmapped:6.1f}x {compiled:8.3f} {plain / compiled:6.1f}x")


def _times(device: str, lanes: int) -> list[float]:
    """Milliseconds a lane of plain, vmapped and compiled: medians over rounds in which the three take turns."""
    network = build("lenet", _SHAPE, CLASSES, seed=1234).to(device)
    draw = torch.Generator().manual_seed(0)
    images, guess = (torch.rand(lanes, 1, *_SHAPE, generator=draw).to(device) for _ in range(2))
    labels = torch.randint(CLASSES, (lanes, 1), generator=draw).to(device)
    weights = dict(network.named_parameters())
    gradients = [
        torch.autograd.grad(F.cross_entropy(network(x), y), list(weights.values()))
        for x, y in zip(images, labels, strict=True)
    ]
    leak = GradientLeak(
        observed={name: torch.stack([each[i] for each in gradients]) for i, name in enumerate(weights)},
        protocol=Protocol(model="lenet", shape=_SHAPE, classes=CLASSES, batch=1),
        network=build("lenet", _SHAPE, CLASSES),
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
        lambda: vmapped.with_input_gradient(guess, labels),
        lambda: compiled.with_input_gradient(guess, labels),
    ]
    for _ in range(CALLS_BEFORE_TRACING + 3):
        contenders[1]()
    contenders[2]()
    took: list[list[float]] = [[], [], []]
    for _ in range(_ROUNDS):
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
