"""The leak hook: a Flower Grid that wraps a Grid and overhears each message and its reply.

Any strategy runs over it unchanged. Answers that no honest client could have sent are handed on as errors, so that
the strategy counts a failure and the round goes on. Answers that nobody asked for (to no order, from another node than
the order's, or a second one to the same order) reach neither the tap nor the strategy, and neither do those that come
after the limit: no later round pulls them.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterable

from flwr.app import Error, Message, MetricRecord
from flwr.serverapp import Grid

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.wire.around import GridAround
from fedtap.simulator.wire.limits import Limited
from fedtap.simulator.wire.records import records_of

Ear = Callable[[Message, Message], None]
"""What is done with a message and its reply, or with the error that stands for a reply that did not come in time.
Raises FedtapError where the reply is nonsense."""

NONSENSE = 1001
"""Flower error code of a reply that the tap found unusable."""

LATE = 1002
"""Flower error code with which the ear is told that no reply came in time."""

PAUSE = 0.25
"""Seconds between two looks for replies on a grid whose nodes are elsewhere."""

UNPULLED = 8
"""Messages to a node that are remembered until somebody pulls their replies."""


class Unpulled(dict[str, Message]):
    """Messages by id that wait to be pulled: the latest `UNPULLED` of each node, none beyond its time to live."""

    def put(self, messages: dict[str, Message], node: Callable[[Message], int]) -> None:
        """Add messages, and forget those that nobody will pull any more."""
        now, of_node = time.time(), [node(message) for message in messages.values()]
        for name, message in reversed(list(self.items())):
            of_node.append(node(message))
            if of_node.count(of_node[-1]) > UNPULLED or message.metadata.created_at + message.metadata.ttl < now:
                del self[name]
        self.update(messages)


class Wiretap(GridAround):
    """`grid`, with every exchange passed to `ear` before the server sees the reply.

    No wait on it is without a limit: `grid` is taken for a `Limited` one, unless it is one, or replies at once.

    Attributes:
        dropped: replies that nobody had asked for.
    """

    def __init__(self, grid: Grid, ear: Ear) -> None:
        instant = getattr(grid, "instant", False)
        super().__init__(grid if instant or isinstance(grid, Limited) else Limited(grid))
        self._ear = ear
        self._orders = Unpulled()
        self.dropped = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The wrapped grid's replies, overheard as they come, and in the order of the clients' partitions.

        Args:
            timeout: seconds after which replies are no longer waited for; None means REPLY_TIMEOUT. A shorter limit of
                the wrapped grid's own holds.
        """
        orders = list(messages)
        kept = {id(order): kept_message(order) for order in orders}  # a grid may empty a message as it sends it
        if not isinstance(self._grid, Limited):
            answers = list(self._grid.send_and_receive(orders, timeout=timeout))
            return _sorted(self._overhear(answers, {_id(order): kept[id(order)] for order in orders}))
        names: list[str | None] = list(self._grid.push_messages(orders))
        names += [None] * (len(orders) - len(names))
        waiting: dict[str, Message] = {}
        for order, name in zip(orders, names, strict=True):
            if name is None:  # Flower's word for a message that was not sent
                self._tell(kept[id(order)], "The SuperLink took no message to it: see that its SuperNode runs.")
            else:
                waiting[name] = kept[id(order)]
        passed_on: list[Message] = []
        limit = self._grid.limit(timeout)
        until = time.monotonic() + limit
        while waiting:
            passed_on += self._overhear(self._grid.pull_messages(list(waiting)), waiting)
            if not waiting or time.monotonic() >= until:
                break
            time.sleep(min(PAUSE, limit))
        for order in waiting.values():
            self._tell(order, f"No reply came within {limit:g} s: see that its SuperNode runs, or raise the limit.")
        return _sorted(passed_on)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push through the wrapped grid, remembering each message until its reply comes, or as `Unpulled` says."""
        orders = list(messages)
        kept = {id(order): kept_message(order) for order in orders}
        ids = list(self._grid.push_messages(orders))
        self._orders.put({_id(order): kept[id(order)] for order in orders}, lambda order: order.metadata.dst_node_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Pull from the wrapped grid, overhearing each reply."""
        return _sorted(self._overhear(list(self._grid.pull_messages(message_ids)), self._orders))

    def _overhear(self, answers: list[Message], orders: dict[str, Message]) -> list[Message]:
        """Those of the replies that were asked for, passed to the ear; their messages are taken out of `orders`."""
        passed_on = []
        for answer in answers:
            order = orders.get(answer.metadata.reply_to_message_id)
            if order is None or not _from_there(order, answer):
                self._drop()
                continue
            del orders[answer.metadata.reply_to_message_id]
            try:
                if not answer.has_error() and answer.metadata.message_type != order.metadata.message_type:
                    other, asked = short(answer.metadata.message_type), order.metadata.message_type
                    answer = _refused(order, answer, f"It answered {other!r} when it was asked {asked!r}.")
                self._ear(order, answer)
            except FedtapError as error:
                answer = _refused(order, answer, str(error))
            passed_on.append(answer)
        return passed_on

    def _tell(self, order: Message, why: str) -> None:
        """Tell the ear why there is no reply; the strategy sees none, as on Flower's own grids."""
        with contextlib.suppress(FedtapError):
            self._ear(order, Message(Error(LATE, why), reply_to=order))

    def _drop(self) -> None:
        if not self.dropped:
            warnings.warn("A node sent an answer that nobody had asked it for, and fedtap dropped it.", stacklevel=4)
        self.dropped += 1

    def get_node_ids(self) -> Iterable[int]:
        """The wrapped grid's nodes.

        Raises:
            FedtapError: a strategy has waited for more of them for longer than the limit.
        """
        return self._grid.get_node_ids()


def partition_of(answer: Message) -> int:
    """The partition a reply reports; its node's id where it reports none (an unmodified client, an error).

    It is the client's word, for any node can report any number: see `fedtap.simulator.wire.roll` for who is who.
    """
    if answer.has_content():
        for record in records_of(answer.content, MetricRecord):
            partition = record.get("partition")
            if type(partition) is int and 0 <= partition < 2**31:
                return partition
    return answer.metadata.src_node_id


def _from_there(order: Message, answer: Message) -> bool:
    """Whether a reply is the asked node's, or the engine's own word that there will be none."""
    source = answer.metadata.src_node_id
    return source == order.metadata.dst_node_id or (answer.has_error() and source == order.metadata.src_node_id)


def _sorted(answers: list[Message]) -> list[Message]:
    """Engines reply in any order, and an average should not depend on it to the last bit."""
    return sorted(answers, key=lambda answer: (partition_of(answer), answer.metadata.src_node_id))


def _refused(order: Message, answer: Message, why: str) -> Message:
    """The reply's place taken by an error."""
    error = Message(Error(NONSENSE, why), reply_to=order)
    error.__dict__["_metadata"] = answer.metadata
    return error


def _id(order: Message) -> str:
    return order.metadata.message_id


def kept_message(order: Message) -> Message:
    """A copy with the same metadata, which stays whole where a grid empties a message as it sends it."""
    kept = copy.copy(order)  # a new message would make metadata anew
    kept.__dict__["_content"] = order.content.copy()
    return kept
