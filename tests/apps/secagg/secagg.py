"""SecAgg+, which Flower has in its legacy API."""

import numpy as np
from flwr.app import Context
from flwr.client import Client, ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid


class Trainer(NumPyClient):
    def fit(self, parameters: list, config: dict) -> tuple:
        return [array + 0.01 for array in parameters], 4, {}


def client_fn(context: Context) -> Client:
    return Trainer().to_client()


client = ClientApp(client_fn, mods=[secaggplus_mod])
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(
        fraction_evaluate=0.0, min_available_clients=3, initial_parameters=ndarrays_to_parameters([np.zeros((4, 3))])
    )
    legacy = LegacyContext(context, ServerConfig(int(context.run_config["num-server-rounds"])), strategy)
    DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(3, 2, max_weight=4.0))(grid, legacy)
