"""Weights from auxiliary pairs: told to rounding where the gradients are, refused where nothing could be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.wrappers.identify import identify
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Protocol
from fedtap.simulator.models.registry import Normalise

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


def auxiliary_at(
    network: nn.Module, meta: nn.Module, pairs: int, size: int, dtype: torch.dtype = torch.float64, classes: int = 10
) -> tuple[GradientLeak, Tensor, Tensor]:
    """Pairs of noise images and their gradients, as the compromised client answers them."""
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(pairs, 1, 3, size, size, generator=draw, dtype=torch.float64)
    labels = torch.randint(classes, (pairs, 1), generator=draw)
    weights = {name: tensor.detach().to(dtype) for name, tensor in network.named_parameters()}

    def loss(weights: dict[str, Tensor], some: Tensor, named: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, weights, (some,)), named)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=64)(weights, images.to(dtype), labels)
    leak = GradientLeak(
        observed=gradients,
        protocol=Protocol("mine", (3, size, size), classes, batch=1, threat_model="eavesdropper"),
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
    found = identify(*auxiliary_at(network, make(), pairs, 12 if make is conv_net else 6))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in network.named_parameters()
    }
    assert worst(found, network) < 1e-7


def test_of_two_classes_the_label_itself_shows_the_logits() -> None:
    def two() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.Sigmoid(), nn.Linear(20, 2))

    network = drawn(two)
    assert worst(identify(*auxiliary_at(network, two(), 200, 6, classes=2)), network) < 1e-7


def test_float32_gradients_show_weights_as_good_as_the_true_ones() -> None:
    network = drawn(conv_net)
    leak, images, labels = auxiliary_at(network.float(), conv_net(), 202, 12, torch.float32)
    found = identify(leak[:200], images[:200], labels[:200])
    assert worst(found, network) < 3e-4  # rounding, which differs from one kind of CPU to the next
    true = {name: tensor.detach() for name, tensor in network.named_parameters()}
    told = {name: tensor.float() for name, tensor in found.items()}
    seen, best = (ExactGIT()(dataclasses.replace(leak[200:], weights=weights)).images for weights in (told, true))
    assert float((seen - best).abs().max()) < 0.01


def test_the_row_common_to_all_classes_is_left_out() -> None:
    network = drawn(leaky_net)
    found = identify(*auxiliary_at(network, leaky_net(), 200, 6))
    assert float(found["4.weight"].mean(0).abs().max()) < 1e-12
    assert abs(float(found["4.bias"].mean())) < 1e-12


def test_the_weights_themselves_are_not_read() -> None:
    network = drawn(leaky_net)
    leak, images, labels = auxiliary_at(network, leaky_net(), 200, 6)
    wrong = {name: torch.zeros_like(tensor) for name, tensor in network.named_parameters()}
    found, blind = (identify(each, images, labels) for each in (dataclasses.replace(leak, weights=wrong), leak))
    for name, tensor in blind.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_rounding_on_the_wire_is_weighed() -> None:
    network = drawn(leaky_net)
    leak, images, labels = auxiliary_at(network, leaky_net(), 400, 6)
    draw = torch.Generator().manual_seed(2)
    observed = {
        name: tensor + 1e-5 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
        for name, tensor in leak.observed.items()
    }
    assert (
        worst(identify(dataclasses.replace(leak, observed=observed, resolution=1e-5), images, labels), network) < 0.03
    )


@pytest.mark.parametrize("make", [conv_net, tanh_mlp, leaky_net, softmax_regression])
def test_anothers_images_are_refused(make: Build) -> None:
    leak, images, labels = auxiliary_at(drawn(make), make(), 300, 12 if make is conv_net else 6)
    with pytest.raises(FedtapError, match=r"No weights explain the auxiliary pairs"):
        identify(leak, images.flip(0), labels)


def test_anothers_labels_are_refused() -> None:
    leak, images, labels = auxiliary_at(drawn(leaky_net), leaky_net(), 200, 6)
    with pytest.raises(FedtapError, match=r"Auxiliary pair \d+ has another label than its gradient shows"):
        identify(leak, images, labels.flip(0))


def test_too_few_pairs_are_counted() -> None:
    leak, images, labels = auxiliary_at(drawn(leaky_net), leaky_net(), 54, 6)
    with pytest.raises(FedtapError, match=r"need at least 55 auxiliary pairs.*there are 54"):
        identify(leak, images, labels)
    leak, images, labels = auxiliary_at(drawn(leaky_net), leaky_net(), 60, 6)
    faint = dataclasses.replace(leak, resolution=0.01)
    with pytest.raises(FedtapError, match=r"Of 60 auxiliary pairs \d+ show how the logits of classes .* needs 55"):
        identify(faint, images, labels)


def relu_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 10))


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.Tanh(), nn.Linear(20, 10, bias=False))


def narrow() -> nn.Module:
    """The third convolution has too few filters to show what it is fed."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 8, 3, padding=1), nn.Sigmoid(),
        nn.Conv2d(8, 1, 3, padding=1, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(9, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (relu_net, r"step relu after 1 cannot be undone"),
        (without_bias, r"gradient of the last layer's bias.*has none there"),
        (narrow, r"gradient of 4.weight leaves \d+% of that layer's input open"),
    ],
)
def test_networks_that_cannot_be_told_are_named(make: Build, said: str) -> None:
    leak, images, labels = auxiliary_at(drawn(make), make(), 300, 6)
    with pytest.raises(FedtapError, match=said):
        identify(leak, images, labels)


def test_batches_are_refused() -> None:
    leak, images, labels = auxiliary_at(drawn(leaky_net), leaky_net(), 60, 6)
    batches = dataclasses.replace(leak, protocol=dataclasses.replace(leak.protocol, batch=4))
    with pytest.raises(FedtapError, match=r"one image a pair.*means over 4.*--batch 1"):
        identify(batches, images, labels)


def test_a_pair_is_an_image_and_a_gradient() -> None:
    leak, images, labels = auxiliary_at(drawn(leaky_net), leaky_net(), 60, 6)
    with pytest.raises(FedtapError, match=r"59 auxiliary images and 60 gradients"):
        identify(leak, images[:59], labels[:59])
