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
from simulator.leaks import Protocol, check_protocol
from simulator.listeners import hear
from simulator.wiretap import Ear, partition_of


def recorder(folder: Path, protocol: Protocol, network: nn.Module) -> Ear:
    """An ear that saves each client's answer to a train order as `round_R-client_C.safetensors`.

    It never touches the traffic: an answer that cannot be recorded is a warning, and goes on to the strategy as it is.

    Args:
        folder: where the leaks go.
        protocol: what the server prescribes: model, image shape, classes, batch, local steps, learning rate; and what
            clients do otherwise than fedtap's: input range, loss, reduction, optimiser, BatchNorm's mode.
        network: the model; its parameters' names are those of the ArrayRecords.

    Raises:
        FedtapError: the protocol is none that a client could follow.
    """
    check_protocol(protocol)

    def ear(order: Message, answer: Message) -> None:
        if order.metadata.message_type != MessageType.TRAIN or answer.has_error():
            return
        configs = list(order.content.config_records.values())
        rnd = next((int(str(config["server-round"])) for config in configs if "server-round" in config), 0)
        client = partition_of(answer) % 2**63  # Flower's node ids are unsigned
        try:
            leak = hear(order.content, answer.content, protocol, network, client, rnd)
            leak.save(folder / f"round_{rnd}-client_{client}.safetensors")
        except FedtapError as error:
            warnings.warn(f"fedtap recorded nothing of client {client} in round {rnd}: {error}", stacklevel=2)

    return ear
