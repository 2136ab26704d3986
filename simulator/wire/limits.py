"""A Grid around a Grid whose nodes are elsewhere: no wait on it is without a limit.

A client may be late or gone, a strategy may wait for more nodes than will ever be there, and the engine itself may have
stopped. The first costs its reply, and the round goes on with the others; the other two end the run with a sentence.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.wire.around import GridAround

_Given = TypeVar("_Given")

REPLY_TIMEOUT = 3600.0
"""Seconds that replies are waited for, where nobody names a limit: Flower's own default for a round."""

SHORTEST_CALL = 60.0
"""Seconds that a call of the engine may take, however short the limit on replies: it carries whole models."""

LOOKS = 5
"""Looks for nodes, with no message sent in between, from which on a strategy waits for more of them."""

LONGEST_LOOK = 10.0
"""Seconds between two looks for nodes that count as waiting, at most: Flower's strategies look once a second, and a
server that trains or evaluates in between does not wait."""


class Limited(GridAround):
    """`grid`, on which no call takes longer than the limit.

    Args:
        reply_timeout: seconds, above 0, for the replies to a round's messages, for the nodes that a strategy waits for,
            and (but no less than `SHORTEST_CALL`) for each call of the engine; None leaves the first to whoever sends,
            with `REPLY_TIMEOUT` as the default of all three.
    """

    def __init__(self, grid: Grid, reply_timeout: float | None = None) -> None:
        super().__init__(grid)
        self._reply_timeout = reply_timeout
        self._sent()

    def _sent(self) -> None:
        """Nobody waits for nodes now."""
        self._looks, self._looked, self._waited = 0, time.monotonic(), 0.0

    def limit(self, timeout: float | None = None) -> float:
        """Seconds for which replies are waited for, where the sender asks for `timeout`."""
        asked = REPLY_TIMEOUT if timeout is None else timeout
        return asked if self._reply_timeout is None else min(asked, self._reply_timeout)

    def get_node_ids(self) -> list[int]:
        """The wrapped grid's nodes.

        Raises:
            FedtapError: a strategy has looked again and again and sent nothing: it waits for more nodes than there are.
        """
        nodes = list(self._within(self._grid.get_node_ids))
        now = time.monotonic()
        self._waited += min(now - self._looked, LONGEST_LOOK) if self._looks else 0.0
        self._looks, self._looked = self._looks + 1, now
        if self._looks > LOOKS and self._waited > self.limit():
            raise FedtapError(
                f"The strategy has waited {self.limit():g} s for more nodes than the {len(nodes)} that are connected: "
                "start the SuperNodes that are missing, or lower the strategy's min_available_nodes."
            )
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:  # type: ignore[override]
        """As the wrapped grid does: ids, and None for a message that was not sent."""
        self._sent()
        orders = list(messages)
        return self._within(lambda: list(self._grid.push_messages(orders)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """As the wrapped grid does."""
        names = list(message_ids)
        return self._within(lambda: list(self._grid.pull_messages(names)))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As the wrapped grid does, for no longer than the limit."""
        self._sent()
        orders = list(messages)
        return list(self._grid.send_and_receive(orders, timeout=self.limit(timeout)))

    def _within(self, call: Callable[[], _Given]) -> _Given:
        """What a call of the engine returns, which tries for ever to reach a SuperLink that has stopped.

        Raises:
            FedtapError: it has returned nothing within the limit. Its thread is left behind, and ends with the process.
        """
        given: list[_Given] = []
        raised: list[BaseException] = []

        def work() -> None:
            try:
                given.append(call())
            except BaseException as error:  # it is raised where the call was made
                raised.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        limit = max(self.limit(), SHORTEST_CALL)
        thread.join(limit)
        if raised:
            raise raised[0]
        if not given:
            raise FedtapError(
                f"The SuperLink has not replied for {limit:g} s, so this run ends: see that it runs, and start "
                "the run again; what was observed is in the run's folder."
            )
        return given[0]
