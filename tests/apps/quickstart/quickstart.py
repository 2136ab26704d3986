"""Images in [-1, 1], a small CNN, SGD with momentum over one epoch: three steps of 32 images."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(6 * 6 * 6, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.conv(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def data(partition: int, examples: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(partition)
    coarse = torch.rand(examples, 3, 4, 4, generator=draw)
    images = nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
    return TensorDataset((images - 0.5) / 0.5, torch.randint(10, (examples,), generator=draw))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    config = context.run_config
    private = data(int(context.node_config["partition-id"]), int(config["examples"]))
    loader = DataLoader(private, batch_size=int(config["batch-size"]), shuffle=True)
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(net.parameters(), lr=message.content["config"]["lr"], momentum=0.9)
    net.train()
    for images, labels in loader:
        sgd.zero_grad()
        loss = criterion(net(images), labels)
        loss.backward()
        sgd.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(private)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = data(int(context.node_config["partition-id"]), 16).tensors
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net(images), labels)
    metrics = MetricRecord({"eval_loss": loss.item(), "num-examples": 16})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(min_available_nodes=2)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
