"""Audit a Flower app of one's own: save what its server hears, for `fedtap attack`.

In the app's `@app.main()`, hand the strategy `Wiretap(grid, recorder(...))` in place of `grid`. Nothing else changes,
on no client either: the gradient is in the difference of the weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from flwr.app import Message, MessageType
from torch import nn

from simulator.errors import FedtapError
from simulator.leaks import Protocol
from simulator.listeners import hear
from simulator.wiretap import Ear, partition_of


def recorder(folder: Path, protocol: Protocol, network: nn.Module) -> Ear:
    """An ear that saves each client's answer to a train order as `round_R-client_C.safetensors`.

    It never touches the traffic: an answer that cannot be recorded is a warning, and goes on to the strategy as it is.
    A leak is written as it is heard, under the partition that the client reports or its node's id, and of two nodes
    that report the same partition only the first is recorded.

    Args:
        folder: where the leaks go.
        protocol: what the server prescribes: model, image shape, classes, batch, local steps, learning rate.
        network: the model; its parameters' names are those of the ArrayRecords.
    """

    nodes: dict[int, int] = {}

    def ear(order: Message, answer: Message) -> None:
        if order.metadata.message_type != MessageType.TRAIN or answer.has_error():
            return
        configs = list(order.content.config_records.values())
        rnd = next((int(str(config["server-round"])) for config in configs if "server-round" in config), 0)
        client = partition_of(answer) % 2**63  # Flower's node ids are unsigned
        try:
            if nodes.setdefault(client, order.metadata.dst_node_id) != order.metadata.dst_node_id:
                raise FedtapError(f"two nodes say that they are client {client}: give each a partition of its own.")
            leak = hear(order.content, answer.content, protocol, network, client, rnd)
            leak.save(folder / f"round_{rnd}-client_{client}.safetensors")
        except Exception as error:  # the bytes are a client's, and may raise whatever they like
            warnings.warn(f"fedtap recorded nothing of client {client} in round {rnd}: {error}", stacklevel=2)

    return ear
