"""A table of standardised columns and a yes or no: Adam on binary cross-entropy as a function, two epochs."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    draw = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    rows, ill = torch.randn(24, 12, generator=draw), torch.randint(2, (24,), generator=draw).float()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(2):
        for some in torch.randperm(24).split(8):
            adam.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(rows[some]).squeeze(1), ill[some]).backward()
            adam.step()
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
