"""The ClientApp of every node: it looks up the scenario and its own number, and replies accordingly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, UserConfig
from flwr.clientapp import ClientApp

from fedtap.clients import compromised, honest
from fedtap.clients.training import one_thread
from fedtap.simulator.federation.settings import PrivateData, Scenario, private_data
from fedtap.simulator.study import Study
from fedtap.simulator.wire import roll

Plan = Callable[[UserConfig], Sequence[Scenario | Study]]


def client_app(plan: Plan) -> ClientApp:
    """A ClientApp that plays `plan(run_config)`; the last partition is the compromised client."""
    app = ClientApp()

    app.query("partition")(roll.present)

    def part_of(message: Message, context: Context) -> Scenario | Study:
        config: ConfigRecord = message.content.config_records["config"]
        return plan(context.run_config)[int(config["part"])]  # type: ignore[arg-type]

    def private(message: Message, context: Context) -> PrivateData:
        scenario = part_of(message, context)
        assert isinstance(scenario, Scenario), f"{scenario.name} asks in messages of its own"
        clients = int(context.node_config["num-partitions"]) - 1
        return private_data(scenario, _data_root(context), clients)

    @app.train("posterior")
    @app.query("attention")
    def reply(message: Message, context: Context) -> Message:
        study = part_of(message, context)
        assert isinstance(study, Study), f"{study.name} trains, and asks for nothing else"
        with one_thread():
            return study.answer(message, int(context.node_config["partition-id"]), _data_root(context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if isinstance(part_of(message, context), Study):
            return reply(message, context)
        with one_thread():
            return honest.train_on_images(message, context, private(message, context))

    @app.query("auxiliary")
    def auxiliary(message: Message, context: Context) -> Message:
        data = private(message, context)
        if int(context.node_config["partition-id"]) != data.clients:
            raise PermissionError("an honest client takes no examples from the server")
        with one_thread():
            return compromised.compute_auxiliary(message, data)

    return app


def _data_root(context: Context) -> Path:
    return Path(str(context.run_config.get("data-root") or "data"))
