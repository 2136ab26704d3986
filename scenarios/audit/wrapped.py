"""An app's components with fedtap in front of them, in the processes of Flower's own engines.

A client's process observes the client, judges what it replied with, and leaves a file; the server's process counts
rounds and messages, and ends the app after as many rounds as were asked for. The process of `fedtap audit` reads both.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtap.scenarios.audit.app import component
from fedtap.scenarios.audit.attacks import Ranges
from fedtap.scenarios.audit.judging import judged_and_noted
from fedtap.scenarios.audit.observe import LocalTraining, Observer
from fedtap.scenarios.audit.play import PlayLimits, server_ending
from fedtap.scenarios.audit.stand_in import standing_in
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import write_atomically
from fedtap.simulator.run import finite
from fedtap.simulator.wire.grid import CLIENT_FAILED, failure_reason
from fedtap.simulator.wire.wiretap import Wiretap

SERVER_FILE = "server.json"
"""Name of the file that the server's process writes."""

_LOOK = 0.5
"""Seconds between two looks for nodes that are still to come."""


_STANDING = ExitStack()
"""What is open until this process ends."""


@dataclass(frozen=True)
class Wrapping:
    """What the components are told, as JSON in the module that names them."""

    client: str
    """The app's own component, as module:attribute."""
    server: str
    """The app's own component, as module:attribute."""
    out: str
    """Folder for what is seen."""
    data: str | None
    """What stands in for the app's data; None for its own."""
    nodes: int
    """Clients."""
    rounds: int
    """Rounds that are played, at most."""
    until: float
    """Value of time.monotonic(), which all processes of a machine share, after which no round is begun."""

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


@cache
def _stood_in(data: str | None, nodes: int) -> list[str]:
    """Let local data stand in for the app's until this process ends; what the app asked for, as it goes on."""
    return _STANDING.enter_context(standing_in(Path(data) if data else None, nodes))


class ObservedClient(ClientApp):
    """The app's client, watched while it answers.

    Args:
        folder: where the app's modules lie.
        wrapping: a `Wrapping` as JSON.
    """

    def __init__(self, folder: Path, wrapping: str) -> None:
        super().__init__()
        self._folder, self._wrapping = folder, Wrapping(**json.loads(wrapping))

    def __call__(self, message: Message, context: Context) -> Message:
        """The app's own reply."""
        about = self._wrapping
        asked = _stood_in(about.data, about.nodes)
        own: ClientApp = component(self._folder, about.client)
        sent, observer = copy.deepcopy(message), Observer()  # a client may change what it is sent
        with observer.installed(), observer.watching() as training:
            try:
                reply = own(message, context)
            except Exception as error:  # an engine would reply with an error too, and say less
                return Message(Error(CLIENT_FAILED, failure_reason(error)), reply_to=sent)
        if not reply.has_error():
            _leave(about, sent, reply, training, int(context.node_config["partition-id"]), asked)
        return reply


def _leave(
    about: Wrapping, message: Message, reply: Message, training: LocalTraining, client: int, asked: list[str]
) -> None:
    """Write down what an exchange is."""
    ranges: Ranges = {}
    found = judged_and_noted(message, reply, training, client, 0, ranges)
    if found is None:
        return
    exchange, shape = found
    told = {
        "message": message.metadata.message_id,
        "exchange": finite(exchange.told()),
        "ranges": [[list(one), known.low.tolist(), known.high.tolist()] for one, known in ranges.items()],
        "shape": shape,
        "asked": asked,
    }
    write_atomically(Path(about.out) / f"exchange_{uuid4().hex}.json", json.dumps(told).encode())


class _Tally:
    """What the server's process knows, written anew with each message and reply."""

    def __init__(self, about: Wrapping, asked: list[str]) -> None:
        self._file, self._asked = Path(about.out) / SERVER_FILE, asked
        self._limits = PlayLimits(about.rounds, about.until)
        self._nodes = about.nodes
        self._alone = threading.RLock()  # Flower's legacy server asks several clients at once, from threads
        self._thread = threading.current_thread()
        self._round: dict[str, int] = {}
        self._messages: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def limit(self, grid: Grid) -> None:
        """Count what is sent over the grid, and end the app in time."""
        push, look = grid.push_messages, grid.get_node_ids

        def push_messages(messages: Iterable[Message]) -> Iterable[str]:
            with self._alone:
                orders = list(messages)
                for order in orders:
                    self._limits.send(order)
                names = list(push(orders))
                self._round |= dict.fromkeys(filter(None, names), self._limits.rounds)
                self.write()
                return names

        def get_node_ids() -> Iterable[int]:
            nodes = list(look())
            if len(nodes) >= self._nodes and threading.current_thread() is self._thread:
                self._limits.look(len(nodes))
            return nodes

        grid.push_messages, grid.get_node_ids = push_messages, get_node_ids  # type: ignore[method-assign]

    def ear(self, message: Message, reply: Message) -> None:
        """Count a reply."""
        with self._alone:
            self._messages[message.metadata.message_type] += 1
            if reply.has_error():
                self._failures[short(reply.error.reason, 200)] += 1
            self.write()

    def write(self, **more: Any) -> None:
        """Leave what is known."""
        told = {"round": self._round, "messages": self._messages, "failures": self._failures, "asked": self._asked}
        write_atomically(self._file, json.dumps({**told, "late": self._limits.late, **more}).encode())


def observed_server(folder: Path, wrapping: str) -> ServerApp:
    """The app's server, which begins once all nodes are there and ends after as many rounds as were asked for.

    Args:
        folder: where the app's modules lie.
        wrapping: a `Wrapping` as JSON.
    """
    about = Wrapping(**json.loads(wrapping))
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        tally = _Tally(about, _stood_in(about.data, about.nodes))
        try:
            own = component(folder, about.server)
            while len(list(grid.get_node_ids())) < about.nodes:
                time.sleep(_LOOK)
            tally.limit(grid)
            with server_ending():
                own(grid=Wiretap(grid, tally.ear), context=context)
        except FedtapError as error:
            tally.write(error=str(error))
            raise
        tally.write(ended=True)

    return app
