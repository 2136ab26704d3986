"""Exact-GIT: its equations against autograd, its accuracy, what it can and cannot undo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.attackers.gradients.exact_git import Equations, ExactGIT
from fedtap.attackers.parts.layers import SIGMOID, TANH, Activation, chain, leaky
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, stack
from fedtap.simulator.models.registry import Normalise, build
from tests.support.attack_leaks import leak_of, pictures

Build = Callable[[], nn.Module]


def sigmoid_net() -> nn.Module:
    """Odd sizes, strides, dilation and paddings."""
    return nn.Sequential(
        nn.Conv2d(3, 8, (5, 3), padding=(2, 1), stride=(2, 1)),
        nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, dilation=2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8 * 2 * 6, 10),
    )


def tanh_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 40), nn.Tanh(), nn.Linear(40, 30, bias=False), nn.Tanh(), nn.Linear(30, 10)
    )


class Leaky(nn.Module):
    """Written in functions, over normalised pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise, self.sigmoid = Normalise(), nn.Conv2d(3, 12, 3, padding=1, stride=2)
        self.fc = nn.Linear(12 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.sigmoid(self.normalise(images)), 0.2)
        return self.fc(torch.flatten(hidden, start_dim=1))  # type: ignore[no-any-return]


def drawn(make: Build, seed: int = 0) -> nn.Module:
    """The network in float64 with weights large enough to bend the activations."""
    torch.manual_seed(seed)
    network = make().double()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.4, 0.4)
    return network


def leaked(make: Build, victims: int = 2, seed: int = 0) -> tuple[Tensor, Leak]:
    images, labels = pictures(victims, 1, size=8, seed=seed)
    return images, leak_of(images.double(), labels, drawn(make), "mine", meta=make)


def announcing(leak: Leak, sigma: float) -> Leak:
    return dataclasses.replace(leak, protocol=dataclasses.replace(leak.protocol, defence=f"noise({sigma})"))


def noisy(leak: Leak, sigma: float) -> Leak:
    draw = torch.Generator().manual_seed(5)
    observed = {
        name: tensor + sigma * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
        for name, tensor in leak.observed.items()
    }
    return dataclasses.replace(leak, observed=observed)


def psnr(guess: Tensor, truth: Tensor) -> float:
    """The worst victim's, in dB."""
    return float(-10 * (guess.double() - truth.double()).square().flatten(1).mean(1).max().log10())


@pytest.mark.parametrize("make", [sigmoid_net, tanh_mlp, Leaky])
def test_the_image_comes_back_from_an_exact_gradient(make: Build) -> None:
    images, leak = leaked(make)
    guess = ExactGIT()(leak)
    assert psnr(guess.images, images) > 90
    assert float(guess.objective.max()) < 1e-10


def test_float32_and_fedavgs_rounding_leave_lenets_image_sharp() -> None:
    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=1234), "lenet")
    assert psnr(ExactGIT()(leak).images, images) > 60
    rounded = dataclasses.replace(noisy(leak, 6.5e-8), resolution=6.5e-8)
    assert psnr(ExactGIT()(rounded).images, images) > 60


def test_a_clip_costs_nothing_since_inputs_are_ratios_of_gradients() -> None:
    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=1234), "lenet")
    clipped = dataclasses.replace(leak, observed={name: tensor / 50 for name, tensor in leak.observed.items()})
    clipped = dataclasses.replace(clipped, protocol=dataclasses.replace(leak.protocol, defence="clip(0.01)"))
    assert psnr(ExactGIT()(clipped).images, images) > 60
    for sigma in (1e-5, 1e-4):  # noise after the clip is as loud as it says, beside a gradient that is quieter
        announced = dataclasses.replace(clipped.protocol, defence=f"clip(0.01)+noise({sigma / 50})")
        known = dataclasses.replace(noisy(clipped, sigma / 50), protocol=announced)
        alike = psnr(ExactGIT()(announcing(noisy(leak, sigma), sigma)).images, images)
        assert psnr(ExactGIT()(known).images, images) == pytest.approx(alike, abs=0.1)


def test_weighing_the_equations_beats_plain_least_squares_under_noise() -> None:
    images, labels = pictures(2, 1)
    leak = leak_of(images, labels, build("lenet", (3, 16, 16), 10, seed=1234), "lenet")
    for sigma in (1e-6, 1e-5, 1e-4):
        weighted, plain = (
            ExactGIT(weighted=how)(announcing(noisy(leak, sigma), sigma)).images for how in (True, False)
        )
        assert psnr(weighted, images) > psnr(plain, images) + 10


def test_the_announced_noise_and_the_wires_rounding_count_alike() -> None:
    _, leak = leaked(sigmoid_net)
    one = ExactGIT()(announcing(noisy(leak, 1e-3), 1e-3)).images
    two = ExactGIT()(dataclasses.replace(noisy(leak, 1e-3), resolution=1e-3)).images
    assert torch.equal(one, two)


def test_all_noise_leaves_the_prior() -> None:
    _, leak = leaked(sigmoid_net)
    guess = ExactGIT()(announcing(leak, 1e6)).images
    assert float((guess - 0.5).abs().max()) < 0.1


def test_a_strangers_leak_shows_the_stranger_alone() -> None:
    images, _ = leaked(sigmoid_net)
    others, leak = leaked(sigmoid_net, seed=7)
    guess = ExactGIT()(leak).images
    assert psnr(guess, others) > 90
    assert float((guess - images).square().mean()) > 0.9 * float((images - images.mean()).square().mean())


@pytest.mark.parametrize("make", [sigmoid_net, tanh_mlp, Leaky])
def test_the_equations_hold_at_the_truth_and_their_matrix_is_autograds(make: Build) -> None:
    """Oracle: `K(d) a = G` and `W a + b = z` as autograd has them, and `K'K / noise + W'W / doubt` as its Jacobian."""
    images, leak = leaked(make, victims=1)
    layer = chain(leak).layers[0]
    module = drawn(make).get_submodule(layer.weight[: -len(".weight")])
    a = (chain(leak).scale * images[0].double().flatten() + chain(leak).shift).reshape(1, -1)
    size = images.shape[2:] if isinstance(module, nn.Conv2d) else (a.shape[1],)
    z = module(a.reshape(1, *size))
    d = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    doubt = torch.rand(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2)) + 0.5
    (gradient,) = torch.autograd.grad((z * d).sum(), module.weight)
    weight, bias = layer.parameters(leak.weights or {}, 1, False)
    torch.testing.assert_close(layer.gather(a) @ weight.transpose(1, 2) + bias[:, None], layer.by_place(z.flatten(1)))
    torch.testing.assert_close(
        layer.by_place(d.flatten(1)).transpose(1, 2) @ layer.gather(a), gradient.flatten(1)[None]
    )

    def both(a: Tensor) -> Tensor:
        drift_norm = module(a.reshape(1, *size))
        shown = torch.func.grad(
            lambda w: (torch.func.functional_call(module, {"weight": w}, a.reshape(1, *size)) * d).sum()
        )
        return torch.cat([(drift_norm / doubt.sqrt()).flatten(), shown(module.weight.detach()).flatten() / 0.3**0.5])

    jacobian = torch.func.jacrev(both)(a.flatten())
    equations = Equations(
        layer=layer,
        weight=weight,
        forward=layer.by_place((z - module(torch.zeros(1, *size).double())).flatten(1)),
        doubt=layer.by_place(doubt.flatten(1)),
        d=layer.by_place(d.flatten(1)),
        gradient=gradient.flatten(1)[None],
        noise=torch.tensor([0.3]).double(),
        mean=torch.full_like(a, 0.5),
        precision=torch.full_like(a[0], 1e-9),
    )
    torch.testing.assert_close(equations.normal_matrix()[0], jacobian.T @ jacobian)
    found, variance = equations.solve(variances=True)
    torch.testing.assert_close(found, a, rtol=0, atol=1e-5)
    normal = jacobian.T @ jacobian + 1e-9 * torch.eye(a.shape[1]).double()
    torch.testing.assert_close(variance[0], torch.linalg.inv(normal).diagonal(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("activation", [SIGMOID, TANH, leaky(0.1)], ids=["sigmoid", "tanh", "leaky"])
def test_an_activation_undoes_itself_and_knows_its_slopes(activation: Activation) -> None:
    z = torch.tensor([-2.0, -0.3, 0.4, 3.0]).double().requires_grad_()
    a = activation.apply(z)
    torch.testing.assert_close(activation.inverse(a), z)
    (slope,) = torch.autograd.grad(a.sum(), z)
    torch.testing.assert_close(activation.derivative(a.detach()), slope)


def test_victims_with_weights_of_their_own_fare_as_they_do_alone() -> None:
    images, labels = pictures(2, 1, size=8)
    apart = [
        leak_of(images[[n]].double(), labels[[n]], drawn(sigmoid_net, seed=n), "mine", meta=sigmoid_net) for n in (0, 1)
    ]
    both = stack([apart[0], dataclasses.replace(apart[1], network=apart[0].network)])
    assert both.stacked
    guess = ExactGIT()(both)
    assert psnr(guess.images, images) > 90
    for victim, leak in enumerate(apart):
        torch.testing.assert_close(guess.images[victim], ExactGIT()(leak).images[0], rtol=0, atol=1e-6)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(192, 192), nn.Linear(192, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.fc(images.flatten(1)))
        return self.last(torch.sigmoid(self.fc(hidden)))  # type: ignore[no-any-return]


class Skips(Twice):
    def forward(self, images: Tensor) -> Tensor:
        hidden = images.flatten(1)
        return self.last(hidden + torch.sigmoid(self.fc(hidden)))  # type: ignore[no-any-return]


class Turns(Twice):
    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.fc(images.flip(3).flatten(1))))  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    network = tanh_mlp()
    network.get_submodule("3").requires_grad_(False)
    return network


def with_steps(*steps: nn.Module) -> Build:
    return lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *steps, nn.Flatten(), nn.Linear(256, 10))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (with_steps(nn.ReLU()), r"step relu after 0 cannot be undone"),
        (with_steps(nn.Sigmoid(), nn.Sigmoid()), r"step sigmoid after 0 cannot"),
        (with_steps(nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1, groups=2)), r"step conv2d after 0 cannot"),
        (with_steps(nn.Sigmoid(), nn.Dropout()), r"step dropout after 0 cannot"),
        (with_steps(nn.LeakyReLU(-0.1)), r"step leaky_relu after 0 cannot"),
        (Twice, r"step linear after fc uses the weight fc.weight once more"),
        (Skips, r"step add after fc is not fed by the step before it alone"),
        (Turns, r"does more to the pixels before its first layer"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False)), r"gradient of the last layer's bias"),
        (frozen, r"step linear after 1 has a weight, 3.weight, that is frozen"),
        (lambda: nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()), r"Labels cannot be read off"),
        (lambda: nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.Sigmoid()), r"does not end in a linear layer"),
        (lambda: nn.Linear(5, 10), r"cannot be run on three images"),
    ],
)
def test_what_cannot_be_undone_is_named(make: Build, said: str) -> None:
    torch.manual_seed(0)
    network = make()
    gradient = {name: torch.zeros(1, *tensor.shape) for name, tensor in network.named_parameters()}
    leak = dataclasses.replace(
        leaked(tanh_mlp)[1],
        observed=gradient,
        weights={name: tensor.detach() for name, tensor in network.named_parameters()},
        network=network.to("meta"),
    )
    with pytest.raises(FedtapError, match=said):
        ExactGIT().accepts(leak)


@pytest.mark.parametrize("model", ["mlp", "convnet", "resnet20", "vit"])
def test_fedtaps_other_models_are_refused(model: str) -> None:
    images, labels = pictures(1, 1)
    with pytest.raises(FedtapError, match=r"use a chain of|cannot trace"):
        ExactGIT()(leak_of(images, labels, build(model, (3, 16, 16), 10, seed=0), model))


def test_batches_updates_and_huge_layers_are_refused() -> None:
    images, labels = pictures(1, 2)
    network = build("lenet", (3, 16, 16), 10, seed=0)
    with pytest.raises(FedtapError, match=r"gradient of one image.*--batch 1"):
        ExactGIT()(leak_of(images, labels, network, "lenet"))
    with pytest.raises(FedtapError, match=r"works on a GradientLeak"):
        ExactGIT()(leak_of(images, labels, network, "lenet", kind="update"))
    images, labels = pictures(1, 1, size=96)
    with pytest.raises(FedtapError, match=r"one with 27,648"):
        ExactGIT()(leak_of(images, labels, build("lenet", (3, 96, 96), 10, seed=0), "lenet"))


@pytest.mark.parametrize("field", [{"prior_std": -1.0}, {"prior_std": 0.0}])
def test_fields_are_in_range(field: dict[str, float]) -> None:
    with pytest.raises(FedtapError, match=r"give"):
        ExactGIT(**field)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", [SIGMOID, TANH])
def test_what_is_beyond_an_activations_values_is_undone_at_their_edge(activation: Activation) -> None:
    far = activation.inverse(activation.inside(torch.tensor([-9.0, activation.low, activation.high, 9.0]).double()))
    assert bool(far.isfinite().all())
    assert bool((far[:2] < -5).all())
    assert bool((far[2:] > 5).all())
