"""How fast the attacks' heart is: one iteration of many victims at once, against the plain loop that does the same.

On a CUDA device the traced match is one replayed graph, and a whole iteration of an attack is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtap.attackers.activations.attention_newton import AttentionNewton
from fedtap.attackers.activations.block import block_of
from fedtap.attackers.parts.gradients import CALLS_BEFORE_TRACING, Match, squared_distance
from fedtap.attackers.parts.repeated import Repeated, capture_on
from fedtap.attackers.posteriors.fisher import Coordinates, directions, divergence
from fedtap.scenarios.bench.ratios import Ratio, WorkCost, card, clocked, in_turns
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.leaks import AttentionLeak, GradientLeak, Protocol
from fedtap.simulator.models.attention import Attention
from fedtap.simulator.models.likelihoods import BayesianNetwork
from fedtap.simulator.models.registry import build
from fedtap.simulator.run import device_named

_SHAPE, CLASSES = (3, 32, 32), 10
VICTIMS, _FEW = 64, 4
"""On attention; autograd's loop is timed on a few of them."""

_PLAIN = 8
"""Elements of the plain loop that are timed: each takes as long."""


def attack_ratios() -> Iterator[Ratio]:
    """Of the match on each device, of attention's solver, and of the attack on a posterior."""
    yield from _match_ratios("cpu", (1, 16))
    if torch.cuda.is_available():
        device_named("cuda")  # without TF32, as runs are
        yield from _match_ratios("cuda", (1, 64, 256, 1024))
    yield from _attention_ratios()
    yield from _slices()


def _match_ratios(device: str, counts: tuple[int, ...]) -> Iterator[Ratio]:
    """A restart-iteration on LeNet: objective and slope by a plain loop, over vmapped, and over compiled."""
    for count in counts:
        iteration = _Iteration("lenet", count, device)
        for compiled in (False, True) if device == "cpu" or count == counts[-1] else (False,):
            yield in_turns(
                f"an iteration on {count} LeNet victim(s): plain loop / {'compiled' if compiled else 'vmapped'}",
                partial(iteration.plain, min(count, _PLAIN)),
                iteration.ready(compiled),
                group="match",
                device=device,
                scale=count / min(count, _PLAIN),
            )


class _Iteration:
    """What an iteration of gradient matching computes, on victims of one image each."""

    def __init__(self, model: str, count: int, device: str, batch: int = 1, size: int = 32) -> None:
        shape = (3, size, size)
        self.network = build(model, shape, CLASSES, seed=1234).to(device)
        draw = torch.Generator().manual_seed(0)
        images, self.guess = (torch.rand(count, batch, *shape, generator=draw).to(device) for _ in range(2))
        self.labels = torch.randint(CLASSES, (count, batch), generator=draw).to(device)
        self.weights = dict(self.network.named_parameters())
        skeleton = build(model, shape, CLASSES)
        found = gradients(build(model, shape, CLASSES, seed=1234), images.cpu(), self.labels.cpu())
        names = torch.arange(count)
        self.leak = GradientLeak(
            observed={name: gradient.to(device) for name, gradient in found.items()},
            protocol=Protocol(model=model, shape=shape, classes=CLASSES, batch=batch),
            network=skeleton,
            weights={name: weight.detach() for name, weight in self.weights.items()},
            buffers={},
            clients=names,
            rounds=torch.ones_like(names),
            restarts=torch.zeros_like(names),
        )

    def plain(self, count: int) -> None:
        """The first victims, one after the other."""
        for victim in range(count):
            x = self.guess[victim].clone().requires_grad_()
            loss = F.cross_entropy(self.network(x), self.labels[victim])
            slopes = torch.autograd.grad(loss, list(self.weights.values()), create_graph=True)
            named = zip(self.weights, slopes, strict=True)
            misfits = [(slope - self.leak.observed[name][victim]).square().sum() for name, slope in named]
            torch.autograd.grad(torch.stack(misfits).sum(), x)

    def ready(self, compiled: bool = False) -> Callable[[], object]:
        """All victims at once, after what the first calls do."""
        match = Match(self.leak, squared_distance, compiled=compiled)

        def at_once() -> None:
            match.with_input_gradient(self.guess, self.labels)

        capture = capture_on(self.guess.device)
        step = at_once if capture is None else Repeated(at_once, capture)
        for _ in range(1 if compiled and capture is None else CALLS_BEFORE_TRACING + 3):
            step()
        return step


def work_costs() -> Iterator[WorkCost]:
    """An iteration's time by victims, images of a victim, and pixels; that of auxiliary pairs by their number."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        counts = (1, 4, 16, 64) if device == "cpu" else (1, 16, 64, 256, 1024)
        yield _cost(
            device, "an iteration on LeNet", "victims", counts, lambda n, device: _Iteration("lenet", n, device)
        )
        batches = (1, 4, 16)
        yield _cost(
            device,
            "an iteration on LeNet, 1 victim",
            "images",
            batches,
            lambda n, device: _Iteration("lenet", 1, device, n),
        )
        sizes = (16, 32, 64)
        found = _cost(
            device,
            "an iteration on LeNet, 1 victim of 1 image",
            "pixels",
            sizes,
            lambda n, device: _Iteration("lenet", 1, device, 1, n),
        )
        yield WorkCost(found.what, found.unit, found.device, tuple(3 * size**2 for size in sizes), found.seconds)
        network, pairs = build("lenet", _SHAPE, CLASSES, seed=1234), (16, 128, 1024)
        images, labels = torch.rand(pairs[-1], 1, *_SHAPE), torch.zeros(pairs[-1], 1, dtype=torch.long)
        took = []
        for count in pairs:
            some = partial(gradients, network, images[:count], labels[:count], device)
            some()
            took.append(min(clocked(some, device) for _ in range(3)))
        yield WorkCost("gradients of LeNet", "pairs", card(device), pairs, tuple(took))


def _cost(
    device: str, what: str, unit: str, sizes: tuple[int, ...], made: Callable[[int, str], _Iteration]
) -> WorkCost:
    took = []
    for size in sizes:
        step = made(size, device).ready()
        took.append(min(clocked(step, device, 3) for _ in range(3)))
    return WorkCost(what, unit, card(device), sizes, tuple(took))


def _attention_ratios() -> Iterator[Ratio]:
    """Victims one by one, and by a loop that takes each Jacobian from autograd, over all at once."""
    for n, d, heads in ((4, 4, 1), (4, 4, 4), (8, 8, 4)):
        leak, start = _attention_leak(n, d, heads)
        attack = AttentionNewton(steps=20)

        def once(attack: AttentionNewton = attack, leak: AttentionLeak = leak, start: Tensor = start) -> None:
            attack(leak, start=start)

        def one_by_one(attack: AttentionNewton = attack, leak: AttentionLeak = leak, start: Tensor = start) -> None:
            for victim in range(VICTIMS):
                attack(leak[victim], start=start[victim : victim + 1])

        size = f"attention_newton on {VICTIMS} victims, n = {n}, d = {d}, {heads} head(s)"
        yield in_turns(f"{size}: one by one / at once", one_by_one, once, group="attention", turns=5)
        yield in_turns(
            f"{size}: a loop with autograd's Jacobian / at once",
            partial(_by_autograd, leak[:_FEW], start[:_FEW]),
            once,
            group="attention",
            turns=5,
            scale=VICTIMS / _FEW,
        )


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


def _slices() -> Iterator[Ratio]:
    """One step of the attack on a posterior, for each draw: the whole Hessian's trace over one slice of it."""
    for hidden in (3, 33, 333):
        model = BayesianNetwork(1, hidden, 0.1)
        d = len(model.parameters)
        few, many = (max(2, numbers // (8 * hidden)) for numbers in (10**6 // d, 10**5))  # arithmetic, not overhead
        yield in_turns(
            f"a step on a Bayesian network's posterior, {d} parameters, for each draw: exact / sliced divergence",
            _step(model, "exact", few),
            _step(model, "sliced", many),
            group="posterior",
            scale=many / few,
        )


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
