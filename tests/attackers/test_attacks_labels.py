"""Label recovery: exact where it can be, counts that add up always."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.parts import labels as labels_module
from fedtap.attackers.parts.labels import last_linear, logit_gradients, mean_softmax, paired, recovered
from fedtap.simulator.defences.soteria import Soteria
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.registry import Shape, build, logits_layer
from tests.support.attack_leaks import conv_head, leak_of, pictures

NETWORK = build("lenet", (3, 16, 16), 10, seed=1234)


def share_right(found: torch.Tensor, true: torch.Tensor) -> float:
    pairs = zip(found.tolist(), true.tolist(), strict=True)
    return sum(sum((Counter(a) & Counter(b)).values()) for a, b in pairs) / true.numel()


@given(labels=st.lists(st.integers(0, 9), min_size=1, max_size=10), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_labels_are_sorted_classes_as_many_as_the_batch(labels: list[int], seed: int) -> None:
    images, _ = pictures(1, len(labels), seed=seed)
    truth = torch.tensor([labels])
    leak = leak_of(images, truth, NETWORK, "lenet")
    found = recovered(leak)
    assert found.shape == truth.shape
    assert torch.equal(found, found.sort(1).values)
    assert bool(((found >= 0) & (found <= 9)).all())
    if len(labels) == 1:
        assert torch.equal(found, truth)
    assert share_right(found, truth) >= 0.7


@pytest.mark.parametrize("model", ["mlp", "lenet", "convnet", "resnet20", "vit"])
@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_one_label_is_exact_with_and_without_the_weights(model: str, kind: str) -> None:
    images, labels = pictures(6, 1)
    leak = leak_of(images, labels, build(model, (3, 16, 16), 10, seed=3), model, kind=kind, learning_rate=0.001)
    assert torch.equal(recovered(leak), labels)
    assert torch.equal(recovered(dataclasses.replace(leak, weights=None, buffers={})), labels)


def test_batches_with_repeats() -> None:
    images, labels = pictures(12, 8)
    leak = leak_of(images, labels, NETWORK, "lenet")
    assert share_right(recovered(leak), labels) >= 0.95
    assert share_right(recovered(dataclasses.replace(leak, weights=None)), labels) >= 0.7


def test_a_batch_of_hundreds_is_read_off_an_untrained_network() -> None:
    images, labels = pictures(2, 512)
    labels[1] %= 3
    assert share_right(recovered(leak_of(images, labels, NETWORK, "lenet")), labels) >= 0.96


# Several local steps.


@pytest.mark.parametrize(
    ("victims", "batch", "steps", "learning_rate", "least"), [(12, 4, 2, 0.1, 0.85), (3, 16, 10, 0.05, 0.95)]
)
def test_local_steps_are_allowed_for(
    victims: int, batch: int, steps: int, learning_rate: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = pictures(victims, batch)
    leak = leak_of(images, labels, NETWORK, "lenet", kind="update", steps=steps, learning_rate=learning_rate)
    allowed = share_right(recovered(leak), labels)
    assert allowed >= least
    others = {name: weight.detach() for name, weight in build("lenet", (3, 16, 16), 10, seed=9).named_parameters()}
    assert share_right(recovered(dataclasses.replace(leak, weights=others)), labels) < 0.5
    if steps > 2:  # along a straight line from the broadcast weights to the client's
        monkeypatch.setattr(labels_module, "SETTLE", 0)
        assert share_right(recovered(leak), labels) < allowed - 0.1


@pytest.mark.parametrize("how", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.01}])
def test_stand_ins_that_are_the_images_give_the_outputs_of_the_clients_own_training(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one class, so that the shares are each image's own label."""
    images, labels = pictures(1, 6)
    labels[:] = 3
    client = build("lenet", (3, 16, 16), 10, seed=1234)
    sgd = torch.optim.SGD(client.parameters(), 0.05, **how)
    outputs, biases = [], []
    for _ in range(4):
        sgd.zero_grad()
        logits = client(images[0])
        nn.functional.cross_entropy(logits, labels[0]).backward()
        outputs.append(logits.detach().softmax(1).mean(0))
        biases.append(client.get_parameter("fc.bias").grad.clone())  # type: ignore[union-attr]
        sgd.step()
    leak = leak_of(images, labels, NETWORK, "lenet", kind="update", steps=4)
    leak = dataclasses.replace(
        leak,
        observed={name: (after.detach() - leak.weights[name])[None] for name, after in client.named_parameters()},  # type: ignore[index]
        protocol=dataclasses.replace(leak.protocol, **how),
    )
    monkeypatch.setattr(labels_module, "_stand_ins", lambda leak: images[0])
    # what a step's gradient adds to the update, by hand: g of step s lives on as m^(t - s) in the steps t after it
    momentum, decay = how.get("momentum", 0.0), how.get("weight_decay", 0.0)
    weights = []
    for step in range(4):
        here, velocity = 0.0, 0.0
        for now in range(4):
            slope = float(now == step) + decay * here
            velocity = momentum * velocity + slope
            here -= 0.05 * (slope + momentum * velocity if how.get("nesterov") else velocity)
        weights.append(here)
    shares = torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(logit_gradients(leak)[0], shares @ torch.stack(biases), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mean_softmax(leak)[0], shares @ torch.stack(outputs), rtol=1e-3, atol=1e-5)
    assert torch.equal(recovered(leak), labels)


@given(
    owed=st.lists(st.lists(st.floats(-1, 2), min_size=3, max_size=3), min_size=1, max_size=4), batch=st.integers(1, 40)
)
@settings(max_examples=50, deadline=None)
def test_counts_are_whole_and_sum_to_the_batch(owed: list[list[float]], batch: int) -> None:
    shares = torch.tensor(owed, dtype=torch.float64)
    counts = labels_module._counts(shares, batch)
    assert bool((counts >= 0).all())
    assert counts.sum(1).tolist() == [batch] * len(owed)
    assert torch.equal(labels_module._counts(counts / batch + 0.4 / batch / len(owed[0]), batch), counts)
    proper = shares.clamp_min(0) + 1e-3
    proper = proper / proper.sum(1, keepdim=True)
    assert bool(((labels_module._counts(proper, batch) - batch * proper).abs() < 1).all())
    single = labels_module._counts(shares[:, :1], batch)
    assert bool(((single >= 0) & (single <= batch)).all())


def test_a_last_layer_without_bias_still_tells() -> None:
    def unbiased() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.Tanh(), nn.Linear(32, 10, bias=False))

    torch.manual_seed(0)
    network = unbiased()
    images, labels = pictures(20, 1)
    assert torch.equal(recovered(leak_of(images, labels, network, "own", meta=unbiased)), labels)
    images, labels = pictures(10, 4)
    assert share_right(recovered(leak_of(images, labels, network, "own", meta=unbiased)), labels) >= 0.7


def test_a_network_that_does_not_end_in_a_linear_layer_is_refused() -> None:
    images, labels = pictures(1, 1)
    with pytest.raises(FedtapError, match=r"no nn\.Linear of it yields its 10 logits"):
        last_linear(leak_of(images, labels, conv_head(), "own", meta=conv_head))


class Decoy(nn.Module):
    """A head that is registered first, and another one that nothing uses."""

    def __init__(self, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.head, self.hidden, self.unused = nn.Linear(12, 10), nn.Linear(3 * 16 * 16, 12), nn.Linear(12, 10)
        self.tail = tail or nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tail(self.head(torch.sigmoid(self.hidden(images.flatten(1)))))  # type: ignore[no-any-return]


def test_a_head_that_nothing_uses_tells_nothing() -> None:
    torch.manual_seed(0)
    network = Decoy()
    images, labels = pictures(16, 1)
    leak = leak_of(images, labels, network, "own", meta=Decoy)
    assert last_linear(leak) == ("head", leak.network.get_submodule("head"))
    assert torch.equal(recovered(leak), labels)
    assert torch.equal(IDLG(steps=1)(leak[:2]).labels, labels[:2])
    drawn = torch.Generator()
    network.zero_grad()
    Soteria(0.5).backward(network, images[0], labels[0], drawn)
    assert int((network.head.weight.grad == 0).all(0).sum()) == 6
    assert network.unused.weight.grad is None
    assert int((Soteria(0.5).stacked(network, images, labels, [drawn])["head.weight"] == 0).all(1).sum()) == 16 * 6


class ByHand(nn.Module):
    """Linear layers that their own forward never runs: one weight is tied to another layer, one layer is a function."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        if tied:
            self.second.weight = self.first.weight
        self.tied = tied

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(rows)) if self.tied else rows
        return nn.functional.linear(hidden, self.second.weight, self.second.bias)


@pytest.mark.parametrize(
    ("network", "shape", "name"),
    [
        (Decoy(nn.LogSoftmax(1)), (3, 16, 16), "head"),
        (Decoy(nn.Sequential(nn.Dropout(0.5), nn.Unflatten(1, (10, 1)), nn.Flatten())), (3, 16, 16), "head"),
        (Decoy(nn.Softmax(1)), (3, 16, 16), None),
        (Decoy(nn.ReLU()), (3, 16, 16), None),
        (Decoy(nn.BatchNorm1d(10)), (3, 16, 16), None),
        (Decoy(nn.Linear(10, 10, bias=False)), (3, 16, 16), "tail"),
        (Decoy(nn.utils.parametrizations.spectral_norm(nn.Linear(10, 10))), (3, 16, 16), "tail"),
        (
            nn.Sequential(nn.Linear(10, 10), nn.Unflatten(1, (1, 10)), nn.AdaptiveAvgPool2d((1, 10)), nn.Flatten()),
            (10,),
            "0",
        ),
        (nn.Linear(10, 4), (10,), ""),
        (ByHand(tied=False), (10,), "second"),
        (ByHand(tied=True), (10,), None),
        (conv_head(), (3, 16, 16), None),
    ],
)
def test_the_layer_of_the_logits_is_found_by_what_it_does(network: nn.Module, shape: Shape, name: str | None) -> None:
    before = torch.random.get_rng_state()
    assert logits_layer(network, shape) == logits_layer(network, shape) == name
    assert logits_layer(copy.deepcopy(network).to("meta"), shape) == name or "tied" in vars(network)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "name"), [("mlp", "5"), ("lenet", "fc"), ("convnet", "10"), ("lenet+precode(4)", "fc.1")]
)
def test_own_models_logits_come_from_their_last_layer(model: str, name: str) -> None:
    assert logits_layer(build(model, (3, 16, 16), 10), (3, 16, 16)) == name


def test_a_network_that_cannot_be_run_is_named_before_its_labels_are_sought() -> None:
    with pytest.raises(FedtapError, match="cannot be run on one input"):
        logits_layer(nn.Linear(3, 2).to("meta"), (4,))


def right(leak: Leak, labels: torch.Tensor) -> int:
    return round(share_right(recovered(leak), labels) * labels.numel())


@pytest.mark.parametrize("batch", [1, 4])
def test_under_noise_the_weights_rows_tell_labels_beside_the_bias(batch: int) -> None:
    images, labels = pictures(96 // batch, batch)
    clear = leak_of(images, labels, NETWORK, "lenet")
    draw = torch.Generator().manual_seed(0)
    noisy = {name: tensor + 0.2 * torch.randn(tensor.shape, generator=draw) for name, tensor in clear.observed.items()}
    unaware = dataclasses.replace(clear, observed=noisy)
    told = dataclasses.replace(unaware, protocol=dataclasses.replace(clear.protocol, defence="noise(0.2)"))
    assert right(told, labels) > right(unaware, labels)
    slopes = logit_gradients(clear)
    assert (logit_gradients(told) - slopes).norm() < (logit_gradients(unaware) - slopes).norm()
    silent = dataclasses.replace(told, observed={name: torch.zeros_like(tensor) for name, tensor in noisy.items()})
    assert bool(logit_gradients(silent).isfinite().all())


def test_a_last_layer_that_is_frozen_is_refused_and_half_of_one_tells() -> None:
    images, labels = pictures(12, 1)
    for frozen in (["fc.weight"], ["fc.bias"], ["fc.weight", "fc.bias"]):
        network = build("lenet", (3, 16, 16), 10, seed=1234)
        for name in frozen:
            network.get_parameter(name).requires_grad_(False)
        leak = leak_of(images, labels, network, "lenet")
        if len(frozen) == 1:
            assert torch.equal(recovered(leak), labels)
        else:
            with pytest.raises(FedtapError, match="logits, fc, is trained"):
                last_linear(leak)


@pytest.mark.parametrize("batch", [2, 4, 6])
def test_images_are_put_into_the_order_of_the_labels(batch: int) -> None:
    images, labels = pictures(3, batch)
    labels = torch.arange(batch).expand(3, -1)
    leak = leak_of(images, labels, NETWORK, "lenet")
    assert torch.equal(recovered(leak), labels)
    shuffled = images[:, torch.randperm(batch, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(paired(leak, shuffled), images)
    assert torch.equal(paired(leak[2], shuffled[2:]), images[2:])
    assert torch.equal(paired(dataclasses.replace(leak, weights=None, buffers={}), shuffled), shuffled)
    mute = leak_of(images, labels, conv_head(), "own", meta=conv_head)
    assert torch.equal(paired(mute, shuffled), shuffled)
