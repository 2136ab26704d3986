"""What a defence costs a client: the time from weights to weights with it, over the time without, in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fedtap.clients.mod import defended
from fedtap.clients.training import network, one_thread, plain_backward, seeded, sgd
from fedtap.simulator.attack import generator
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.defences.notation import described
from fedtap.simulator.federation.private_data import PrivateData
from fedtap.simulator.federation.settings import Federation
from fedtap.simulator.models.registry import Shape

TURNS = 7
"""Times that each of the two is timed, one after the other, so that both see the same machine."""

TURN = 0.03
"""Seconds that a turn takes at least: what is quicker is done several times in it."""

LONGEST_TIMING = 5.0
"""Seconds after which there is no further turn."""


def overhead(scenario: Federation, private: PrivateData) -> float | None:
    """How many times as long an attacked exchange takes a client with its defence as without; None without one.

    Local steps and batch are those of the exchange. What the server does costs a client nothing.
    """
    if not any(part.hook != "server" for part in described(scenario.defence)):
        return None
    dataset = private.dataset
    indices = torch.arange(scenario.batch * scenario.local_steps) % len(dataset.train)
    images, labels = dataset.train.batch(indices)
    with one_thread(), seeded(scenario.seed, "cost"):
        done, plain = (
            exchange(model, defence, dataset.shape, len(dataset.classes), images, labels, scenario.local_steps)
            for model, defence in ((scenario.architecture, scenario.defence), (scenario.model, "none"))
        )
        return times_as_long(done, plain)


def exchange(
    model: str, defence: str, shape: Shape, classes: int, images: Tensor, labels: Tensor, steps: int = 1
) -> Callable[[], None]:
    """What a client does between two messages: local steps, each on its share of the images, and its defence.

    Args:
        model: the architecture, with what a defence puts into it.
    """
    defences, draw = parse(defence), generator(0, "cost")
    net = network(model, shape, classes)
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    backward = partial(defences.step.backward, draw=draw) if defences.step else plain_backward

    def work() -> None:
        net.load_state_dict(before, strict=False)
        sgd(net, images, labels, steps, len(images) // steps, 0.1, backward)
        if defences.update:
            after = {name: weight.detach() for name, weight in net.named_parameters()}
            net.load_state_dict(defended(defences.update, before, after, 0.1, draw), strict=False)

    return work


def times_as_long(work: Callable[[], None], other: Callable[[], None]) -> float:
    """Median over the turns of the time for `work` over that for `other`; the first time of each is not counted."""
    for each in (work, other):
        each()
    often = [max(1, round(TURN / seconds(each))) for each in (work, other)]
    began, found = time.perf_counter(), list[float]()
    while len(found) < TURNS and (not found or time.perf_counter() - began < LONGEST_TIMING):
        one, two = (seconds(each, times) / times for each, times in zip((work, other), often, strict=True))
        found.append(one / two)
    return statistics.median(found)


def seconds(work: Callable[[], None], times: int = 1) -> float:
    """Processor time of this process for `times` calls, in seconds; other processes' does not count."""
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began
