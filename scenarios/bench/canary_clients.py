"""What do canary clients show of ε, and what do they cost? `python -m fedtap.scenarios.bench.canary_clients`.

Each client has 200 examples of ten overlapping clusters in 256 dimensions and trains a small network on them, under
Flower's DifferentialPrivacyServerSideFixedClipping, with noise for several ε of all rounds and without noise. Each
federation is played three times: without canaries, with them, and as a control with canaries that no message reaches,
for which the bound has to be 0. Time is the processor's; what canaries cost is their replies and what the strategy does
with these.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
import time
from collections.abc import Iterable
from typing import Annotated, Any

import torch
import typer
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from torch import Tensor, nn
from torch.nn import functional as F

import fedtap
from fedtap.simulator.defences.accountant import noise_for
from fedtap.simulator.wire.around import GridAround
from fedtap.simulator.wire.canary_clients import CanaryTap
from fedtap.simulator.wire.grid import LocalGrid

_SHAPE, _DELTA, _LEARNING_RATE = (256,), 1e-5, 0.05

_EXAMPLES, _TESTED, _APART = 200, 20_000, 3.5
"""Examples of each client and of the test, and the length of the clusters' means in deviations of an example."""


class WithoutCanaries(GridAround):
    """A tap whose canaries are hidden from the strategy, and so have no part in the model."""

    def __init__(self, tap: Grid, nodes: Iterable[int]) -> None:
        super().__init__(tap)
        self._nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        """The clients alone."""
        return self._nodes

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As the tap does."""
        return list(self._grid.send_and_receive(messages, timeout=timeout))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the tap does."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the tap does."""
        return self._grid.pull_messages(message_ids)


def main(
    clients: Annotated[int, typer.Option(min=2)] = 100,
    canaries: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    epochs: Annotated[int, typer.Option(min=1, help="Local epochs of a client in a round.")] = 10,
    clip: Annotated[float, typer.Option(help="L2 norm to which updates are clipped.")] = 1.0,
    epsilons: Annotated[str, typer.Option(help="ε of all rounds, with commas; inf is no noise.")] = "inf,50,8",
) -> None:
    """Print the bound, the accuracy and the time for each ε."""
    torch.set_num_threads(1)
    for name in ("flwr", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    (examples, labels), test = _data(_EXAMPLES * clients, 1), _data(_TESTED, 2)
    for epsilon in map(float, epsilons.split(",")):
        for how in ("none", "canaries", "control"):
            random.seed(0)
            torch.manual_seed(0)
            grid = LocalGrid(_app(examples, labels, clients, epochs), clients)
            with tempfile.TemporaryDirectory() as folder:
                known: dict[str, Any] = {"name": "mine:net", "shape": _SHAPE, "classes": 10, "rounds": [rounds + 1]}
                tap: CanaryTap | None = None
                if how != "none":
                    tap = fedtap.tap(grid, folder, _net(), canaries=canaries, clip=clip, **known)
                given: Grid = tap or fedtap.tap(grid, folder, _net(), **known)
                if tap and how == "control":
                    given = WithoutCanaries(tap, grid.get_node_ids())
                _play(given, clients, rounds, epsilon, clip, test, tap)


def _play(
    grid: Grid,
    clients: int,
    rounds: int,
    epsilon: float,
    clip: float,
    test: tuple[Tensor, Tensor],
    tap: CanaryTap | None,
) -> None:
    """One federation, and a line on it."""
    nodes = len(list(grid.get_node_ids()))
    multiplier = 0.0 if math.isinf(epsilon) else noise_for(epsilon, _DELTA, math.sqrt(rounds))
    strategy = DifferentialPrivacyServerSideFixedClipping(FedAvg(fraction_evaluate=0.0), multiplier, clip, nodes)
    aggregated = [0.0]

    def timed(rnd: int, replies: Iterable[Message], aggregate: Any = strategy.aggregate_train) -> Any:
        began = time.process_time()
        found = aggregate(rnd, replies)
        aggregated[0] += time.process_time() - began
        return found

    strategy.aggregate_train = timed  # type: ignore[method-assign, assignment]
    began = time.process_time()
    result = strategy.start(grid, ArrayRecord(_net().state_dict()), num_rounds=rounds)
    taken = time.process_time() - began
    net = _net()
    net.load_state_dict(result.arrays.to_torch_state_dict())
    with torch.no_grad():
        accuracy = float((net(test[0]).argmax(1) == test[1]).float().mean())
    line = f"ε = {epsilon:g}, {nodes} nodes: accuracy {accuracy:.2%}; of {taken / rounds:.3f} s a round "
    line += f"{aggregated[0] / rounds:.4f} s are the strategy's"
    if tap:
        added = (tap.seconds + aggregated[0] * (1 - clients / nodes)) / taken
        line += f" and {tap.seconds / rounds:.4f} s the canaries', who cost {added:.2%}; "
        line += str(tap.bound(result.arrays, _DELTA))
    print(line, flush=True)


def _data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Examples and labels."""
    means = torch.randn(10, *_SHAPE, generator=torch.Generator().manual_seed(0))
    means *= _APART / means.norm(dim=1, keepdim=True)
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draw)
    return means[labels] + torch.randn(count, *_SHAPE, generator=draw), labels


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


def _app(examples: Tensor, labels: Tensor, clients: int, epochs: int) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        mine, theirs = examples[client::clients], labels[client::clients]
        model = _net()
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimiser = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)
        for _ in range(epochs):
            for start in range(0, len(mine), 10):
                optimiser.zero_grad()
                loss = F.cross_entropy(model(mine[start : start + 10]), theirs[start : start + 10])
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        metrics = MetricRecord({"num-examples": len(mine), "train_loss": loss.item()})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


if __name__ == "__main__":
    typer.run(main)
