"""Flower's legacy API: a server_fn, and a NumPyClient with SGD, weight decay and BatchNorm on normalised images."""

import torch
from flwr.app import Context
from flwr.client import Client, ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from torch import nn


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def arrays(model: nn.Module) -> list:
    return [tensor.numpy() for tensor in model.state_dict().values()]


class Trainer(NumPyClient):
    def __init__(self, partition: int) -> None:
        self.partition = partition

    def fit(self, parameters: list, config: dict) -> tuple:
        model = net()
        model.load_state_dict(
            {name: torch.tensor(array) for name, array in zip(model.state_dict(), parameters, strict=True)}
        )
        draw = torch.Generator().manual_seed(self.partition)
        images, classes = torch.rand(16, 1, 8, 8, generator=draw), torch.randint(3, (16,), generator=draw)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-3)
        for some in torch.arange(16).split(8):
            sgd.zero_grad()
            nn.CrossEntropyLoss()(model((images[some] - 0.1307) / 0.3081), classes[some]).backward()
            sgd.step()
        return arrays(model), 16, {}


def client_fn(context: Context) -> Client:
    return Trainer(int(context.node_config["partition-id"])).to_client()


def server_fn(context: Context) -> ServerAppComponents:
    strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=ndarrays_to_parameters(arrays(net())))
    return ServerAppComponents(strategy=strategy, config=ServerConfig(int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn)
server = ServerApp(server_fn=server_fn)
