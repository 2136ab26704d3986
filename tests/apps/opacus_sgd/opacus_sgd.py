"""DP-SGD with Opacus on normalised images."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    torch.manual_seed(int(context.node_config["partition-id"]))  # else a Poisson batch is empty now and then
    draw = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    images, classes = 2 * torch.rand(24, 1, 8, 8, generator=draw) - 1, torch.randint(4, (24,), generator=draw)
    private, sgd, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(images, classes), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    private.train()
    for some, labels in loader:
        sgd.zero_grad()
        nn.functional.cross_entropy(private(some), labels).backward()
        sgd.step()
    metrics = MetricRecord({"num-examples": 24})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord(net().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
