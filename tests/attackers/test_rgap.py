"""R-GAP: its solves against dense pseudo-inverses, its start against autograd, what it can and cannot undo."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.gradients.rgap import RGAP, _logit_gradients, solve
from fedtap.attackers.parts.layers import Layer, chain
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, stack
from fedtap.simulator.models.registry import build
from tests.attackers.test_exact_git import Build, Leaky, drawn, leaked, psnr, sigmoid_net, tanh_mlp
from tests.support.attack_leaks import leak_of, pictures


def papers_net() -> nn.Module:
    """In the manner of the paper's CNN6: leaky ReLU, no biases."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 4, padding=2, stride=2, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(12, 36, 3, padding=1, stride=2, bias=False),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(36 * 9, 10, bias=False),
    )


def frozen_bias() -> nn.Module:
    network = sigmoid_net()
    network.get_parameter("5.bias").requires_grad_(False)
    return network


def one_place() -> nn.Module:
    """Its second convolution has one place, which does not see all of its input: the rest is open."""
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1, stride=2), nn.Sigmoid(), nn.Conv2d(2, 4, 3, stride=4), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip


def shuffled(leak: Leak) -> Leak:
    """Each tensor's entries in another order."""
    draw = torch.Generator().manual_seed(3)
    observed = {
        name: tensor.flatten(1)[:, torch.randperm(tensor[0].numel(), generator=draw)].reshape(tensor.shape)
        for name, tensor in leak.observed.items()
    }
    return dataclasses.replace(leak, observed=observed)


@pytest.mark.parametrize("make", [papers_net, sigmoid_net, frozen_bias, tanh_mlp, Leaky])
def test_the_image_comes_back_from_an_exact_gradient_and_the_true_weights_alone(make: Build) -> None:
    images, leak = leaked(make)
    guess = RGAP()(leak)
    assert psnr(guess.images, images) > 90
    assert float(guess.objective.max()) < 1e-10
    others = {name: tensor.detach() for name, tensor in drawn(make, seed=9).named_parameters()}
    conv = isinstance(next(drawn(make).children()), nn.Conv2d)
    for wrong in (shuffled(leak), *([dataclasses.replace(leak, weights=others)] if conv else [])):
        error = (RGAP()(wrong).images - images).square().mean()
        assert float(error) > 0.9 * float((images - images.mean()).square().mean())


def test_float32_leaves_the_papers_kind_of_network_sharp() -> None:
    images, labels = pictures(4, 1, size=8)
    torch.manual_seed(0)
    leak = leak_of(images, labels, papers_net(), "mine", meta=papers_net)
    guess = RGAP()(leak)
    assert torch.equal(guess.labels, labels)
    assert psnr(guess.images, images) > 60


def test_on_lenet_it_is_exact_gits_plain_least_squares() -> None:
    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=1234), "lenet")
    guess = RGAP()(leak).images
    assert psnr(guess, images) > 60
    torch.testing.assert_close(guess, ExactGIT(weighted=False)(leak).images, rtol=0, atol=1e-4)


def dense(layer: Layer, weight: Tensor, d: Tensor) -> Tensor:
    """Oracle: the paper's matrix of one victim, W over K(d), a column for each input, from its definition."""
    places, patch = layer.patches.shape
    filters = weight.shape[1]
    rows = torch.zeros(places * filters + filters * patch, layer.inputs + 1, dtype=torch.float64)
    for place in range(places):
        for entry in range(patch):
            column = int(layer.patches[place, entry])
            for f in range(filters):
                rows[place * filters + f, column] += weight[0, f, entry]
                rows[places * filters + f * patch + entry, column] += d[0, place, f]
    return rows[:, :-1]


@pytest.mark.parametrize(
    ("make", "which"), [(papers_net, 0), (papers_net, 2), (sigmoid_net, 2), (one_place, 0), (one_place, 2)]
)
def test_a_layer_is_solved_as_the_dense_pseudo_inverse_does(make: Build, which: int) -> None:
    """With right-hand sides that fit no input; `one_place` has fewer equations than inputs, and gets the shortest."""
    _, leak = leaked(make, victims=1)
    layer = next(layer for layer in chain(leak).layers if layer.weight == f"{which}.weight")
    weight, _ = layer.parameters(leak.weights or {}, 1, False)
    draw = torch.Generator().manual_seed(1)
    shapes = [(1, len(layer.patches), weight.shape[1])] * 2 + [tuple(weight.shape)]
    forward, d, gradient = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    matrix = dense(layer, weight, d)
    open_ = layer.inputs - int(torch.linalg.matrix_rank(matrix))
    assert (open_ > 0) == (make is one_place)
    expected = torch.linalg.pinv(matrix, rtol=1e-9) @ torch.cat([forward.flatten(), gradient.flatten()])
    torch.testing.assert_close(
        solve(layer, weight, forward, d, gradient)[0], expected, rtol=0, atol=1e-3 * open_ + 1e-6
    )


@pytest.mark.parametrize("make", [papers_net, frozen_bias])
def test_the_weights_gradient_alone_shows_the_slopes_of_the_logits(make: Build) -> None:
    """Oracle: softmax of the logits minus the label, from the network and the image."""
    images, labels = pictures(3, 1, size=8)
    network = drawn(make)
    leak = leak_of(images.double(), labels, network, "mine", meta=make)
    layer = chain(leak).layers[-1]
    weight, bias = layer.parameters(leak.weights or {}, 3, False)
    expected = network(images[:, 0].double()).softmax(1).detach() - F.one_hot(labels[:, 0], 10)
    torch.testing.assert_close(_logit_gradients(leak.observed[layer.weight], weight, bias, labels[:, 0]), expected)


def test_what_the_equations_leave_open_stays_finite() -> None:
    _, leak = leaked(one_place)
    assert RGAP()(leak).objective.isfinite().all()
    silent = {name: torch.zeros_like(tensor) for name, tensor in leak.observed.items()}
    assert RGAP()(dataclasses.replace(leak, observed=silent)).objective.isfinite().all()


def test_victims_with_weights_of_their_own_fare_as_they_do_alone() -> None:
    images, labels = pictures(2, 1, size=8)
    apart = [
        leak_of(images[[n]].double(), labels[[n]], drawn(papers_net, seed=n), "mine", meta=papers_net) for n in (0, 1)
    ]
    both = stack([apart[0], dataclasses.replace(apart[1], network=apart[0].network)])
    assert both.stacked
    guess = RGAP()(both)
    assert psnr(guess.images, images) > 90
    for victim, leak in enumerate(apart):
        torch.testing.assert_close(guess.images[victim], RGAP()(leak).images[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["mlp", "convnet", "resnet20", "vit"])
def test_fedtaps_other_models_are_refused(model: str) -> None:
    images, labels = pictures(1, 1)
    with pytest.raises(FedtapError, match=r"use a chain of|cannot trace"):
        RGAP()(leak_of(images, labels, build(model, (3, 16, 16), 10, seed=0), model))


def test_batches_updates_two_classes_and_huge_convolutions_are_refused() -> None:
    images, labels = pictures(1, 2)
    network = build("lenet", (3, 16, 16), 10, seed=0)
    with pytest.raises(FedtapError, match=r"rgap undoes the gradient of one image.*--batch 1"):
        RGAP()(leak_of(images, labels, network, "lenet"))
    with pytest.raises(FedtapError, match=r"rgap works on a GradientLeak"):
        RGAP()(leak_of(images, labels, network, "lenet", kind="update"))
    images, labels = pictures(1, 1, size=96)
    with pytest.raises(FedtapError, match=r"rgap solves for all inputs.*one with 27,648"):
        RGAP()(leak_of(images, labels, build("lenet", (3, 96, 96), 10, seed=0), "lenet"))

    def two() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False))

    images, labels = pictures(1, 1, size=8)
    leak = leak_of(images, labels * 0, two(), "mine", meta=two)
    with pytest.raises(FedtapError, match=r"has 2 classes and no bias"):
        RGAP()(dataclasses.replace(leak, protocol=dataclasses.replace(leak.protocol, classes=2)))


def test_a_huge_linear_layer_is_read_off() -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 8), nn.Tanh(), nn.Linear(8, 10))

    images, labels = pictures(1, 1, size=96)
    torch.manual_seed(0)
    leak = leak_of(images, labels, wide(), "mine", meta=wide)
    assert psnr(RGAP()(leak).images, images) > 60
    with pytest.raises(FedtapError, match=r"one with 27,648"):
        ExactGIT()(leak)
