"""Audit a Flower app of one's own: save what its server observes, for `fedtap attack`.

In the app's `@app.main()`, hand the strategy `Wiretap(grid, recorder(...))` in place of `grid`. Nothing else changes,
on no client either: the gradient is in the difference of the weights.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MessageType, RecordDict
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import write_atomically
from fedtap.simulator.leaks import Protocol, Tensors, check_protocol
from fedtap.simulator.wire.soundness import doubts
from fedtap.simulator.wire.threat_models import leak_of_exchange, weights_in
from fedtap.simulator.wire.wiretap import Ear

EXAMPLE_METRICS = ("num-examples", "num_examples")
"""Metrics that Flower's strategies weigh a client by, unless an app names another."""


def recorder(folder: Path, protocol: Protocol, network: nn.Module, weighted_by_key: str = "") -> Ear:
    """An ear that saves each client's reply to a train message as `round_R-client_C.safetensors`, C its node's id.

    It never touches the traffic: a reply that cannot be recorded is a warning, and goes on to the strategy as it is.
    Weights may come under their names in `state_dict`, or as a list in its order (clients on numpy arrays), in any
    precision, or as differences to what was sent. Replies of other types are counted in `messages.json`, and the first
    of each type is named in a warning.

    Args:
        folder: where the leaks go.
        protocol: what the server prescribes: model, image shape, classes, batch, local steps, learning rate; and what
            clients do otherwise than fedtap's: input range, loss, reduction, optimiser, BatchNorm's mode.
        network: the model that the app trains.
        weighted_by_key: the metric that holds a client's number of examples, where the app has a name of its own.

    Raises:
        FedtapError: the protocol is none that a client could follow.
    """
    check_protocol(protocol)
    counts: Counter[str] = Counter()
    rounds: Counter[int] = Counter()

    def ear(message: Message, reply: Message) -> None:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        if reply.has_error():
            return
        client = node % 2**63  # Flower's node ids are unsigned
        try:
            counts[kind] += 1
            if kind != MessageType.TRAIN and counts[kind] == 1:
                _warn(
                    f"Client {client} answers {kind!r} with {_contents(reply.content)}: the server reads this as it "
                    "is, and fedtap counts such replies and attacks none."
                )
            write_atomically(folder / "messages.json", json.dumps(counts, indent=2).encode() + b"\n")
            if kind != MessageType.TRAIN:
                return
            rounds[node] += 1
            rnd = round_of(message.content) or rounds[node]
            before, sent = (
                by_name(weights_in(content, what), network)
                for content, what in ((message.content, "message"), (reply.content, "reply"))
            )
            after = _as_weights(before, sent, network, client)
            examples = _examples(reply.content, weighted_by_key)
            leak = leak_of_exchange(before, after, protocol, network, client, rnd, examples)
            found = doubts(leak)[0]
            leak.save(folder / f"round_{rnd}-client_{client}.safetensors")
        except Exception as error:  # the bytes are a client's, and may raise whatever they like
            _warn(f"fedtap recorded nothing of client {client}: {short(error, 300)}")
            return
        for doubt in found:
            _warn(f"Client {client}: {doubt}")

    return ear


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


def round_of(message: RecordDict) -> int:
    """The server's own number of this round, from 1; 0 where the message names none."""
    for config in message.config_records.values():
        number = config.get("server-round")
        if type(number) is int and 0 < number < 2**63:
            return number
    return 0


def by_name(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Under the network's names: Flower calls the arrays of a list 0, 1, 2 ..., in the order of `state_dict`."""
    if list(tensors) != [str(number) for number in range(len(tensors))]:
        return tensors
    names = list(network.state_dict())
    if len(tensors) != len(names):
        names = [name for name, _ in network.named_parameters()]
    if len(tensors) != len(names):
        raise FedtapError(
            f"A list of {len(tensors)} arrays has no names, and this model's state has {len(network.state_dict())}: "
            "send them all, in the order of state_dict, or under their names."
        )
    return dict(zip(names, tensors.values(), strict=True))


def _as_weights(before: Tensors, after: Tensors, network: nn.Module, client: int) -> Tensors:
    """What the client's weights are, where it sends them or their difference to those that it was sent.

    A client's weights are nearer to those that it was sent than to zero; a difference is nearer to zero.

    Raises:
        FedtapError: it sends some of the model's tensors only.
    """
    parameters = [name for name, _ in network.named_parameters()]
    if missing := [name for name in parameters if name not in after and name in before]:
        raise FedtapError(
            f"it sent {len(parameters) - len(missing)} of the {len(parameters)} tensors that it trains on (no "
            f"{short(missing[0])}), and a partial update is attacked by no attack here: record a model of those alone."
        )
    both = [name for name in parameters if name in before and before[name].shape == after[name].shape]
    size, change = (
        sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
        for tensors in ([after[name] for name in both], [after[name].double() - before[name].double() for name in both])
    )
    if size >= change:
        return after
    _warn(
        f"Client {client} sends differences and not weights, by their size: they are recorded as (after - before), so "
        "if the app sends (before - after), no attack will explain them."
    )
    apart = {name: before[name].double() + after[name].double() for name in both}
    return dict(before) | {name: tensor.to(torch.float64) for name, tensor in apart.items()}


def _examples(reply: RecordDict, key: str) -> int | None:
    """How many examples the client says that it has; None where it says none that could be a count."""
    metrics: Mapping[str, Any] = {
        name: value for record in reply.metric_records.values() for name, value in record.items()
    }
    found = next((metrics[name] for name in (key, *EXAMPLE_METRICS) if name in metrics), None)
    return round(found) if isinstance(found, int | float) and 0 < found < 2**53 else None


def _contents(content: RecordDict) -> str:
    """The records of a reply in a few words."""
    arrays = [
        f"{name} of {'x'.join(map(str, array.shape))}"
        for record in content.array_records.values()
        for name, array in record.items()
    ]
    names = [str(name) for record in content.metric_records.values() for name, _ in record.items()]
    names += [str(name) for record in content.config_records.values() for name, _ in record.items()]
    return short(", ".join([*(f"array {array}" for array in arrays), *names]) or "nothing", 120)
