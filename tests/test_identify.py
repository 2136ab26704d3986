"""Weights from practice pairs: told to rounding where the gradients are, refused where nothing could be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from attackers.exact_git import ExactGIT
from attackers.parts.identify import identify
from simulator.errors import FedtapError
from simulator.leaks import GradientLeak, Protocol
from simulator.models import Normalise, build

Build = Callable[[], nn.Module]


def conv_net() -> nn.Module:
    """LeNet in small: the second layer's stride leaves part of what it is fed open."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 3, padding=1, stride=2),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(6 * 9, 10),
    )


def tanh_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(108, 30), nn.Tanh(), nn.Linear(30, 20, bias=False), nn.Tanh(), nn.Linear(20, 10)
    )


def leaky_net() -> nn.Module:
    return nn.Sequential(
        Normalise(), nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(6 * 9, 10)
    )


def softmax_regression() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 10))


def drawn(make: Build) -> nn.Module:
    torch.manual_seed(0)
    network = make().double()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return network


def practised(
    network: nn.Module, meta: nn.Module, pairs: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[GradientLeak, Tensor, Tensor]:
    """Pairs of noise images and their gradients, as the compromised client answers them."""
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(pairs, 1, 3, size, size, generator=draw, dtype=torch.float64)
    labels = torch.randint(10, (pairs, 1), generator=draw)
    weights = {name: tensor.detach().to(dtype) for name, tensor in network.named_parameters()}

    def loss(weights: dict[str, Tensor], some: Tensor, named: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, weights, (some,)), named)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=64)(weights, images.to(dtype), labels)
    leak = GradientLeak(
        observed=gradients,
        protocol=Protocol("mine", (3, size, size), 10, batch=1, listener="eavesdropper"),
        network=meta.to("meta"),
        weights=None,
        buffers={},
        clients=torch.arange(pairs),
        rounds=torch.ones(pairs, dtype=torch.long),
        restarts=torch.zeros(pairs, dtype=torch.long),
    )
    return leak, images, labels


def worst(found: dict[str, Tensor], network: nn.Module) -> float:
    """Largest relative error of a parameter, a row common to all classes aside."""
    last = list(found)[-2:]
    errors = []
    for name, tensor in network.named_parameters():
        truth, guess = tensor.detach().double(), found[name].double()
        if name in last:
            truth, guess = truth - truth.mean(0), guess - guess.mean(0)
        errors.append(float((guess - truth).norm() / truth.norm()))
    return max(errors)


@pytest.mark.parametrize(
    ("make", "pairs"), [(conv_net, 200), (tanh_mlp, 300), (leaky_net, 200), (softmax_regression, 300)]
)
def test_exact_gradients_show_the_weights_to_rounding(make: Build, pairs: int) -> None:
    network = drawn(make)
    found = identify(*practised(network, make(), pairs, size=6 if make is not conv_net else 12))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in network.named_parameters()
    }
    print(worst(found, network))
    assert worst(found, network) < 1e-5


def test_float32_gradients_of_lenet_show_weights_that_bring_the_image_back() -> None:
    network = build("lenet", (3, 16, 16), 10, seed=1234)
    meta = build("lenet", (3, 16, 16), 10)
    leak, images, _ = practised(network, meta, 300, 16, torch.float32)
    pairs = leak[:290]
    found = identify(cast(GradientLeak, pairs), images[:290], _[:290])
    print(worst(found, network))
    assert worst(found, network) < 1e-3
    victims = dataclasses.replace(leak[290:], weights={name: tensor.float() for name, tensor in found.items()})
    guess = ExactGIT()(victims).images
    p=-10*(guess - images[290:]).square().flatten(1).mean(1).log10()
    print(p)
