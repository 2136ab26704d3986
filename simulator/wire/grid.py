"""A Flower Grid inside this process: no Ray, no ports. The default for the command line and the tests."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # Flower offers no public way to be a server in one's own process

from fedtap.simulator.errors import short
from fedtap.simulator.wire.records import array_with
from fedtap.simulator.wire.wiretap import Unpulled

SERVER_NODE = 1
CLIENT_FAILED = 2
"""Flower's own error code for a ClientApp that raised."""

LONGEST_REASON = 400
"""Characters of what is kept of a client's error."""


class LocalGrid(Grid):
    """Nodes 0 … `nodes` - 1, each with its own Context, replying with `app` as soon as a message is pushed.

    An app with a method `at_once` is first asked for the replies that it computes together: of (message, context) in
    order, it returns place -> reply, and the others' messages go to the app one by one.
    """

    instant = True
    """All replies that there will be are there once messages are pushed."""

    def __init__(self, app: ClientAppCallable, nodes: int, run_config: UserConfig | None = None) -> None:
        self._app = app
        self._run = Run.create_empty(run_id=1)
        self._answers = Unpulled()
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER_NODE
        self._contexts = {
            SERVER_NODE + 1 + partition: Context(
                run_id=1,
                node_id=SERVER_NODE + 1 + partition,
                node_config={"partition-id": partition, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for partition in range(nodes)
        }

    @property
    def partitions(self) -> Mapping[int, int]:
        """Node -> its partition, which no node can change."""
        return {node: node - SERVER_NODE - 1 for node in self._contexts}

    def context(self, node: int) -> Context:
        """What the node knows: its partition, its state, the run's config."""
        return self._contexts[node]

    def set_run(self, run: Run) -> None:
        """Name the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes: they are always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let each node reply to its message now; replies that nobody pulls are kept as `Unpulled` says."""
        orders = list(messages)
        names = [_named(message) for message in orders]
        at_once = self._at_once(orders)
        answers = {
            name: self._answer(message, name, at_once.get(place))
            for place, (message, name) in enumerate(zip(orders, names, strict=True))
        }
        self._answers.put(answers, lambda answer: answer.metadata.src_node_id)
        return list(answers)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, each handed out once."""
        return [self._answers.pop(name) for name in list(message_ids) if name in self._answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull. Every node has replied when this returns, so `timeout` never passes."""
        return self.pull_messages(self.push_messages(messages))

    def _at_once(self, orders: Sequence[Message]) -> Mapping[int, Message]:
        """Replies, by the orders' places, that the app computes together (`at_once`, where it has it)."""
        together = getattr(self._app, "at_once", None)
        if together is None or len(orders) < 2:
            return {}
        try:
            found: Mapping[int, Message] = together([(one, self._contexts[one.metadata.dst_node_id]) for one in orders])
        except Exception:  # then each client says for itself what is wrong
            return {}
        return found

    def _answer(self, message: Message, name: str, answer: Message | None) -> Message:
        asked = Message(RecordDict(), message.metadata.dst_node_id, message.metadata.message_type)
        asked.__dict__["_metadata"] = copy.copy(message.metadata)
        try:
            if answer is None:
                # the client's own copy: strategies share one RecordDict between all nodes
                content, about = copy.deepcopy(message.content), asked.metadata
                received = Message(content, about.dst_node_id, about.message_type)
                received.__dict__["_metadata"] = copy.copy(message.metadata)
                answer = self._app(received, self._contexts[about.dst_node_id])
            if not isinstance(answer, Message):
                raise TypeError(f"the ClientApp returned {type(answer).__name__} and not a Message")
            if _about(answer) != (name, *_about(asked)[2:0:-1], asked.metadata.message_type):
                raise ValueError("the ClientApp answered another message than the one that it was sent")
            if answer.has_error():
                failed = answer.error
                return Message(Error(int(failed.code), short(failed.reason, LONGEST_REASON)), reply_to=asked)
            return Message(_arrived(answer.content), reply_to=asked)
        except KeyboardInterrupt:  # the user's
            raise
        except BaseException as error:  # as on Flower's engines, a client that raises or exits answers with an error
            return Message(Error(CLIENT_FAILED, failure_reason(error)), reply_to=asked)


def _named(message: Message) -> str:
    """The message's id, new."""
    message.metadata.__dict__["_message_id"] = str(uuid4())
    return message.metadata.message_id


def _about(message: Message) -> tuple[str, int, int, str]:
    """What it replies to, from whom, to whom, and of what type it is."""
    about = message.metadata
    return about.reply_to_message_id, about.src_node_id, about.dst_node_id, about.message_type


def _arrived(content: RecordDict) -> RecordDict:
    """Records as a server gets them over a network: of plain values, none shared with the client.

    Raises:
        Exception: they cannot be sent.
    """
    arrays = dict[str, ArrayRecord]()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays[name] = ArrayRecord()
            for key, sent in record.items():
                arrays[name][key] = array_with(str(sent.dtype), tuple(sent.shape), str(sent.stype), bytes(sent.data))
    # Flower checks values as they are put into a record, and a client may have put them there by another way
    others: dict[str, Any] = {name: record for name, record in content.items() if name not in arrays}
    rest = {name: type(record).inflate(type(record)(dict(record)).deflate()) for name, record in others.items()}
    return RecordDict({name: arrays[name] if name in arrays else rest[name] for name in content})


def failure_reason(error: BaseException) -> str:
    """What was raised, what it says, and where."""
    try:
        said = str(error)
    except BaseException:  # a client's own exception may raise as it is told
        said = "which does not say why"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {short(said, LONGEST_REASON)} (line {last.lineno} of {last.name})"
