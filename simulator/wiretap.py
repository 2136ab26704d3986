"""The leak hook: a Flower Grid that wraps a Grid and overhears each order and its answer.

Any strategy runs over it unchanged. Answers that no honest client could have sent are handed on as errors, so that
the strategy counts a failure and the round goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from simulator.errors import FedtapError

Ear = Callable[[Message, Message], None]
"""What is done with an order and its answer. Raises FedtapError where the answer is nonsense."""

NONSENSE = 1001
"""Flower error code of an answer that the tap found unusable."""


class Wiretap(Grid):
    """`grid`, with every exchange told to `ear` before the server sees the answer."""

    def __init__(self, grid: Grid, ear: Ear) -> None:
        self._grid = grid
        self._ear = ear
        self._orders: dict[str, Message] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The wrapped grid's answers, overheard, in the order of the clients' partitions."""
        orders = list(messages)
        kept = {id(order): _keep(order) for order in orders}  # a grid may empty a message as it sends it
        answers = list(self._grid.send_and_receive(orders, timeout=timeout))
        self._orders |= {order.metadata.message_id: kept[id(order)] for order in orders}
        return self._overhear(answers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push through the wrapped grid, remembering each order until its answer comes."""
        orders = list(messages)
        kept = {id(order): _keep(order) for order in orders}
        ids = list(self._grid.push_messages(orders))
        self._orders |= {order.metadata.message_id: kept[id(order)] for order in orders}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Pull from the wrapped grid, overhearing each answer."""
        return self._overhear(list(self._grid.pull_messages(message_ids)))

    def _overhear(self, answers: list[Message]) -> list[Message]:
        passed_on = []
        # engines answer in any order, and an average should not depend on it to the last bit
        for answer in sorted(answers, key=lambda answer: (partition_of(answer), answer.metadata.src_node_id)):
            order = self._orders.pop(answer.metadata.reply_to_message_id, None)
            if order is not None:
                try:
                    self._ear(order, answer)
                except FedtapError as error:
                    metadata = answer.metadata
                    answer = Message(Error(NONSENSE, str(error)), reply_to=order)
                    answer.__dict__["_metadata"] = metadata
            passed_on.append(answer)
        return passed_on

    def set_run(self, run: Run) -> None:
        """As the wrapped grid does."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The wrapped grid's run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the wrapped grid does."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The wrapped grid's nodes."""
        return self._grid.get_node_ids()


def partition_of(answer: Message) -> int:
    """The partition an answer reports; its node's id where it reports none (an unmodified client, an error)."""
    if answer.has_content():
        for record in answer.content.metric_records.values():
            partition = record.get("partition")
            if isinstance(partition, int) and 0 <= partition < 2**31:
                return partition
    return answer.metadata.src_node_id


def _keep(order: Message) -> Message:
    kept = Message(content=RecordDict(dict(order.content)), dst_node_id=0, message_type=order.metadata.message_type)
    kept.__dict__["_metadata"] = order.metadata
    return kept
