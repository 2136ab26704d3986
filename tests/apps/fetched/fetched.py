"""CIFAR-10 by flwr_datasets, normalised as it is loaded, and eight steps of SGD with momentum on batches of two."""

import torch
from datasets import load_dataset
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import DirichletPartitioner
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

normalised = Compose([ToTensor(), Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10))


def transform(batch: dict) -> dict:
    batch["img"] = [normalised(image) for image in batch["img"]]
    return batch


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    partitioner = DirichletPartitioner(num_partitions=2, partition_by="label", alpha=0.5)
    fetched = FederatedDataset(dataset="uoft-cs/cifar10", partitioners={"train": partitioner})
    parts = fetched.load_partition(int(context.node_config["partition-id"])).train_test_split(test_size=0.2, seed=42)
    loader = DataLoader(parts.with_transform(transform)["train"], batch_size=2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for batch in loader:
        sgd.zero_grad()
        nn.functional.cross_entropy(model(batch["img"]), batch["label"]).backward()
        sgd.step()
    metrics = MetricRecord({"num-examples": len(parts["train"])})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    test = load_dataset("uoft-cs/cifar10", split="test").with_format("torch")
    assert test[0]["img"].shape == (3, 8, 8)
    FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=ArrayRecord(net().state_dict()), num_rounds=1)
