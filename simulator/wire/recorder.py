"""Audit a Flower app of one's own: save what its server observes, for `fedtap attack`.

In the app's `@app.main()`, hand the strategy `Wiretap(grid, recorder(...))` in place of `grid`. Nothing else changes,
on no client either: the gradient is in the difference of the weights.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Container, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import exists, write_atomically
from fedtap.simulator.leaks import Leak, Protocol, Tensors, check_protocol, weights_file
from fedtap.simulator.wire.recorded_stack import RecordedStack, keep_weights
from fedtap.simulator.wire.records import records_of
from fedtap.simulator.wire.soundness import doubts
from fedtap.simulator.wire.threat_models import Broadcast, same_shapes, vector_of, weights_in
from fedtap.simulator.wire.wiretap import Ear

EXAMPLE_METRICS = ("num-examples", "num_examples")
"""Metrics that Flower's strategies weigh a client by, unless an app names another."""


def recorder(
    folder: Path,
    protocol: Protocol,
    network: nn.Module,
    weighted_by_key: str = "",
    *,
    rounds: Container[int] | None = None,
    clients: Iterable[int] | None = None,
) -> Ear:
    """An ear that saves each client's reply to a train message in `round_R.safetensors`, `round_R-2.safetensors` ….

    A file holds many clients' leaks, each under its node's id, and is on disk after each of them (`RecordedStack`).
    The weights that a round's clients were sent are kept once, in `weights/`, to which the files of that round refer.
    An app that sends each client weights of its own has those beside each leak.

    The ear never touches the traffic: a reply that cannot be recorded is a warning, and goes on to the strategy as it
    is. Weights may come under their names in `state_dict`, or as a list in its order (clients on numpy arrays), in any
    precision, or as differences to what was sent. What contradicts the protocol in the first leak of a client is warned
    of, for the first `CHECKED` clients. All replies are counted in `messages.json`, also those that are not recorded,
    and the first of each other type is named in a warning.

    Args:
        folder: where the leaks go; those of an earlier run stay there.
        protocol: what the server prescribes: model, image shape, classes, batch, local steps, learning rate; and what
            clients do otherwise than fedtap's: input range, loss, reduction, optimiser, BatchNorm's mode.
        network: the model that the app trains.
        weighted_by_key: the metric that holds a client's number of examples, where the app has a name of its own.
        rounds: those to record, from 1; all unless said.
        clients: nodes to record, by the ids that `grid.get_node_ids()` gives; all unless said.

    Raises:
        FedtapError: the protocol is none that a client could follow, or rounds or clients name none.
    """
    check_protocol(protocol)
    if rounds is not None and (isinstance(rounds, str) or not isinstance(rounds, Container) or not rounds):
        raise FedtapError(
            f"rounds={short(rounds)} names no rounds to record: give a collection of numbers from 1, such as "
            "range(1, 4)."
        )
    if clients is not None:
        if isinstance(clients, str) or not isinstance(clients, Iterable) or not (clients := list(clients)):
            raise FedtapError(
                f"clients={short(clients)} names no clients to record: give their nodes' ids, such as "
                "list(grid.get_node_ids())[:10]."
            )
        clients = frozenset(_number_of(node) for node in clients)
    if any(folder.glob("*.safetensors")):
        _warn(
            f"{short(folder, 120)} holds leaks already, of an earlier run: this run's are added under names that are "
            "free, and fedtap attack would take both for one; name another folder to keep them apart."
        )
    return _Recorder(folder, protocol, network, weighted_by_key, rounds, clients)


def _number_of(node: int) -> int:
    """A client's number in a leak: Flower's node ids are unsigned, and a leak's numbers are signed."""
    return node % 2**63


@dataclass
class _Round:
    """What is known of a round while its replies come."""

    sent: object
    """The arrays of the first message, as they were sent."""
    broadcast: Broadcast
    """The same, as tensors under the network's names."""
    weights: str = ""
    """Digest that names the file of these weights, once there is one."""
    stacks: dict[Hashable, RecordedStack] = field(default_factory=dict)
    """The file that is being filled, for each kind of leak that can be in one."""
    many: Counter[Hashable] = field(default_factory=Counter)
    """Leaks of each such kind so far."""
    files: int = 0
    """Files so far."""


CHECKED = 100
"""Clients whose first leak is held against the protocol as it comes; `fedtap attack` checks every leak."""

OPEN_ROUNDS = 4
"""Rounds whose replies may come in turns, in an app that does not wait for all of one round before the next."""


@dataclass
class _Recorder:
    """The ear that `recorder` describes."""

    folder: Path
    protocol: Protocol
    network: nn.Module
    weighted_by_key: str
    rounds: Container[int] | None
    clients: Container[int] | None

    def __post_init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._replies: Counter[int] = Counter()
        self._checked: set[int] = set()
        self._open: dict[int, _Round] = {}

    def __call__(self, message: Message, reply: Message) -> None:
        kind, client = message.metadata.message_type, _number_of(message.metadata.dst_node_id)
        if reply.has_error():
            return
        try:
            self._counts[kind] += 1
            if kind != MessageType.TRAIN and self._counts[kind] == 1:
                _warn(
                    f"Client {client} answers {kind!r} with {_contents(reply.content)}: the server reads this as it "
                    "is, and fedtap counts such replies and attacks none."
                )
            self._write_counts(new=self._counts[kind] == 1)
            if kind != MessageType.TRAIN:
                return
            self._replies[client] += 1
            rnd = round_of(message.content) or self._replies[client]
            if not (self.rounds is None or rnd in self.rounds) or not (self.clients is None or client in self.clients):
                return
            leak = self._record(message.content, reply.content, client, rnd)
            first = client not in self._checked and len(self._checked) < CHECKED
            found = doubts(leak)[0] if first else []
            self._checked |= {client} if first else set()
        except Exception as error:  # the bytes are a client's, and may raise whatever they like
            _warn(f"fedtap recorded nothing of client {client}: {short(error, 300)}")
            return
        for doubt in found:
            _warn(f"Client {client}: {doubt}")

    def _write_counts(self, new: bool) -> None:
        """Bring `messages.json` up to date: in one write at its beginning, since counts alone never make it shorter."""
        path, content = self.folder / "messages.json", json.dumps(self._counts).encode() + b"\n"
        with suppress(FileNotFoundError):
            if not new:
                with path.open("r+b", buffering=0) as file:
                    file.write(content)
                return
        write_atomically(path, content)

    def _record(self, message: RecordDict, reply: RecordDict, client: int, rnd: int) -> Leak:
        """Write the leak of this exchange."""
        sent = [
            (name, array.dtype, array.shape, array.stype, array.data)
            for record in records_of(message, ArrayRecord)
            for name, array in record.items()
        ]
        known = self._open.get(rnd)
        alike = known is not None and known.sent == sent  # at once where a strategy gives all clients the same bytes
        if known and alike:
            broadcast = known.broadcast
        else:
            before = by_name(weights_in(message, "message"), self.network)
            broadcast = Broadcast.of(before, self.network, client)
        after = by_name(weights_in(reply, "reply"), self.network)
        change, types = _change(broadcast, after, client)
        leak = broadcast.leak(change, types, self.protocol, client, rnd, _examples(reply, self.weighted_by_key))
        form = (leak.resolution, leak.examples is None, alike or known is None)  # a file has one of each
        former = next((one for number, one in reversed(self._open.items()) if number != rnd), None)
        if known is None:
            while len(self._open) >= OPEN_ROUNDS:
                del self._open[next(iter(self._open))]
            known = self._open[rnd] = _Round(sent, broadcast)
        stack = known.stacks.get(form)
        if stack is not None and not stack.full and exists(stack.path):
            stack.add(leak)
        else:
            if form[-1] and not (known.weights and exists(weights_file(self.folder, known.weights))):
                known.weights = keep_weights(self.folder, leak)
            # for as many as the round before had more, or as there are already
            more = former.many[form] - known.many[form] if former else 0
            room = more if more > 0 else known.many[form]
            known.stacks[form] = RecordedStack(self._free(known, rnd), leak, room, known.weights if form[-1] else None)
        known.many[form] += 1
        return leak

    def _free(self, known: _Round, rnd: int) -> Path:
        """The next name of a file of this round that is free."""
        while True:
            known.files += 1
            path = self.folder / f"round_{rnd}{f'-{known.files}' if known.files > 1 else ''}.safetensors"
            if not exists(path):
                return path


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


def round_of(message: RecordDict) -> int:
    """The server's own number of this round, from 1; 0 where the message names none."""
    for config in records_of(message, ConfigRecord):
        number = config.get("server-round")
        if type(number) is int and 0 < number < 2**63:
            return number
    return 0


def by_name(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Under the network's names: Flower calls the arrays of a list 0, 1, 2 ..., in the order of `state_dict`."""
    if list(tensors) != [str(number) for number in range(len(tensors))]:
        return tensors
    names = list(network.state_dict())
    if len(tensors) != len(names):
        names = [name for name, _ in network.named_parameters()]
    if len(tensors) != len(names):
        raise FedtapError(
            f"A list of {len(tensors)} arrays has no names, and this model's state has {len(network.state_dict())}: "
            "send them all, in the order of state_dict, or under their names."
        )
    return dict(zip(names, tensors.values(), strict=True))


def _change(broadcast: Broadcast, after: Tensors, client: int) -> tuple[Tensor, frozenset[torch.dtype]]:
    """By what the client changed the parameters, and the precisions on the wire, where it sends weights or differences.

    A client's weights are nearer to those that it was sent than to zero; a difference is nearer to zero.

    Raises:
        FedtapError: it sends some of the model's tensors only, or of another model.
    """
    if missing := [name for name in broadcast.weights if name not in after]:
        many = len(broadcast.weights)
        raise FedtapError(
            f"it sent {many - len(missing)} of the {many} tensors that it trains on (no "
            f"{short(missing[0])}), and a partial update is attacked by no attack here: record a model of those alone."
        )
    back = vector_of(after, broadcast.weights)
    if len(back) != len(broadcast.vector):
        same_shapes(after, broadcast.weights, client)
    change = back - broadcast.vector
    if back.dot(back) < change.dot(change):
        same_shapes(after, broadcast.weights, client)
        _warn(
            f"Client {client} sends differences and not weights, by their size: they are recorded as (after - before), "
            "so if the app sends (before - after), no attack will explain them."
        )
        return back, broadcast.types
    broadcast.check(after, client)
    return change, broadcast.types.union(after[name].dtype for name in broadcast.weights)


def _examples(reply: RecordDict, key: str) -> int | None:
    """How many examples the client says that it has; None where it says none that could be a count."""
    metrics: Mapping[str, Any] = {
        name: value for record in records_of(reply, MetricRecord) for name, value in record.items()
    }
    found = next((metrics[name] for name in (key, *EXAMPLE_METRICS) if name in metrics), None)
    return round(found) if isinstance(found, int | float) and 0 < found < 2**53 else None


def _contents(content: RecordDict) -> str:
    """The records of a reply in a few words."""
    arrays = [
        f"{name} of {'x'.join(map(str, array.shape))}"
        for record in content.array_records.values()
        for name, array in record.items()
    ]
    names = [str(name) for record in content.metric_records.values() for name, _ in record.items()]
    names += [str(name) for record in content.config_records.values() for name, _ in record.items()]
    return short(", ".join([*(f"array {array}" for array in arrays), *names]) or "nothing", 120)
