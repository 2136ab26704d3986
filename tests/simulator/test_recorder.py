"""An ordinary Flower app, no line of which knows fedtap, is audited through the tap."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn import functional as F

import fedtap
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.simulator.leaks import GradientLeak, Leak, Protocol, load
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.recorder import recorder
from fedtap.simulator.wire.soundness import CAUSES, EXPLAINED, unexplained
from fedtap.simulator.wire.wiretap import Ear, Wiretap


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def test_an_unmodified_flower_app_leaks_its_gradients(tmp_path: Path) -> None:
    private = [(torch.rand(2, 3, 8, 8), torch.tensor([client, 2])) for client in range(2)]
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        images, labels = private[int(context.node_config["partition-id"])]
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
        metrics = MetricRecord({"num-examples": 2})
        return Message(RecordDict({"weights": ArrayRecord(model.state_dict()), "m": metrics}), reply_to=message)

    known = {"name": "mine:net", "shape": (3, 8, 8), "classes": 3, "batch": 2, "learning_rate": 0.05}
    tap = fedtap.tap(LocalGrid(app, 2), tmp_path, net(), **known)  # type: ignore[arg-type]
    FedAvg(fraction_evaluate=0.0).start(tap, ArrayRecord(net().state_dict()), num_rounds=2)

    assert filed(tmp_path) == {(rnd, node) for rnd in (1, 2) for node in (2, 3)}
    leak = recorded(tmp_path, client=3)
    model, (images, labels) = net(), private[1]
    loss = F.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, weight), true in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(leak.weights[name], weight.detach())  # type: ignore[index]
        torch.testing.assert_close(leak.gradient[name][0], true, rtol=1e-4, atol=2e-6)


def test_what_cannot_be_recorded_is_a_warning_and_the_app_goes_on(tmp_path: Path) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = ArrayRecord({"w": message.content["arrays"]["w"]})  # the counter stays at home
        return Message(RecordDict({"a": record, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    (tmp_path / "file").write_text("in the way")
    arrays = ArrayRecord({"w": Array(np.ones((2, 2), np.float32)), "counter": Array(np.zeros(1, np.int64))})
    protocol = Protocol("mine:net", (1, 1, 2), 2, batch=1)
    linear = nn.Linear(2, 2, bias=False)
    named = nn.ParameterDict({"w": linear.weight})
    for folder, network in ((tmp_path, net()), (tmp_path / "file", named)):  # another model; no place to write
        tap = Wiretap(LocalGrid(app, 2), recorder(folder, protocol, network))
        with pytest.warns(UserWarning, match="recorded nothing of client"):
            result = FedAvg(fraction_evaluate=0.0).start(tap, arrays, num_rounds=1)
        assert list(result.arrays) == ["w"]
    tap = Wiretap(LocalGrid(app, 2), recorder(tmp_path / "leaks", protocol, named))
    FedAvg(fraction_evaluate=0.0).start(tap, arrays, num_rounds=1)
    assert filed(tmp_path / "leaks", named) == {(1, 2), (1, 3)}


def step(batch: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state before and after a step of SGD at rate 0.05, and the gradient."""
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(batch) % 3
    F.cross_entropy(model(images), labels).backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    return before, dict(model.state_dict()), gradient  # type: ignore[return-value]


def told(
    ear: Ear, sent: ArrayRecord, back: ArrayRecord, node: int = 7, kind: str = "train", **metrics: float
) -> list[str]:
    """Tell the ear of one exchange: what it warns of."""
    order = Message(RecordDict({"arrays": sent}), node, kind)
    reply = Message(RecordDict({"arrays": back, "m": MetricRecord(metrics or {"num-examples": 1})}), reply_to=order)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ear(order, reply)
    return [str(one.message) for one in said]


def ear_of(folder: Path, **more: Any) -> Ear:
    return recorder(folder, Protocol("mine:net", (3, 8, 8), 3, batch=1, learning_rate=0.05), net(), **more)


def leaks_in(folder: Path, network: nn.Module | None = None) -> list[Leak]:
    """All leaks of a folder, one victim each."""
    stacks = [load(file, lambda *_: network or net(), "mine:net") for file in sorted(folder.glob("*.safetensors"))]
    return [stack[victim] for stack in stacks for victim in range(len(stack))]


def filed(folder: Path, network: nn.Module | None = None) -> set[tuple[int, int]]:
    """Round and client of each leak of a folder, of which there is one."""
    names = [(int(leak.rounds), int(leak.clients)) for leak in leaks_in(folder, network)]
    assert len(names) == len(set(names))
    return set(names)


def recorded(folder: Path, client: int = 7, rnd: int = 1) -> GradientLeak:
    (leak,) = (one for one in leaks_in(folder) if (int(one.rounds), int(one.clients)) == (rnd, client))
    assert isinstance(leak, GradientLeak)
    return leak


@pytest.mark.parametrize("way", ["names", "list", "parameters", "half", "double", "differences"])
def test_weights_are_read_however_they_are_sent(way: str, tmp_path: Path) -> None:
    before, after, gradient = step()
    sent, back = ArrayRecord(before), ArrayRecord(after)
    atol = 5e-6
    if way == "list":
        sent, back = (ArrayRecord([tensor.numpy() for tensor in state.values()]) for state in (before, after))
    elif way == "half":
        atol, half = (
            0.05,
            {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in after.items()},
        )
        back = ArrayRecord(half)
    elif way == "double":
        back = ArrayRecord({name: Array(tensor.double().numpy()) for name, tensor in after.items()})
    elif way == "differences":
        back = ArrayRecord({name: after[name] - before[name] for name in after})
    said = told(ear_of(tmp_path), sent, back)
    assert [sentence for sentence in said if "differences and not weights" not in sentence] == []
    assert bool(said) == (way == "differences")
    leak = recorded(tmp_path)
    for name, true in gradient.items():
        torch.testing.assert_close(leak.gradient[name][0], true, rtol=1e-3, atol=atol)
    assert leak.resolution == pytest.approx(6.5e-9 / 0.05 * (8192 if way == "half" else 1))


def test_a_partial_update_is_named_and_not_recorded(tmp_path: Path) -> None:
    before, after, _ = step()
    head = ArrayRecord({name: after[name] for name in after if name.startswith("4.")})
    (said,) = told(ear_of(tmp_path), ArrayRecord(before), head)
    assert "it sent 2 of the 6 tensors that it trains on (no 0.weight)" in said
    assert "--model" not in said
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("metrics", "key", "warned"),
    [
        ({"num-examples": 1}, "", False),
        ({"num_examples": 1}, "", False),
        ({"size": 1, "num-examples": 40}, "size", False),
        ({"loss": 0.5}, "", False),
        ({"num-examples": 32}, "", True),
        ({"num_examples": math.nan}, "", False),
    ],
)
def test_examples_are_found_and_held_against_the_protocol(
    metrics: dict[str, float], key: str, warned: bool, tmp_path: Path
) -> None:
    before, after, _ = step()
    said = told(ear_of(tmp_path, weighted_by_key=key), ArrayRecord(before), ArrayRecord(after), **metrics)
    assert [("examples and the protocol a batch of 1" in sentence) for sentence in said] == ([True] if warned else [])
    assert len(recorded(tmp_path)) == 1


def test_rounds_without_a_number_and_partitions_of_the_apps_own_overwrite_nothing(tmp_path: Path) -> None:
    before, after, _ = step()
    ear = ear_of(tmp_path)
    for node in (7, 8):
        for _ in range(3):
            assert told(ear, ArrayRecord(before), ArrayRecord(after), node, **{"num-examples": 1, "partition": 3}) == []
    assert filed(tmp_path) == {(rnd, node) for rnd in (1, 2, 3) for node in (7, 8)}
    order = Message(RecordDict({"arrays": ArrayRecord(before), "c": ConfigRecord({"server-round": 9})}), 7, "train")
    ear(order, Message(RecordDict({"arrays": ArrayRecord(after)}), reply_to=order))
    assert len(load(tmp_path / "round_9.safetensors", lambda *_: net(), "mine:net")) == 1


def test_replies_of_other_types_are_counted_and_named_once(tmp_path: Path) -> None:
    before, after, _ = step()
    ear = ear_of(tmp_path)
    rows = ArrayRecord({"patients": Array(np.zeros((120, 8), np.float32))})
    for kind, first in (("query.cohort", "array patients of 120x8"), ("evaluate", "accuracy")):
        (said,) = told(ear, rows, rows, kind=kind, accuracy=0.5)
        assert first in said
        assert repr(kind) in said
        assert told(ear, rows, rows, kind=kind, accuracy=0.5) == []
    told(ear, ArrayRecord(before), ArrayRecord(after))
    assert json.loads((tmp_path / "messages.json").read_text()) == {"query.cohort": 2, "evaluate": 2, "train": 1}


def test_a_quickstart_app_that_is_misread_is_told_so_before_and_after_the_attack(tmp_path: Path) -> None:
    """Forty normalised images in batches of eight, SGD with momentum; recorded as a step of plain SGD on one image."""
    draw = torch.Generator().manual_seed(0)
    app, model, shape = ClientApp(), "lenet(width=4)", (3, 8, 8)
    images, labels = torch.rand(40, *shape, generator=draw), torch.randint(3, (40,), generator=draw)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        network = build(model, shape, 3, seed=1)
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for pixels, truth in zip(images.split(8), labels.split(8), strict=True):
            optimiser.zero_grad()
            F.cross_entropy(network((pixels - 0.5) / 0.5), truth).backward()
            optimiser.step()
        content = {"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord({"num-examples": 40})}
        return Message(RecordDict(content), reply_to=message)

    protocol = Protocol(model, shape, 3, batch=1, learning_rate=0.1)
    tap = Wiretap(LocalGrid(app, 2), recorder(tmp_path / "leaks", protocol, build(model, shape, 3)))
    arrays = ArrayRecord(build(model, shape, 3, seed=1).state_dict())
    with pytest.warns(UserWarning, match="reports 40 examples and the protocol a batch of 1") as told:
        FedAvg(fraction_evaluate=0.0).start(tap, arrays, num_rounds=1)
    assert any("momentum" in str(one.message) for one in told)
    leak = load(next((tmp_path / "leaks").glob("*.safetensors")), build)
    found = IDLG(steps=50)(leak)
    left = unexplained(leak, found.images, found.labels)
    assert left is not None
    assert left[0] > EXPLAINED
    assert "range" in CAUSES
