"""Canary clients: a Grid around a Grid, with nodes of its own whose updates are known, for an audit from one run.

Each canary is a client whose update is as long as the clip, along a random direction, and how far the trained model has
moved along it tells if the client was there: Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar, ICLR 2024,
https://arxiv.org/abs/2302.03098. Departs from the paper in the directions, which are orthogonal here and so do not
disturb each other; in the coin: each canary is there with probability 1/2, as one-run bounds ask for (2305.08846); and
in what is observed, from which the other clients' updates, which the server sees, are taken away.

The direction of canary c is ``s ∘ (H[c], H[c], …) / √d``: s are d random signs and H is a Hadamard matrix of K rows, of
which d is a multiple. So all K scores are H times the K sums of the signed entries whose places are equal modulo K.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from scipy.linalg import hadamard

from fedtap.simulator.auditing.one_run import CanaryBound, bound_of_canaries
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.wire.around import GridAround
from fedtap.simulator.wire.records import numbers_of, records_of
from fedtap.simulator.wire.wiretap import Unpulled, kept_message

_SPARE = 4
"""Directions for each canary: those that are no canary's show what scores are without one."""

_FLOATS = ("float16", "float32", "float64")
"""Types of the arrays that canaries move, as Flower names them."""

Layout = dict[str, tuple[int, ...]]
"""Names and shapes of the arrays of floating point numbers that clients send back."""


class CanaryTap(GridAround):
    """`grid` with canary clients: nodes that reply as the others do, each with an update along a direction of its own.

    A canary replies when another client has replied to a message of the same kind, and as that one does: the same
    names, the mean of the round's metrics (so also the mean number of examples, by which FedAvg weighs). It has the
    arrays that it was sent, moved along its direction, or that change alone where others send theirs. Only canaries
    whose coin fell that way are among the nodes.

    Attributes:
        included: for each canary, whether it is there. A server that could see it would be no audit.
        seconds: time that the canaries have taken so far, without what the strategy does with their replies.

    Args:
        grid: the one inside, which no canary's message reaches.
        canaries: how many, from 2.
        clip: L2 norm of a canary's update; the median norm of the others' updates in that round unless said.
        seed: of coins and directions; the operating system's randomness unless said.

    Raises:
        FedtapError: there are too few canaries, or the clip is no length.
    """

    def __init__(self, grid: Grid, canaries: int, clip: float | None = None, seed: int | None = None) -> None:
        super().__init__(grid)
        if canaries < 2:
            raise FedtapError(
                f"{canaries} canaries show nothing, since some have to be in and some out: plant 64 or more."
            )
        if clip is not None and not 0 < clip < math.inf:
            raise FedtapError(
                f"A clip of {clip:g} is no length of an update: give the L2 norm that updates are clipped to."
            )
        self._draw = np.random.default_rng(seed)
        self.included: np.ndarray = self._draw.random(canaries) < 0.5
        self.seconds = 0.0
        self._clip = clip
        self._number: dict[int, int] = {}  # node -> its canary
        self._waiting = Unpulled()
        self._asked: RecordDict | None = None
        self._layout: Layout | None = None
        self._first = self._others = np.zeros(0)
        self._sent: tuple[ArrayRecord, np.ndarray] | None = None

    def get_node_ids(self) -> list[int]:
        """The wrapped grid's nodes, and the canaries that are there."""
        nodes = list(self._grid.get_node_ids())
        if not self._number:
            while len(self._number) < self.included.sum():
                node = secrets.randbits(62) + 1
                if node not in nodes:
                    self._number.setdefault(node, int(np.nonzero(self.included)[0][len(self._number)]))
        return [*nodes, *self._number]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The wrapped grid's replies, and those of the canaries after them."""
        ours, others = self._apart(messages)
        replies = list(self._grid.send_and_receive(others, timeout=timeout))
        return replies + self._replies(ours, replies)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push through the wrapped grid; the canaries' messages stay here. Ids are in the messages' order."""
        every = list(messages)
        ours, others = self._apart(every)
        names = iter(self._grid.push_messages(others))
        kept = {secrets.token_hex(16): message for message in ours}
        self._waiting.put(kept, lambda message: message.metadata.dst_node_id)
        own = iter(kept)
        return [next(own if message.metadata.dst_node_id in self._number else names) for message in every]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Pull from the wrapped grid; canaries reply as soon as another client has."""
        asked = list(message_ids)
        replies = list(self._grid.pull_messages([name for name in asked if name not in self._waiting]))
        answered = {reply.metadata.message_type for reply in replies if reply.has_content()}
        due = [name for name in asked if name in self._waiting]
        due = [name for name in due if self._waiting[name].metadata.message_type in answered]
        return replies + self._replies([self._waiting.pop(name) for name in due], replies)

    def bound(self, arrays: ArrayRecord, delta: float = 1e-5, alpha: float = 1e-3) -> CanaryBound:
        """A lower bound on ε for a client, of all rounds together, from the model that came of them.

        Args:
            arrays: the final model's, as the strategy returns them.
            delta: δ of the promise, in (0, 1).
            alpha: probability with which the bound is above ε, at most.

        Raises:
            FedtapError: no client has trained, or these are the arrays of another model, or of one that has diverged.
        """
        if self._layout is None:
            raise FedtapError(
                "No client has replied to a train message through this tap, so nothing is known of its canaries: give "
                "the strategy the tap in the place of the grid, and ask for the bound when it has ended."
            )
        moved = self._flat(arrays) - self._first
        if not np.isfinite(moved).all():
            raise FedtapError(
                "The final model has numbers that are not finite, so nothing can be read in it: see why training "
                "diverges, by a lower learning rate or less noise."
            )
        if self._others.any():  # what the others did hides canaries, and an attacker may know it
            moved -= self._others * float(moved @ self._others / (self._others @ self._others))
        moved *= self._signs
        size = len(self._rows)
        sums = moved[: self._used].reshape(-1, size).sum(0)
        scores = self._rows @ sums / math.sqrt(self._used)
        canaries = len(self.included)
        return bound_of_canaries(scores[:canaries], self.included, scores[canaries:], alpha, delta)

    def _apart(self, messages: Iterable[Message]) -> tuple[list[Message], list[Message]]:
        """The messages to canaries, and all others."""
        ours: list[Message] = []
        others: list[Message] = []
        for message in messages:
            if message.metadata.dst_node_id in self._number:
                ours.append(kept_message(message))
            else:
                others.append(message)
        if others and _trains(others[0]):
            self._asked = kept_message(others[0]).content
        return ours, others

    def _replies(self, messages: list[Message], others: list[Message]) -> list[Message]:
        """What the canaries reply to these messages, where others have replied to theirs."""
        began = time.perf_counter()
        contents = [reply.content for reply in others if reply.has_content()]
        if not contents:
            return []
        length = 0.0
        if self._asked and any(map(_trains, others)):
            contents, length = self._watch(contents)
            if not contents:
                return []
        metrics = _mean_metrics(contents) if messages else {}
        replies = []
        for message in messages:
            moved = {}
            if _trains(message):
                before = self._before(message.content)
                moved = self._moved(before, self._number[message.metadata.dst_node_id], length, contents[0])
            replies.append(Message(_like(contents[0], metrics, moved), reply_to=message))
        self.seconds += time.perf_counter() - began
        return replies

    def _prepare(self, sent: RecordDict, replies: list[RecordDict]) -> None:
        """Directions, once it is known what clients send back.

        Raises:
            FedtapError: clients send back too few numbers for so many directions.
        """
        layout = max((_layout(sent, reply) for reply in replies), key=_entries)
        entries, canaries = _entries(layout), len(self.included)
        if entries < canaries:
            raise FedtapError(
                f"{canaries} canaries need as many directions, and clients send back {entries} numbers of the model "
                "that they are sent: plant fewer canaries."
            )
        size = 2 ** math.ceil(math.log2(_SPARE * canaries))
        while size > entries:
            size //= 2
        if size < canaries:
            raise FedtapError(
                f"{canaries} orthogonal canaries need a model of {2 ** math.ceil(math.log2(canaries))} numbers, and "
                f"this one has {entries}: plant {size} at most."
            )
        self._layout = layout
        self._rows = hadamard(size, dtype=np.int8).astype(np.float32)
        self._used = entries // size * size
        bits = np.unpackbits(np.frombuffer(self._draw.bytes(entries // 8 + 1), np.uint8))[:entries]
        self._signs = 1 - 2 * bits.astype(np.float32)
        self._first = self._flat(self._record(sent))
        self._others = np.zeros(entries, np.float32)
        changes = [after for reply in replies if (after := self._numbers(reply)) is not None]
        nearer_0 = [np.linalg.norm(after) < np.linalg.norm(after - self._first) for after in changes]
        self._changes_alone = sum(nearer_0) > len(nearer_0) / 2

    def _before(self, sent: RecordDict) -> np.ndarray:
        """What a canary moves: the numbers of the arrays that it was sent, as all others were; or 0."""
        if self._changes_alone:
            return np.zeros_like(self._first)
        record = self._record(sent)
        if self._sent is None or self._sent[0] is not record:
            self._sent = record, self._flat(record)
        return self._sent[1]

    def _record(self, content: RecordDict) -> ArrayRecord:
        """The record of the arrays that canaries move."""
        assert self._layout is not None
        return next(record for record in records_of(content, ArrayRecord) if self._layout.keys() <= record.keys())

    def _flat(self, record: ArrayRecord) -> np.ndarray:
        """The numbers of a record's arrays that canaries move, in a row.

        Raises:
            FedtapError: it lacks some.
        """
        assert self._layout is not None
        for name, shape in self._layout.items():
            if name not in record or tuple(record[name].shape) != shape:
                raise FedtapError(
                    f"The arrays have no {name} of shape {shape}, as the clients' replies had: give the final arrays "
                    "of the model that was trained."
                )
        return np.concatenate([record[name].numpy().reshape(-1) for name in self._layout]).astype(np.float64)

    def _watch(self, contents: list[RecordDict]) -> tuple[list[RecordDict], float]:
        """Add the others' updates to those of earlier rounds: the replies that are updates, and a canary's length."""
        assert self._asked is not None
        if self._layout is None:
            self._prepare(self._asked, contents)
            assert self._layout is not None
        before = self._before(self._asked).astype(np.float32)
        good, lengths = [], []
        for content in contents:
            after = self._numbers(content)
            if after is not None:
                update = after - before
                good.append(content)
                lengths.append(float(np.linalg.norm(update)))
                self._others += update * np.float32(min(1.0, (self._clip or math.inf) / max(lengths[-1], 1e-30)))
        return good, self._clip or float(np.median(lengths or [0.0]))

    def _numbers(self, reply: RecordDict) -> np.ndarray | None:
        """The numbers of a client's reply that canaries move; None where it has no such finite numbers."""
        assert self._layout is not None
        try:
            record = self._record(reply)
            found = [numbers_of(record[name]) for name in self._layout]
        except Exception:  # the bytes are a client's, and may raise whatever they like
            return None
        whole = np.concatenate([part.reshape(-1) for part in found]).astype(np.float32, copy=False)
        fits = [part.shape for part in found] == list(self._layout.values())
        return whole if fits and math.isfinite(float(whole @ whole)) else None

    def _moved(self, before: np.ndarray, canary: int, length: float, like: RecordDict) -> dict[str, Array]:
        """The arrays that this canary sends back, in the types of another client's."""
        assert self._layout is not None
        after = before.copy()
        step = self._signs[: self._used].reshape(-1, len(self._rows)) * self._rows[canary]
        after[: self._used] += step.reshape(-1) * (length / math.sqrt(self._used))
        types, start, arrays = _floats(like), 0, {}
        for name, shape in self._layout.items():
            stop = start + math.prod(shape)
            arrays[name] = Array(after[start:stop].reshape(shape).astype(types[name].dtype))
            start = stop
        return arrays


def _trains(message: Message) -> bool:
    """Whether it is a train message, or the reply to one."""
    return message.metadata.message_type.split(".")[0] == MessageType.TRAIN


def _floats(content: RecordDict) -> dict[str, Array]:
    """All arrays of floating point numbers in a message, by name."""
    return {
        name: array
        for record in records_of(content, ArrayRecord)
        for name, array in record.items()
        if array.dtype in _FLOATS
    }


def _layout(sent: RecordDict, reply: RecordDict) -> Layout:
    """The arrays that come back as they were sent, but for their numbers."""
    asked = _floats(sent)
    layout = {name: tuple(array.shape) for name, array in _floats(reply).items() if name in asked}
    return {name: shape for name, shape in layout.items() if tuple(asked[name].shape) == shape}


def _entries(layout: Layout) -> int:
    return sum(math.prod(shape) for shape in layout.values())


def _mean_metrics(contents: list[RecordDict]) -> dict[tuple[str, str], int | float]:
    """The mean of each finite number among the metrics of these replies, by record and name."""
    found: dict[tuple[str, str], list[int | float]] = {}
    for content in contents:
        for key, record in content.metric_records.items():
            for name, value in record.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault((key, name), []).append(value)
    means = {at: sum(values) / len(values) for at, values in found.items()}
    return {at: round(means[at]) if all(type(one) is int for one in found[at]) else means[at] for at in means}


def _like(reply: RecordDict, metrics: Mapping[tuple[str, str], int | float], moved: Mapping[str, Array]) -> RecordDict:
    """Another client's reply with other metrics and arrays."""
    content = RecordDict(dict(reply.items()))
    for key, record in reply.metric_records.items():
        content[key] = MetricRecord({name: metrics.get((key, name), value) for name, value in record.items()})
    for key, arrays in reply.array_records.items():
        content[key] = ArrayRecord({name: moved.get(name, array) for name, array in arrays.items()})
    return content
