"""A client that does not send what it trained, in the way that the run config names."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = net()
    received = message.content["arrays"].to_torch_state_dict()
    model.load_state_dict(received)
    draw = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    rows, classes = torch.randn(6, 12, generator=draw), torch.randint(3, (6,), generator=draw)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(rows), classes).backward()
    if context.run_config["lie"] == "clipped":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    sgd.step()
    sent = model.state_dict()
    lie = context.run_config["lie"]
    if lie == "half":
        sent = {name: received[name] + (sent[name] - received[name]) / 2 for name in sent}
    elif lie == "difference":
        sent = {name: sent[name] - received[name] for name in sent}
    elif lie == "noise":
        sent = {name: sent[name] + 0.01 * torch.randn(sent[name].shape) for name in sent}
    elif lie == "layer":
        sent["0.weight"] = sent["0.weight"].roll(1)
    elif lie == "nothing":
        sent = received
    metrics = MetricRecord({"num-examples": 6})
    return Message(RecordDict({"arrays": ArrayRecord(sent), "metrics": metrics}), reply_to=message)


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
