"""What a federation in this process costs beside a bare loop: rounds, auxiliary pairs, defences."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch.nn import functional as F

from fedtap.clients.app import client_app
from fedtap.clients.cost import exchange
from fedtap.clients.honest import LANES, train_at_once, train_on_images
from fedtap.scenarios.bench.ratios import Ratio, in_turns
from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.federation.private_data import PrivateData, private_data
from fedtap.simulator.federation.rounds import Heard, auxiliary, play
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.grid import LocalGrid

CLIENTS, STEPS, BATCH, _ROUNDS, _PAIRS = 20, 10, 32, 5, 2048


def federation_ratios() -> Iterator[Ratio]:
    """A round of the federation, practice and each defence, over bare loops that do the same."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scenario = _scenario(Path(folder) / "noise.npz")
        private = private_data(scenario, Path("data"), CLIENTS - 1)
    yield in_turns(
        f"{_ROUNDS + 1} rounds of {CLIENTS} LeNet clients, {STEPS} steps of {BATCH}: in the federation / a bare loop",
        lambda: _federation(scenario, private),
        lambda: _bare(private),
        group="federation",
        is_cost=True,
    )
    yield in_turns(
        f"{_PAIRS} pairs of LeNet: a loop of autograd.grad / through the federation",
        lambda: _one_by_one(private),
        lambda: _auxiliary(scenario, private),
        group="federation",
    )
    alone = dataclasses.replace(scenario, local_steps=1, batch=1, clients=LANES)
    orders, held = _orders(alone), PrivateData(alone, private.dataset, LANES)
    yield in_turns(
        f"a plain step of {len(orders)} LeNet clients, messages included: one by one / as lanes of one gradient",
        lambda: [train_on_images(message, context, held) for message, context in orders],
        lambda: train_at_once(orders, held),
        group="federation",
    )
    yield from _defences(private)


_DEFENCES = (
    "clip(1.0)",
    "noise(0.01)",
    "laplace(0.01)",
    "prune(0.9)",
    "sign()",
    "quantise(4)",
    "local_dp(1.0, 2.0, 8.0, 1e-5)",
    "clip(1.0)+noise(0.01)",
    "soteria(0.4)",
    "dp_sgd(1.0, 1.0)",
    "precode(256)",
)

SOTERIA_BATCH = 4
"""In the place of 32: each feature of each image costs Soteria a backward pass, and that takes minutes."""


def _defences(private: PrivateData) -> Iterator[Ratio]:
    """A client's step, from weights to weights, with each defence and without."""
    shape, classes = private.dataset.shape, len(private.dataset.classes)
    for batch in (1, 32):
        images, labels = private.dataset.train.batch(slice(batch))
        for defence in _DEFENCES:
            few = SOTERIA_BATCH if "soteria" in defence and batch > 1 else batch
            model = ImageScenario(defence=defence).architecture
            done, bare = (
                exchange(*which, shape, classes, images[:few], labels[:few])
                for which in ((model, defence), ("lenet", "none"))
            )
            yield in_turns(
                f"a step of LeNet, batch {few}: {defence} / none", done, bare, group="defences", is_cost=True
            )


def _scenario(path: Path) -> ImageScenario:
    """Training on images of noise: what is timed does not depend on what is seen."""
    noise = np.random.default_rng(0)
    images, held = 1.5 * CLIENTS * STEPS * BATCH, BATCH
    np.savez(
        path,
        x_train=noise.integers(0, 256, (int(images), 32, 32, 3), np.uint8),
        y_train=noise.integers(0, 10, int(images), np.uint8),
        x_test=noise.integers(0, 256, (held, 32, 32, 3), np.uint8),
        y_test=np.arange(held, dtype=np.uint8) % 10,
    )
    return ImageScenario(
        attack="",
        name="bench",
        dataset=str(path),
        rounds=_ROUNDS,
        victims=1,
        clients=CLIENTS - 1,
        local_steps=STEPS,
        batch=BATCH,
    )


def _federation(scenario: ImageScenario, private: PrivateData) -> None:
    play(scenario, LocalGrid(client_app(lambda config: (scenario,)), CLIENTS), private)


def _orders(scenario: ImageScenario) -> list[tuple[Message, Context]]:
    """A round's messages to all honest clients."""
    grid = LocalGrid(client_app(lambda config: (scenario,)), LANES + 1)
    net = build("lenet", (3, 32, 32), 10, seed=1234)
    arrays = ArrayRecord({name: weight.detach() for name, weight in net.named_parameters()})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1, "part": 0})})
    return [(Message(content, node, "train"), grid.context(node)) for node in list(grid.get_node_ids())[:-1]]


def _auxiliary(scenario: ImageScenario, private: PrivateData) -> None:
    """Pairs fed to the compromised client and heard, after the round in which it shows itself."""
    grid = LocalGrid(client_app(lambda config: (scenario,)), CLIENTS)
    net = build("lenet", private.dataset.shape, len(private.dataset.classes), seed=1234)
    arrays = ArrayRecord({name: weight.detach() for name, weight in net.named_parameters()})
    heard = Heard(arrays=arrays, nodes={private.clients: list(grid.get_node_ids())[private.clients]})
    images, labels = private.dataset.train.batch(slice(_PAIRS))
    assert sum(map(len, auxiliary(grid, scenario, private, heard, images[:, None], labels[:, None]))) == _PAIRS


def _one_by_one(private: PrivateData) -> None:
    """The same gradients with nothing around them."""
    net = build("lenet", private.dataset.shape, len(private.dataset.classes), seed=1234)
    weights = list(net.parameters())
    images, labels = private.dataset.train.batch(slice(_PAIRS))
    found = [
        torch.autograd.grad(F.cross_entropy(net(x[None]), y[None]), weights)
        for x, y in zip(images, labels, strict=True)
    ]
    assert len([torch.stack(each) for each in zip(*found, strict=True)]) == len(weights)


def _bare(private: PrivateData) -> None:
    """The same training and averaging with nothing around it."""
    net = build("lenet", private.dataset.shape, len(private.dataset.classes), seed=1234)
    shared = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    for rnd in range(1, _ROUNDS + 2):
        total = {name: torch.zeros_like(weight) for name, weight in shared.items()}
        for client in range(CLIENTS):
            images, labels = private(client, rnd)
            net.load_state_dict(shared)
            optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
            for step in range(STEPS):
                at = step * BATCH % len(images)
                optimiser.zero_grad()
                F.cross_entropy(net(images[at : at + BATCH]), labels[at : at + BATCH]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            for name, weight in net.named_parameters():
                total[name] += weight.detach() / CLIENTS
        shared = total
