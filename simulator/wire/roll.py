"""Who is who: which client each node of a grid is, settled before anything is asked of it.

A node says its number itself, so any node can say any number. It is asked once, and the number is then bound to the
node: what comes from there later is that client's and nobody else's. Where two nodes say the same number neither is
believed, so that it does not matter which of them replies first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.wire.records import records_of
from fedtap.simulator.wire.wiretap import Wiretap

ASKED = "query.partition"
"""Message type by which a node is asked for its number."""

ROLL_TIMEOUT = 600.0
"""Seconds in which a node has to reply: an engine may have to start a process first."""


@dataclass(frozen=True)
class Roll:
    """The clients of a grid."""

    clients: Mapping[int, int]
    """Node -> number of its client, from 0; no two nodes have the same."""
    strangers: Mapping[int, str]
    """Node without a client -> the reason, in a sentence."""

    @property
    def nodes(self) -> dict[int, int]:
        """Client -> its node, in the order of clients."""
        return {client: node for node, client in sorted(self.clients.items(), key=lambda both: both[1])}

    def client(self, message: Message) -> int:
        """The client from which a reply to this message comes: the one that was asked, whatever the reply says.

        Raises:
            FedtapError: the node is no client.
        """
        node = message.metadata.dst_node_id
        if node not in self.clients:
            raise FedtapError(self.strangers.get(node) or f"Node {node} came after the clients were counted.")
        return self.clients[node]


def check_name(reply: RecordDict, client: int) -> None:
    """Refuse a reply that reports another partition than its client's.

    Raises:
        FedtapError: with both.
    """
    for record in records_of(reply, MetricRecord):
        said = record.get("partition", client)
        if type(said) is not int or said != client:
            raise FedtapError(f"Client {client} answered in the name of client {short(said)}, which it is not.")


def call(grid: Grid) -> Roll:
    """Which client each node is: as the grid knows, in process, or as the nodes say.

    Nodes are numbered 0 … `nodes` - 1, as `partition-id` of their configuration.
    """
    if (known := getattr(grid, "partitions", None)) is not None:
        return Roll(dict(known), {})
    nodes = list(grid.get_node_ids())
    said: dict[int, Any] = {}
    strangers: dict[int, str] = {node: f"Node {node} did not say which client it is." for node in nodes}

    def ear(message: Message, reply: Message) -> None:
        node = message.metadata.dst_node_id
        if reply.has_error():
            strangers[node] = f"Node {node} did not say which client it is: {short(reply.error.reason, 150)}."
            return
        said[node] = reply.content.metric_records.get("metrics", MetricRecord()).get("partition")

    asked = [Message(RecordDict({"config": ConfigRecord()}), node, ASKED) for node in nodes]
    Wiretap(grid, ear).send_and_receive(asked, timeout=ROLL_TIMEOUT)
    sound = {node: number for node, number in said.items() if type(number) is int and 0 <= number < len(nodes)}
    for node, number in said.items():
        others = [str(other) for other in sound if other != node and sound[other] == number]
        if node not in sound:
            strangers[node] = (
                f"Node {node} says that it is client {short(number)}, and there are clients 0 to {len(nodes) - 1}: "
                "start it with another partition-id."
            )
        elif others:
            strangers[node] = (
                f"Node {node} says that it is client {number}, and so does node {short(', '.join(others))}, so neither "
                "is believed: give each a partition-id of its own."
            )
        else:
            del strangers[node]
    return Roll({node: number for node, number in sound.items() if node not in strangers}, strangers)


def present(message: Message, context: Context) -> Message:
    """A node's reply: the partition of its configuration."""
    metrics = MetricRecord({"partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
