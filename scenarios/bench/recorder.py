"""What recording every leak costs: `python -m fedtap.scenarios.bench.recorder --clients 1000 --rounds 10`.

Clients of a tiny model (64-32-10 sigmoid units, 2,410 parameters) take one step of SGD on one image, in this process.
Each round is played without the tap and with it, in turns, so that both see the same machine.
"""

from __future__ import annotations

import logging
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn import functional as F

import fedtap
from fedtap.simulator.leaks import load
from fedtap.simulator.wire.grid import LocalGrid

_SHAPE, _LEARNING_RATE = (1, 8, 8), 0.1


def main(
    clients: Annotated[int, typer.Option(min=2)] = 1000,
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    out: Annotated[Path | None, typer.Option(help="Where the leaks stay; nowhere unless said.")] = None,
) -> None:
    """Print files, disk over the leaks' bytes, time over no tap, and peak memory after the first and the last round."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        _measure(clients, rounds, out or Path(folder))


def _measure(clients: int, rounds: int, folder: Path) -> None:
    grid = LocalGrid(_app(clients), clients)
    tap = fedtap.tap(grid, folder, _net(), name="mine:net", shape=_SHAPE, classes=10, learning_rate=_LEARNING_RATE)
    _play(FedAvg(fraction_evaluate=0.0), LocalGrid(_app(2), 2), 1, _initial())  # torch's own first step takes seconds
    strategies = [FedAvg(fraction_evaluate=0.0) for _ in range(2)]
    states = [_initial(), _initial()]
    wall: tuple[list[float], list[float]] = ([], [])
    processor: tuple[list[float], list[float]] = ([], [])
    peaks: list[float] = []
    for rnd in range(1, rounds + 1):
        for which in (0, 1) if rnd % 2 else (1, 0):
            began = time.perf_counter(), time.process_time()
            states[which] = _play(strategies[which], (grid, tap)[which], rnd, states[which])
            wall[which].append(time.perf_counter() - began[0])
            processor[which].append(time.process_time() - began[1])
        peaks.append(_peak())
    leaks = sum(parameter.numel() for parameter in _net().parameters()) * 4 * clients * rounds
    files = [path for path in folder.rglob("*") if path.is_file()]
    taken, long = sum(512 * path.stat().st_blocks for path in files), sum(path.stat().st_size for path in files)
    found = sum(len(load(path, lambda *_: _net(), "mine:net")) for path in folder.glob("*.safetensors"))
    print(f"{clients:,} clients x {rounds} rounds: {found:,} of {clients * rounds:,} leaks recorded, 1 thread")
    print(f"  files: {len(files)}")
    print(f"  disk / bytes of the leaks: {taken / leaks:.3f} taken, {long / leaks:.3f} by the files' lengths")
    for what, times in (("processor time", processor), ("time", wall)):
        of_rounds = statistics.median(with_tap / bare for bare, with_tap in zip(*times, strict=True))
        ratio = sum(times[1]) / sum(times[0])
        print(f"  with the tap / without: {ratio:.3f} times the {what}, median of the rounds {of_rounds:.3f}")
    print(f"  peak memory: {peaks[0]:.0f} MB after the first round, {peaks[-1]:.0f} MB after the last")


def _play(strategy: FedAvg, grid: Grid, rnd: int, arrays: ArrayRecord) -> ArrayRecord:
    """One round: the arrays after it."""
    replies = grid.send_and_receive(strategy.configure_train(rnd, arrays, ConfigRecord(), grid))
    after, _ = strategy.aggregate_train(rnd, replies)
    assert after is not None
    return after


def _net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))


def _initial() -> ArrayRecord:
    torch.manual_seed(0)
    return ArrayRecord(_net().state_dict())


def _app(clients: int) -> ClientApp:
    images = torch.rand(clients, 1, *_SHAPE, generator=torch.Generator().manual_seed(0))
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        model = _net()
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimiser = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)
        F.cross_entropy(model(images[client]), torch.tensor([client % 10])).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    return app


def _peak() -> float:
    """Most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    typer.run(main)
