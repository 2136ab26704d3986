"""The threat models: what a listener makes of one exchange between server and client.

`curious_server` knows the weights it sent. `eavesdropper` sits on the clients' uplink: it sees what each client sends
(as a difference to what the client was sent) and knows the architecture, but not the weights; GIT's threat model
(https://arxiv.org/abs/2505.20026).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor, nn

from simulator.errors import FedtapError, unknown
from simulator.leaks import GradientLeak, Leak, Protocol, UpdateLeak, float_buffers
from simulator.records import tensors_of

Listener = Callable[[Leak], Leak]

ROUNDING = 6.5e-9
"""Standard error of a difference of two float32 weights near 0.1, in weight units."""


def curious_server(leak: Leak) -> Leak:
    """Knows everything that was exchanged, the weights included."""
    return leak


def eavesdropper(leak: Leak) -> Leak:
    """Knows architecture and answers; neither weights nor buffers."""
    return dataclasses.replace(leak, weights=None, buffers={}, stacked=False)


LISTENERS: dict[str, Listener] = {"curious_server": curious_server, "eavesdropper": eavesdropper}


def listener(name: str) -> Listener:
    """The named threat model.

    Raises:
        FedtapError: there is none of this name.
    """
    if name not in LISTENERS:
        raise unknown("listener", name, LISTENERS)
    return LISTENERS[name]


def hear(order: RecordDict, answer: RecordDict, protocol: Protocol, network: nn.Module, client: int, rnd: int) -> Leak:
    """The leak of one ordinary FedAvg exchange: weights out, weights back.

    One prescribed step of plain SGD gives away the gradient, (before - after) / learning rate; several give away their
    sum, after - before.

    Raises:
        FedtapError: the answer is not what a client of this protocol sends.
    """
    before = _tensors(order, "order")
    after = _tensors(answer, "answer")
    if len(answer.metric_records) != 1 or not _counts(answer):
        raise FedtapError(
            f"Client {client} reported no positive num-examples, without which its answer cannot be averaged: "
            "send exactly one MetricRecord with that key."
        )
    parameters = [name for name, _ in network.named_parameters()]
    buffers = float_buffers(network)
    _whole(before, [*parameters, *buffers], "order", client)
    _whole(after, [*parameters, *buffers], "answer", client)
    single = protocol.steps == 1
    scale = -1 / protocol.learning_rate if single else 1.0
    differences = {}
    for name in (*parameters, *buffers):
        if after[name].shape != before[name].shape:
            raise FedtapError(
                f"Client {client} answered {name} of shape {tuple(after[name].shape)} to one of "
                f"{tuple(before[name].shape)}, so there is no difference to take: it trains another model."
            )
        differences[name] = ((after[name].double() - before[name].double()) * scale).float()
        if not bool(after[name].float().isfinite().all() and differences[name].isfinite().all()):
            raise FedtapError(f"Client {client} answered NaN or infinity in {name}: its training diverged or it lies.")
    return (GradientLeak if single else UpdateLeak)(
        observed={name: differences[name][None] for name in parameters},
        protocol=protocol,
        network=network,
        weights={name: before[name] for name in parameters},
        buffers={name: before[name] for name in buffers},
        clients=torch.tensor([client]),
        rounds=torch.tensor([rnd]),
        restarts=torch.tensor([0]),
        resolution=ROUNDING * abs(scale),
    )


def _tensors(content: RecordDict, what: str) -> dict[str, Tensor]:
    if len(content.array_records) != 1:
        raise FedtapError(
            f"The {what} holds {len(content.array_records)} ArrayRecords and FedAvg exchanges exactly one: "
            "send other leaks under a message action of their own."
        )
    record: ArrayRecord = next(iter(content.array_records.values()))
    try:
        return tensors_of(record)
    except Exception as error:  # the bytes are a client's, and numpy raises what it likes about them
        raise FedtapError(f"The {what} holds arrays that are no tensors ({error}): send float32.") from error


def _counts(answer: RecordDict) -> bool:
    count = next(iter(answer.metric_records.values())).get("num-examples")
    return isinstance(count, int | float) and 0 < count < 2**53


def _whole(found: dict[str, Tensor], wanted: list[str], what: str, client: int) -> None:
    if missing := [name for name in wanted if name not in found or not found[name].is_floating_point()]:
        raise FedtapError(
            f"The {what} of client {client} lacks {', '.join(missing[:3])}, which this model has: "
            "client and server must name the same --model."
        )
