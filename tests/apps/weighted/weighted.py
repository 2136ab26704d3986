"""One full-batch step of SGD on normalised images; weights travel as a list, weighed by the number of patients."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 5))


def arrays(model: nn.Module) -> ArrayRecord:
    return ArrayRecord([tensor.numpy() for tensor in model.state_dict().values()])


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = net()
    sent = message.content["arrays"].to_numpy_ndarrays()
    model.load_state_dict({name: torch.tensor(array) for name, array in zip(model.state_dict(), sent, strict=True)})
    draw = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    coarse = torch.rand(4, 1, 4, 4, generator=draw)
    scans = nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
    classes = torch.randint(5, (4,), generator=draw)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model((scans - 0.5) / 0.5), classes).backward()
    sgd.step()
    content = RecordDict({"arrays": arrays(model), "metrics": MetricRecord({"patients": 4})})
    return Message(content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"patients": 1})}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    FedAvg(weighted_by_key="patients").start(
        grid=grid,
        initial_arrays=arrays(net()),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
