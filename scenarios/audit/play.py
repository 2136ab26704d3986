"""An app played in this process: every message reaches a client at once, and what the client does is seen."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from flwr.app import Context, Message, RecordDict

from fedtap.scenarios.audit.app import FlowerApp
from fedtap.scenarios.audit.observe import LocalTraining, Observer
from fedtap.scenarios.audit.process import users_code
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.wire.grid import SERVER_NODE, LocalGrid
from fedtap.simulator.wire.recorder import round_of
from fedtap.simulator.wire.wiretap import Wiretap

_LOOKS = 5
"""Times that an app may look for nodes without sending anything: Flower's strategies wait for a number of nodes."""

Seen = Callable[[Message, Message, LocalTraining, int], None]
"""What is done with (message, reply, what its client did, number of the round from 1)."""


class Enough(BaseException):
    """As many rounds were played as were asked for, or time is over: no app's `except Exception` stops this."""


class PlayLimits:
    """What ends an app that is audited: as many rounds as were asked for, or time.

    Attributes:
        late: whether time was over before the last of them.
    """

    def __init__(self, rounds: int, until: float) -> None:
        self._most, self._until = rounds, until
        self._known: set[str] = set()
        self._asked: Counter[int] = Counter()
        self._looked = 0
        self.late = False

    @property
    def rounds(self) -> int:
        """Number of rounds that were begun."""
        return len(self._known)

    def look(self, nodes: int) -> None:
        """The app looks for nodes, and all that there will be are there.

        Raises:
            FedtapError: it looks again and again and sends nothing: it waits for more nodes than there are.
        """
        self._looked += 1
        if self._looked > _LOOKS:
            raise FedtapError(f"The app waits for more nodes than the {nodes} that there are: raise --nodes.")

    def send(self, message: Message) -> None:
        """The app sends this.

        Raises:
            Enough: this would begin a round more than was asked for, or time is over.
        """
        self._looked = 0
        node = message.metadata.dst_node_id
        if message.metadata.message_type.partition(".")[0] != "train":
            return
        self._asked[node] += 1
        # a round is what the server numbers as one, else what it groups as one, else a node's next message
        key = f"{round_of(message.content)}" if round_of(message.content) else message.metadata.group_id
        key = key or f"message {self._asked[node]}"
        if key not in self._known:
            self.late = bool(self._known) and time.monotonic() > self._until  # one round there has to be
            if len(self._known) >= self._most or self.late:
                raise Enough
            self._known.add(key)


class ObservedGrid(LocalGrid):
    """A grid whose clients are observed, and which ends an app after some rounds.

    Attributes:
        alone: held while a client trains, since Flower's legacy server asks several clients at once, from threads.
    """

    def __init__(self, app: FlowerApp, nodes: int, observer: Observer, limits: PlayLimits) -> None:
        super().__init__(app.client, nodes, app.run_config)
        self.trainings: dict[str, LocalTraining] = {}
        self._observer, self._limits = observer, limits
        self._number: dict[str, int] = {}
        self.alone = threading.RLock()

    def get_node_ids(self) -> list[int]:
        """All nodes.

        Raises:
            FedtapError: the app waits for more.
        """
        nodes = super().get_node_ids()
        self._limits.look(len(nodes))
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let each node reply now.

        Raises:
            Enough: this would begin a round more than was asked for, or time is over.
        """
        with self.alone:
            orders = list(messages)
            for order in orders:
                self._limits.send(order)
            return super().push_messages(orders)

    def round_of(self, reply: Message) -> int:
        """Number of the round of the message that this replies to, from 1; 0 before the first."""
        return self._number.get(reply.metadata.reply_to_message_id, 0)

    def _answer(self, message: Message, name: str, answer: Message | None) -> Message:
        self._number[name] = self._limits.rounds
        with self._observer.watching() as training:
            answer = super()._answer(message, name, answer)
        self.trainings[name] = training
        return answer


@contextmanager
def server_ending() -> Iterator[None]:
    """Around the server's component of an app, which `Enough` ends.

    Raises:
        FedtapError: it raised, which ends a federation.
    """

    def said(why: str) -> str:
        return f"The app's server ended with {why}: see that `flwr run` plays the app in this environment first."

    with users_code(said, FedtapError), suppress(Enough):
        yield


def play_app(app: FlowerApp, nodes: int, rounds: int, until: float, seen: Seen) -> bool:
    """Play the app to its end, or for `rounds` rounds; each exchange is handed to `seen` as soon as it is over.

    Args:
        until: value of time.monotonic() after which no round is begun.

    Returns:
        Whether time was over before as many rounds were played.

    Raises:
        FedtapError: the server's component raised, which ends a federation.
    """
    observer, limits = Observer(), PlayLimits(rounds, until)
    grid = ObservedGrid(app, nodes, observer, limits)

    def ear(message: Message, reply: Message) -> None:
        with grid.alone:
            seen(message, reply, grid.trainings.pop(reply.metadata.reply_to_message_id), grid.round_of(reply))

    context = Context(run_id=1, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config=app.run_config)
    with server_ending(), observer.installed():
        app.server(grid=Wiretap(grid, ear), context=context)
    return limits.late
