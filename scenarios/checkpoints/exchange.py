"""One exchange with clients that train to the end: the weights that were broadcast, and those that came back."""

from __future__ import annotations

import math

import torch
from flwr.app import ArrayRecord, RecordDict

from fedtap.scenarios.checkpoints.stationary import Case, TrainedObserved
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Leak, TrainedWeightsLeak, stack
from fedtap.simulator.scenario import Session
from fedtap.simulator.wire.messages import Overheard, ask, check_nodes, read
from fedtap.simulator.wire.records import tensors_of


def trained_weights(session: Session, case: Case, seed: int, failed: dict[int, str] | None = None) -> TrainedObserved:
    """Broadcast the case's initial weights, and observe what comes back of each client.

    Args:
        failed: client -> why it failed, or sent other tensors than it was sent, filled in here; None where all are
            needed.

    Raises:
        ClientError: one of those that are needed did.
    """
    setting = session.settings[session.number]
    check_nodes(session.grid, setting.nodes, setting.name)
    arrays = ArrayRecord({name: value.detach() for name, value in case.network(seed).named_parameters()})
    exchanges = ask(session.grid, "train", RecordDict({"arrays": arrays}), session.number, failed=failed)
    made = read(exchanges, lambda exchange: _leak(exchange, case), failed)
    sent = stack([leak for leak, _ in made])
    assert isinstance(sent, TrainedWeightsLeak)
    missing = {(client, 1): why for client, why in sorted((failed or {}).items())}
    return TrainedObserved(sent, missing, sent=sent, left=[left for _, left in made])


def _leak(exchange: Overheard, case: Case) -> tuple[Leak, float]:
    """What the client's weights are, and what it says is left of its gradient."""
    name, metrics = torch.tensor([exchange.client]), exchange.answer.metric_records["metrics"]
    examples, left = metrics["num-examples"], float(metrics["left"])  # type: ignore[arg-type]
    if type(examples) is not int or examples != case.examples:
        raise FedtapError(
            f"Client {exchange.client} says it has {short(examples)} examples, and every client has {case.examples}."
        )
    if not math.isfinite(left):
        raise FedtapError(f"Client {exchange.client} says that {left} is left of its gradient: send a finite number.")
    leak = TrainedWeightsLeak(
        observed={
            name: tensor.double()[None] for name, tensor in tensors_of(exchange.answer.array_records["arrays"]).items()
        },
        protocol=case.protocol,
        network=case.network(),
        weights=tensors_of(exchange.order.array_records["arrays"]),
        buffers={},
        clients=name,
        rounds=torch.ones_like(name),
        restarts=torch.zeros_like(name),
    )
    leak.check()
    return leak, left
