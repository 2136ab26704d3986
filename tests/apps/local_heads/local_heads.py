"""A body that is shared and a head that stays in the state of each client; dropout between them."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 24)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.body(x))))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = Net()
    model.body.load_state_dict(message.content["arrays"].to_torch_state_dict())
    if "head" in context.state:
        model.head.load_state_dict(context.state["head"].to_torch_state_dict())
    draw = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    rows, classes = torch.randn(20, 16, generator=draw), torch.randint(4, (20,), generator=draw)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for some in torch.arange(20).split(10):
        sgd.zero_grad()
        nn.CrossEntropyLoss()(model(rows[some]), classes[some]).backward()
        sgd.step()
    context.state["head"] = ArrayRecord(model.head.state_dict())
    metrics = MetricRecord({"num-examples": 20})
    return Message(RecordDict({"arrays": ArrayRecord(model.body.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().body.state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
