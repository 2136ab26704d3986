"""The ClientApp of every node: it looks up what is played and who it is, and answers accordingly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, UserConfig
from flwr.clientapp import ClientApp

from clients import compromised, honest
from clients.training import one_thread
from simulator.scenario import PrivateData, Scenario, private_data

Plan = Callable[[UserConfig], tuple[Scenario, ...]]


def client_app(plan: Plan) -> ClientApp:
    """A ClientApp that plays `plan(run_config)`; the last partition is the compromised client."""
    app = ClientApp()

    def private(order: Message, context: Context) -> PrivateData:
        config: ConfigRecord = order.content.config_records["config"]
        scenario = plan(context.run_config)[int(config["part"])]  # type: ignore[arg-type]
        clients = int(context.node_config["num-partitions"]) - 1
        return private_data(scenario, Path(str(context.run_config.get("data-root") or "data")), clients)

    @app.train()
    def train(order: Message, context: Context) -> Message:
        with one_thread():
            return honest.train(order, context, private(order, context))

    @app.query("practice")
    def practice(order: Message, context: Context) -> Message:
        data = private(order, context)
        if int(context.node_config["partition-id"]) != data.clients:
            raise PermissionError("an honest client takes no examples from the server")
        with one_thread():
            return compromised.practise(order, data)

    return app
