"""The ClientApp of every node: it looks up what is played, and replies as that scenario's clients do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, UserConfig
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


def client_app(plan: Plan) -> ClientApp:
    """A ClientApp that plays `plan(run_config)`; in an image federation the last partition is the compromised
    client."""
    return ScenarioApp(plan)
