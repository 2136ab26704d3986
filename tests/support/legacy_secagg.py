"""SecAgg+ as Flower 1.41 has it, in its legacy API alone; nothing else of fedtap touches that API.

Bell, Bonawitz, Gascón, Lepoint and Raykova, CCS 2020. https://eprint.iacr.org/2020/704
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Context, RecordDict
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import Scalar, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import Grid

Arrays = list[np.ndarray]
Fit = Callable[[int, Arrays], tuple[Arrays, int]]
"""(partition, weights received) -> weights sent, and the number of examples behind them."""

CLIPPING, LEVELS = 1.0, 2**22
"""Weights are clipped to [-1, 1] and rounded at random to so many levels: by 4.8e-7 at most, each client's."""


def client_app(fit: Fit) -> ClientApp:
    """A legacy ClientApp behind SecAgg+'s mod."""

    class Client(NumPyClient):
        def __init__(self, partition: int) -> None:
            self.partition = partition

        def fit(self, parameters: Arrays, config: dict[str, Scalar]) -> tuple[Arrays, int, dict[str, Scalar]]:
            return (*fit(self.partition, parameters), {})

    def client_fn(context: Context):  # type: ignore[no-untyped-def]
        return Client(int(context.node_config["partition-id"])).to_client()

    return ClientApp(client_fn, mods=[secaggplus_mod])


def aggregated(grid: Grid, arrays: Arrays, clients: int, examples: int) -> Arrays:
    """The mean that the server unmasks after one round, weighted by examples; `arrays` again if the protocol halts.

    Args:
        examples: the largest number of them that a client may report. The protocol multiplies by its share of this
            before it rounds, so it should not be larger than need be.
    """
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters(arrays),
    )
    state = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    context = LegacyContext(state, ServerConfig(num_rounds=1), strategy)
    secure = SecAggPlusWorkflow(
        1.0, 0.6, max_weight=float(examples), clipping_range=CLIPPING, quantization_range=LEVELS
    )
    DefaultWorkflow(fit_workflow=secure)(grid, context)
    return context.state.array_records[MAIN_PARAMS_RECORD].to_numpy_ndarrays()
