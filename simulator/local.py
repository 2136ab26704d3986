"""A Flower Grid inside this process: no Ray, no ports. The default for the command line and the tests."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterable
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # Flower offers no public way to be a server in one's own process

SERVER_NODE = 1
CLIENT_FAILED = 2
"""Flower's own error code for a ClientApp that raised."""


class LocalGrid(Grid):
    """Nodes 0 … `nodes` - 1, each with its own Context, answering with `app` as soon as a message is pushed."""

    def __init__(self, app: ClientApp, nodes: int, run_config: UserConfig | None = None) -> None:
        self._app = app
        self._run = Run.create_empty(run_id=1)
        self._answers: dict[str, Message] = {}
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
        """Let each node answer its message now."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self._answers[message.metadata.message_id] = self._answer(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers to these messages, each handed out once."""
        return [self._answers.pop(name) for name in list(message_ids) if name in self._answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull. Every node has answered when this returns, so `timeout` never passes."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        received = Message(RecordDict(), message.metadata.dst_node_id, message.metadata.message_type)
        received.__dict__["_metadata"] = message.metadata
        received.content = copy.deepcopy(message.content)  # strategies share one RecordDict between all nodes
        try:
            answer = self._app(received, self._contexts[message.metadata.dst_node_id])
            if not isinstance(answer, Message):
                raise TypeError(f"the ClientApp returned {type(answer).__name__} and not a Message")
            return answer
        except Exception as error:  # as Flower's engines do: a client that raises answers with an error
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} (line {last.lineno} of {last.name})"
            return Message(Error(CLIENT_FAILED, reason), reply_to=received)
