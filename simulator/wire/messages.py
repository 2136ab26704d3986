"""Messages of a leak's own kind: one to every client, and what the tap observed of their replies."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtap.simulator.errors import ClientError, FedtapError, short
from fedtap.simulator.wire.records import reading, tensors_of
from fedtap.simulator.wire.roll import call, check_name
from fedtap.simulator.wire.wiretap import Wiretap

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Overheard:
    """An order and its answer, as the tap heard them."""

    client: int
    order: RecordDict
    answer: RecordDict


def check_nodes(grid: Grid, nodes: int, name: str) -> None:
    """Refuse a federation that has more or fewer nodes than this scenario needs.

    Raises:
        FedtapError: with both numbers.
    """
    if (many := len(list(grid.get_node_ids()))) != nodes:
        raise FedtapError(f"The federation has {many} nodes, and {name} needs {nodes}: start as many SuperNodes.")


def ask(
    grid: Grid,
    kind: str,
    content: RecordDict,
    part: int,
    tell: Callable[[int], RecordDict] | None = None,
    failed: dict[int, str] | None = None,
) -> list[Overheard]:
    """Send an order to every node, and overhear the answers, in the order of the clients' partitions.

    Args:
        kind: the message type, such as `train.posterior`.
        content: the order, in which the part's number is noted.
        part: the setting's place in the run's plan, by which clients know what is played.
        tell: of the client's number, what it is told besides.
        failed: client -> why there is no answer of it, filled in here; None where all of them are needed.

    Raises:
        ClientError: a client fails, and the setting needs all of them, or there is no answer at all.
    """
    heard: dict[int, Overheard] = {}
    reasons: dict[int, object] = {}
    who = call(grid)

    def ear(order: Message, answer: Message) -> None:
        client = who.client(order)
        if answer.has_error():
            reasons[client] = answer.error.reason
            return
        try:
            with reading(client):
                check_name(answer.content, client)
                for record in answer.content.array_records.values():
                    tensors_of(record)
        except FedtapError as error:
            reasons[client] = f"FedtapError: {error}"
            return
        heard[client] = Overheard(client, order.content, answer.content)

    orders = []
    for client, node in who.nodes.items():
        told = dict(content) | dict(tell(client) if tell else {}) | {"config": ConfigRecord({"part": part})}
        orders.append(Message(RecordDict(told), node, kind))
    Wiretap(grid, ear).send_and_receive(orders)
    absent = " ".join(who.strangers.values()) or f"it did not answer to {kind}: see that all SuperNodes run"
    for client in range(len(orders) + len(who.strangers)):
        if client not in heard:
            reasons.setdefault(client, absent)
    without(reasons, failed, len(heard))
    return [heard[client] for client in sorted(heard)]


def without(reasons: Mapping[int, object], failed: dict[int, str] | None, left: int) -> None:
    """Go on without some clients, entering in `failed` why, where a setting may.

    Args:
        reasons: client -> what was said of its failure.
        left: clients that did not fail.

    Raises:
        ClientError: the setting needs all of them (`failed` is None), or none is left.
    """
    if reasons and (failed is None or not left):
        raise client_failed(reasons[min(reasons)])
    if failed is not None:
        for client, reason in reasons.items():
            failed[client] = f"Client {client} failed: {_own(reason) or short(reason, 200)}"


def read(
    heard: Sequence[Overheard], make: Callable[[Overheard], _Made], failed: dict[int, str] | None = None
) -> list[_Made]:
    """What `make` gives for each exchange; a client of which it gives nothing has failed, as in `ask`.

    Raises:
        ClientError: as `ask` does.
    """
    made, reasons = [], dict[int, object]()
    for one in heard:
        try:
            with reading(one.client):
                made.append(make(one))
        except FedtapError as error:
            reasons[one.client] = f"FedtapError: {error}"
    without(reasons, failed, len(made))
    return made


def client_failed(reason: object) -> ClientError:
    """What a client says of its failure; its own sentence where it refused with one."""
    own = _own(reason)
    return ClientError(own or f"A client failed, so there is no stack to attack: {short(reason, 200)}")


def _own(reason: object) -> str:
    """The sentence of ours in it, if there is one."""
    own = _OWN.search(str(reason))
    return short(own[1], 300) if own else ""


_OWN = re.compile(r"FedtapError: (.*?)(?: \(line \d+ of \w+\))?$", re.DOTALL)
"""A sentence of ours in what an engine says of a client; the grid in this process adds the line."""
