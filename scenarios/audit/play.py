"""An app played in this process: every message reaches a client at once, and what the client does is seen."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from flwr.app import Context, Message, RecordDict

from fedtap.scenarios.audit.app import FlowerApp
from fedtap.scenarios.audit.observe import LocalTraining, Observer
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.wire.grid import SERVER_NODE, LocalGrid
from fedtap.simulator.wire.recorder import round_of
from fedtap.simulator.wire.wiretap import Wiretap

_LOOKS = 5
"""Times that an app may look for nodes without sending anything: Flower's strategies wait for a number of nodes."""

Seen = Callable[[Message, Message, LocalTraining, int], None]
"""What is done with (message, reply, what its client did, number of the round from 1)."""


class Enough(BaseException):
    """As many rounds were played as were asked for, or time is over: no app's `except Exception` stops this."""


class ObservedGrid(LocalGrid):
    """A grid whose clients are observed, and which ends an app after some rounds.

    Attributes:
        alone: held while a client trains, since Flower's legacy server asks several clients at once, from threads.
        late: whether it ended the app for want of time.
    """

    def __init__(self, app: FlowerApp, nodes: int, observer: Observer, rounds: int, until: float) -> None:
        super().__init__(app.client, nodes, app.run_config)
        self.trainings: dict[str, LocalTraining] = {}
        self.late = False
        self._observer, self._most, self._until = observer, rounds, until
        self._rounds: dict[str, int] = {}
        self._asked: Counter[int] = Counter()
        self._number: dict[str, int] = {}
        self._looked = 0
        self.alone = threading.RLock()

    def get_node_ids(self) -> list[int]:
        """All nodes.

        Raises:
            FedtapError: the app looks again and again and sends nothing: it waits for more nodes than there are.
        """
        self._looked += 1
        nodes = super().get_node_ids()
        if self._looked > _LOOKS:
            raise FedtapError(f"The app waits for more nodes than the {len(nodes)} that there are: raise --nodes.")
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let each node reply now.

        Raises:
            Enough: this would begin a round more than was asked for, or time is over.
        """
        with self.alone:
            self._looked = 0
            orders = list(messages)
            for order in orders:
                self._count(order)
            return super().push_messages(orders)

    def round_of(self, reply: Message) -> int:
        """Number of the round of the message that this replies to, from 1; 0 before the first."""
        return self._number.get(reply.metadata.reply_to_message_id, 0)

    def _count(self, order: Message) -> None:
        node = order.metadata.dst_node_id
        if order.metadata.message_type.partition(".")[0] != "train":
            return
        self._asked[node] += 1
        # a round is what the server numbers as one, else what it groups as one, else a node's next message
        key = f"{round_of(order.content)}" if round_of(order.content) else order.metadata.group_id
        key = key or f"message {self._asked[node]}"
        if key not in self._rounds:
            self.late = bool(self._rounds) and time.monotonic() > self._until  # one round there has to be
            if len(self._rounds) >= self._most or self.late:
                raise Enough
            self._rounds[key] = len(self._rounds) + 1

    def _answer(self, message: Message, name: str) -> Message:
        self._number[name] = len(self._rounds)
        with self._observer.watching() as training:
            answer = super()._answer(message, name)
        self.trainings[name] = training
        return answer


def play_app(app: FlowerApp, nodes: int, rounds: int, until: float, seen: Seen) -> bool:
    """Play the app to its end, or for `rounds` rounds; each exchange is handed to `seen` as soon as it is over.

    Args:
        until: value of time.monotonic() after which no round is begun.

    Returns:
        Whether time was over before as many rounds were played.

    Raises:
        FedtapError: the server's component raised, which ends a federation.
    """
    observer = Observer()
    grid = ObservedGrid(app, nodes, observer, rounds, until)

    def ear(message: Message, reply: Message) -> None:
        with grid.alone:
            seen(message, reply, grid.trainings.pop(reply.metadata.reply_to_message_id), grid.round_of(reply))

    context = Context(run_id=1, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=app.run_config)
    try:
        with observer.installed():
            app.server(grid=Wiretap(grid, ear), context=context)
    except Enough:
        pass
    except (FedtapError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a user's code may raise anything, and may call sys.exit
        raise FedtapError(
            f"The app's server ended with {type(error).__name__}: {short(error, 160)}: see that `flwr run` plays the "
            "app in this environment first."
        ) from error
    return grid.late
