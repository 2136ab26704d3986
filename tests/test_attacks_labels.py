"""Label recovery: exact where it can be, counts that add up always."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attackers.parts import labels as labels_module
from attackers.parts.labels import last_linear, paired, recovered
from simulator.errors import FedtapError
from simulator.models import build
from tests.attack_leaks import conv_head, leak_of, pictures

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


@pytest.mark.parametrize(("batch", "steps", "learning_rate"), [(8, 3, 0.01), (8, 5, 0.05), (4, 5, 0.1)])
def test_local_steps_are_allowed_for(
    batch: int, steps: int, learning_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = pictures(24, batch)
    leak = leak_of(images, labels, NETWORK, "lenet", kind="update", steps=steps, learning_rate=learning_rate)
    allowed = share_right(recovered(leak), labels)
    assert allowed >= 0.85
    monkeypatch.setattr(labels_module, "SETTLE", 0)
    if learning_rate > 0.01:
        assert share_right(recovered(leak), labels) < allowed - 0.1


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
    with pytest.raises(FedtapError, match=r"no nn\.Linear with 10 outputs"):
        last_linear(leak_of(images, labels, conv_head(), "own", meta=conv_head))


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
            with pytest.raises(FedtapError, match="fc is frozen"):
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
