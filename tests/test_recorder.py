"""An ordinary Flower app, no line of which knows fedtap, is audited through the tap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn import functional as F

from simulator.leaks import GradientLeak, Protocol, load
from simulator.local import LocalGrid
from simulator.recorder import recorder
from simulator.wiretap import Wiretap


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

    protocol = Protocol("mine:net", (3, 8, 8), 3, batch=2, learning_rate=0.05)
    grid = LocalGrid(app, 2)
    tap = Wiretap(grid, recorder(tmp_path, protocol, net()))
    FedAvg(fraction_evaluate=0.0).start(tap, ArrayRecord(net().state_dict()), num_rounds=2)

    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.stem for file in files] == [f"round_{rnd}-client_{node}" for rnd in (1, 2) for node in (2, 3)]
    leak = load(files[1], lambda *_: net(), "mine:net")
    assert isinstance(leak, GradientLeak)
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
    assert len(list((tmp_path / "leaks").glob("*.safetensors"))) == 2
