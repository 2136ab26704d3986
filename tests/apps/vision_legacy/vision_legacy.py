"""torchvision's CIFAR-10, downloaded and cut by random_split, then a fifth of each part held out; the legacy API."""

from collections import OrderedDict

import flwr as fl
import torch
import torch.nn.functional as F
import torchvision
from flwr.client import ClientApp
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision import transforms
from torchvision.datasets import CIFAR10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc = nn.Linear(16 * 5 * 5, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return self.fc(x.view(-1, 16 * 5 * 5))


def load_datasets(partition: int, clients: int) -> tuple:
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    trainset = CIFAR10("./dataset", train=True, download=True, transform=transform)
    testset = torchvision.datasets.CIFAR10("./dataset", train=False, download=True, transform=transform)
    lengths = [len(trainset) // clients] * clients
    mine = random_split(trainset, lengths, torch.Generator().manual_seed(42))[partition]
    held_out = len(mine) // 5
    training, validation = random_split(mine, [len(mine) - held_out, held_out], torch.Generator().manual_seed(42))
    return DataLoader(training, batch_size=4, shuffle=True), DataLoader(validation), DataLoader(testset, batch_size=4)


class FlowerClient(fl.client.NumPyClient):
    def __init__(self, net: nn.Module, trainloader: DataLoader) -> None:
        self.net, self.trainloader = net, trainloader

    def get_parameters(self, config: dict) -> list:
        return [value.cpu().numpy() for value in self.net.state_dict().values()]

    def fit(self, parameters: list, config: dict) -> tuple:
        pairs = zip(self.net.state_dict().keys(), parameters, strict=True)
        self.net.load_state_dict(OrderedDict({key: torch.Tensor(value) for key, value in pairs}), strict=True)
        criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.001, momentum=0.9)
        self.net.train()
        for images, labels in self.trainloader:
            optimizer.zero_grad()
            criterion(self.net(images), labels).backward()
            optimizer.step()
        return self.get_parameters({}), len(self.trainloader), {}


def client_fn(context: Context) -> fl.client.Client:
    partition, clients = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    return FlowerClient(Net(), load_datasets(partition, clients)[0]).to_client()


def server_fn(context: Context) -> ServerAppComponents:
    start = ndarrays_to_parameters(FlowerClient(Net(), DataLoader([])).get_parameters({}))
    strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=start)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn)
server = ServerApp(server_fn=server_fn)
