"""The ClientApp of every node: it looks up what is played, and replies as that scenario's clients do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, UserConfig
from flwr.clientapp import ClientApp

from fedtap.clients.training import one_thread
from fedtap.simulator.scenario import Scenario
from fedtap.simulator.wire import roll

Plan = Callable[[UserConfig], Sequence[Scenario]]


class ScenarioApp(ClientApp):
    """A ClientApp that replies to every message as the scenario's clients do, whatever the message's type."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply of this node; a node that is asked for its partition names it."""
        if message.metadata.message_type == roll.ASKED:
            return roll.present(message, context)
        config: ConfigRecord = message.content.config_records["config"]
        scenario = self._plan(context.run_config)[int(config["part"])]  # type: ignore[arg-type]
        with one_thread():
            return scenario.reply(message, context, Path(str(context.run_config.get("data-root") or "data")))

    def at_once(self, orders: Sequence[tuple[Message, Context]]) -> Mapping[int, Message]:
        """The replies, by the orders' places, of those clients that the scenario computes together."""
        messages = [message for message, _ in orders]
        if any(message.metadata.message_type != MessageType.TRAIN for message in messages):
            return {}
        parts = {int(message.content.config_records["config"]["part"]) for message in messages}  # type: ignore[arg-type]
        if len(parts) > 1:
            return {}
        config = orders[0][1].run_config
        with one_thread():
            return self._plan(config)[parts.pop()].at_once(orders, Path(str(config.get("data-root") or "data")))


def client_app(plan: Plan) -> ClientApp:
    """A ClientApp that plays `plan(run_config)`; in an image federation the last partition is the compromised
    client."""
    return ScenarioApp(plan)
