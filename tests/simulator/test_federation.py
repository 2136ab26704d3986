"""The federation: what is heard is what was computed; failing clients stop no round; practice is heard too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedMedian
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fedtap.clients.app import client_app
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import PrivateData, private_data
from fedtap.simulator.federation.rounds import Heard, accuracy, auxiliary, clients_on, play
from fedtap.simulator.leaks import GradientLeak, UpdateLeak, float_buffers, load, stack
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import tensors_of
from tests.support.scenes import Scene

BASE = Scene(attack="", name="test", victims=3, size=16)


def federation(scenario: Scene, app: ClientApp | None = None, clients: int = 3) -> tuple[LocalGrid, PrivateData]:
    def planned(config: UserConfig) -> tuple[Scene, ...]:
        return (scenario,)

    return LocalGrid(app or client_app(planned), clients + 1), private_data(scenario, Path("data"), clients)


def gradient(scenario: Scene, images: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    net = build(scenario.model, (3, 16, 16), classes, seed=scenario.weights_seed)
    loss = F.cross_entropy(net(images), labels)
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


@pytest.mark.parametrize("model", ["mlp", "lenet", "convnet", "resnet20", "vit"])
def test_the_server_hears_each_clients_gradient(model: str) -> None:
    scenario = dataclasses.replace(BASE, model=model, batch=2)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    leak = stack([heard.leaks[name] for name in private.names()])
    leak.check()
    assert isinstance(leak, GradientLeak)
    for victim, name in enumerate(private.names()):
        for key, true in gradient(scenario, *private(*name), len(private.dataset.classes)).items():
            # one float32 weight near w is known to w * 2^-24, the difference of two to twice that, over the rate
            torch.testing.assert_close(leak.gradient[key][victim], true, rtol=1e-4, atol=2e-6, msg=key)


def test_several_local_steps_leak_their_update() -> None:
    scenario = dataclasses.replace(BASE, model="convnet", batch=2, local_steps=3)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    leak = heard.leaks[1, 1]
    assert isinstance(leak, UpdateLeak)
    net = build("convnet", (3, 16, 16), len(private.dataset.classes), seed=scenario.weights_seed)
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    images, labels = private(1, 1)
    optimiser = torch.optim.SGD(net.parameters(), lr=scenario.learning_rate)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimiser.step()
    for name, weight in net.named_parameters():
        torch.testing.assert_close(leak.update[name][0], weight.detach() - before[name], rtol=1e-4, atol=1e-6)


def test_victims_beyond_the_clients_answer_in_later_rounds_at_other_weights() -> None:
    scenario = dataclasses.replace(BASE, victims=5, clients=3, rounds=1)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    assert private.names() == [(0, 2), (1, 2), (2, 2), (0, 3), (1, 3)]
    leak = stack([heard.leaks[name] for name in private.names()])
    assert leak.stacked
    weights = leak.weights["fc.weight"]  # type: ignore[index]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert heard.accuracy is not None
    assert 0 <= heard.accuracy <= 1


def test_training_makes_the_model_better() -> None:
    scenario = dataclasses.replace(BASE, model="mlp", rounds=8, local_steps=10, batch=16, victims=1, clients=3)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    assert heard.accuracy is not None
    assert heard.accuracy > 2 / len(private.dataset.classes)
    net = build(scenario.model, private.dataset.shape, len(private.dataset.classes))
    assert heard.accuracy == accuracy(net.to_empty(device="cpu"), heard.arrays, private.dataset.target)


def test_private_data_is_a_pure_function_and_each_client_keeps_to_its_share() -> None:
    scenario = dataclasses.replace(BASE, rounds=2, local_steps=2, batch=4, alpha=0.5)
    _, private = federation(scenario)
    again = PrivateData(scenario, private.dataset, 3)
    for client in range(4):
        for rnd in (1, 2, 3):
            for one, other in zip(private(client, rnd), again(client, rnd), strict=True):
                assert torch.equal(one, other)
    shares = [set(share.tolist()) for share in private.shares]
    assert sum(map(len, shares)) == len(set.union(*shares)) == len(private.dataset.train)
    assert not torch.equal(private(0, 1)[0], private(0, 2)[0])


@pytest.mark.parametrize("strategy", [FedAdam, FedMedian])
def test_any_strategy_runs_over_the_tap(strategy: type[FedAdam] | type[FedMedian]) -> None:
    scenario = dataclasses.replace(BASE, rounds=1)
    grid, private = federation(scenario)
    heard = play(
        scenario, grid, private, strategy=strategy(fraction_evaluate=0.0, min_train_nodes=4, min_available_nodes=4)
    )
    assert set(heard.leaks) == set(private.names())


def misbehaving(how: str, scenario: Scene) -> ClientApp:
    """An app whose client 1 misbehaves."""
    app, sound = ClientApp(), client_app(lambda config: (scenario,))

    @app.train()
    def train(order: Message, context: Context) -> Message:
        answer = sound(order, context)
        if context.node_config["partition-id"] != 1:
            return answer
        if how == "raises":
            raise RuntimeError("out of battery")
        arrays, metrics = answer.content.array_records["arrays"], answer.content.metric_records["metrics"]
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        if how == "nan":
            arrays["fc.bias"] = Array(arrays["fc.bias"].numpy() * float("nan"))
        elif how == "misshapen":
            arrays["fc.bias"] = Array(arrays["fc.bias"].numpy()[:-1].copy())
        elif how == "missing":
            del arrays["fc.bias"]
        elif how == "text":
            arrays["fc.bias"] = Array("float32", (3,), "numpy.ndarray", b"nonsense")
        elif how == "two records":
            content["more"] = ArrayRecord({"x": torch.zeros(1)})
        elif how == "no count":
            content["metrics"] = MetricRecord({"partition": 1})
        elif how == "nothing":
            return None  # type: ignore[return-value]
        elif how == "one array too many":
            arrays["more"] = Array(arrays["fc.bias"].numpy())
        elif how == "another record":
            content = RecordDict({"weights": arrays, "metrics": metrics})
        elif how == "one metric too many":
            metrics["mood"] = 1.0
        elif how == "a list":
            metrics["num-examples"] = [1, 2]
        elif how == "no bytes":
            arrays["fc.bias"] = Array("float32", (3,), "numpy.ndarray", b"")
        elif how == "half a zip":
            arrays["fc.bias"] = Array("float32", (3,), "numpy.ndarray", b"PK\x03\x04 and no more")
        elif how == "a huge partition":
            metrics["partition"] = 2**62
        elif how == "huge":
            arrays["fc.bias"] = Array(np.full_like(arrays["fc.bias"].numpy(), 1e38))
        elif how == "huge in float64":
            arrays["fc.bias"] = Array(np.full(arrays["fc.bias"].shape, 1e200))
        elif how == "another's name":
            metrics["partition"] = 0
        return Message(content, reply_to=order)

    return app


MISCHIEF = (
    "raises",
    "nothing",
    "nan",
    "huge",
    "huge in float64",
    "misshapen",
    "missing",
    "text",
    "no bytes",
    "half a zip",
    "one array too many",
    "two records",
    "another record",
    "no count",
    "one metric too many",
    "a list",
    "a huge partition",
    "another's name",
)


@pytest.mark.parametrize("how", MISCHIEF)
def test_a_failing_client_is_named_and_the_round_goes_on(how: str) -> None:
    scenario = dataclasses.replace(BASE, victims=6, clients=3)  # two rounds: the second starts from the first's average
    grid, private = federation(scenario, misbehaving(how, scenario))
    heard = play(scenario, grid, private)
    assert {name for name in private.names() if name not in heard.leaks} == {(1, 1), (1, 2)}
    assert "client" in heard.why_missing(1, 1)
    assert ("battery" in heard.why_missing(1, 1)) == (how == "raises")
    own, _ = federation(scenario)
    alone = play(scenario, own, private)
    for name, leak in heard.leaks.items():
        leak.check()
        if name[1] == 1:  # nobody else's round is touched
            for key, tensor in leak.observed.items():  # which is computed for all clients together where none fails
                torch.testing.assert_close(tensor, alone.leaks[name].observed[key], rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("how", MISCHIEF)
def test_a_client_that_fails_while_nobody_is_attacked_is_left_out_of_the_average(how: str) -> None:
    scenario = dataclasses.replace(BASE, rounds=1, victims=3, clients=3)
    grid, private = federation(scenario, misbehaving(how, scenario))
    heard = play(scenario, grid, private)
    assert "client" in heard.failures[1, 1]
    assert {(0, 2), (2, 2)} == heard.leaks.keys()
    assert all(bool((weights.abs() < 10).all()) for weights in tensors_of(heard.arrays).values())


def test_the_compromised_client_answers_what_it_is_fed() -> None:
    scenario = dataclasses.replace(BASE, model="convnet")
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    images, labels = private.dataset.auxiliary.batch(torch.arange(10))
    (pairs,) = auxiliary(grid, scenario, private, heard, images.view(5, 2, 3, 16, 16), labels.view(5, 2))
    pairs.leak.check()
    assert len(pairs) == 5
    assert torch.equal(pairs.images.flatten(0, 1), images)
    true = gradient(scenario, images[2:4], labels[2:4], len(private.dataset.classes))
    for name in true:
        torch.testing.assert_close(pairs.leak.gradient[name][1], true[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["lenet", "resnet20"])
def test_a_server_makes_the_same_pairs_itself(model: str) -> None:
    scenario = dataclasses.replace(BASE, model=model)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    images, labels = private.dataset.auxiliary.batch(torch.arange(4))
    (fed,) = auxiliary(grid, scenario, private, heard, images[:, None], labels[:, None])
    own = dataclasses.replace(scenario, auxiliary_source="server")
    (made,) = auxiliary(grid, own, private, dataclasses.replace(heard, nodes={}), images[:, None], labels[:, None])
    for name in fed.leak.observed:
        assert torch.equal(fed.leak.observed[name], made.leak.observed[name])


def test_an_honest_client_takes_no_examples() -> None:
    grid, private = federation(BASE)
    heard = play(BASE, grid, private)
    heard.nodes[private.clients] = heard.nodes[0]
    images, labels = private.dataset.auxiliary.batch(torch.arange(2))
    with pytest.raises(FedtapError, match="honest client takes no examples"):
        list(auxiliary(grid, BASE, private, heard, images[:, None], labels[:, None]))
    with pytest.raises(FedtapError, match="play one first"):
        list(auxiliary(grid, BASE, private, Heard(), images[:, None], labels[:, None]))


def test_the_eavesdropper_does_not_know_the_weights() -> None:
    scenario = dataclasses.replace(BASE, threat_model="eavesdropper", model="resnet20")
    grid, private = federation(scenario)
    leak = play(scenario, grid, private).leaks[0, 1]
    assert leak.weights is None
    assert not leak.buffers
    assert leak.protocol.threat_model == "eavesdropper"


def test_a_saved_leak_holds_no_private_pixel(tmp_path: Path) -> None:
    scenario = dataclasses.replace(BASE, model="resnet20")
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    stack([heard.leaks[name] for name in private.names()]).save(tmp_path / "leak.safetensors")
    leak = load(tmp_path / "leak.safetensors", build)
    expected = set(dict(leak.network.named_parameters()))
    assert set(leak.observed) == set(leak.weights or {}) == expected
    assert set(leak.buffers) == set(float_buffers(leak.network))
    stored = (tmp_path / "leak.safetensors").read_bytes()
    for name in private.names():
        for image in private(*name)[0]:
            for form in (image, (image * 255).round().byte(), image.permute(1, 2, 0).contiguous()):
                row = form.reshape(-1)[:24].contiguous().numpy().tobytes()
                assert row not in stored
    assert '"label' not in (tmp_path / "leak.json").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"victims": 2000}, "target data of photos holds"),
        ({"batch": 200, "victims": 1, "rounds": 1}, "larger than the smallest client's data"),
        ({"alpha": 0.5}, "add --rounds"),
        ({"threat_model": "neighbour"}, "no threat_model named"),
        ({"defence": "noise(0.1)", "auxiliary_source": "server"}, "without the clients' defence"),
        ({"threat_model": "eavesdropper", "auxiliary_source": "server"}, "the eavesdropper does not"),
    ],
)
def test_what_cannot_be_played_is_refused(change: dict[str, object], said: str) -> None:
    scenario = dataclasses.replace(BASE, **change)  # type: ignore[arg-type]
    with pytest.raises(FedtapError, match=said):
        play(scenario, *federation(scenario))


def test_a_federation_of_another_size_is_refused() -> None:
    grid, _ = federation(BASE)
    assert clients_on(grid, BASE) == 3
    with pytest.raises(FedtapError, match="has 4 nodes, and test needs 8"):
        clients_on(grid, dataclasses.replace(BASE, clients=7))


def test_the_federation_may_begin_with_weights_from_a_file(tmp_path: Path) -> None:
    network = build("resnet20", (3, 16, 16), 8, seed=77)
    kept = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    save_file(kept, tmp_path / "own.safetensors")
    scenario = dataclasses.replace(BASE, model="resnet20", weights=str(tmp_path / "own.safetensors"))
    grid, private = federation(scenario)
    leak = play(scenario, grid, private).leaks[0, 1]
    for name, parameter in network.named_parameters():
        assert torch.equal((leak.weights or {})[name], parameter)
    for change, said in (
        ({"model": "mlp"}, "another model's weights"),
        ({"weights": str(tmp_path / "none.safetensors")}, "is no file"),
    ):
        other = dataclasses.replace(scenario, **change)
        with pytest.raises(FedtapError, match=said):
            play(other, *federation(other))
