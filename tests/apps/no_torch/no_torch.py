"""Softmax regression in numpy, as in scikit-learn: a list of a matrix and a vector travels, and no torch is used."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    weight, bias = message.content["arrays"].to_numpy_ndarrays()
    drawn = np.random.default_rng(int(context.node_config["partition-id"]))
    rows, classes = drawn.normal(size=(20, 8)), drawn.integers(3, size=20)
    for _ in range(5):
        scores = np.exp(rows @ weight.T + bias)
        wrong = scores / scores.sum(1, keepdims=True) - np.eye(3)[classes]
        weight, bias = weight - 0.1 * wrong.T @ rows / 20, bias - 0.1 * wrong.mean(0)
    metrics = MetricRecord({"num-examples": 20})
    return Message(RecordDict({"arrays": ArrayRecord([weight, bias]), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros((3, 8)), np.zeros(3)]),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
