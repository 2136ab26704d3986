"""Exact batches: their equations against autograd, what they bring back, and when the certificate holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.attackers.gradients import relu_columns
from fedtap.attackers.gradients.exact_batch import (
    ExactBatch,
    _in_double,
    _next_layer,
    _space,
    _switched_on,
    certificate,
)
from fedtap.attackers.gradients.linear import first
from fedtap.simulator import scores
from fedtap.simulator.attack import CertifiedReconstruction
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, stack
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.replay import targets, weights_along
from tests.support.attack_leaks import leak_of, pictures

ONE_LAYER = "mlp(width=160, depth=1)"
BATCH = 6


def batches(victims: int = 1, batch: int = BATCH, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures with some noise, so that each batch has full rank."""
    images, labels = pictures(victims, batch, size=8, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    return (images + 0.2 * torch.rand(images.shape, generator=draw)).clamp(0, 1), labels


def leaked(
    model: str = ONE_LAYER, victims: int = 1, batch: int = BATCH, seed: int = 0, **how: object
) -> tuple[Tensor, Tensor, Leak]:
    images, labels = batches(victims, batch, seed)
    network = build(model, (3, 8, 8), 10, seed=3)
    return images, labels, leak_of(images, labels, network, model, **how)  # type: ignore[arg-type]


def on_the_wire(leak: Leak, rate: float = 0.1) -> Leak:
    """The gradient as the server reads it off float32 weights, ``(before - after) / rate``."""
    assert leak.weights is not None
    observed = {
        name: torch.stack([(leak.weights[name] - (leak.weights[name] - rate * one)) / rate for one in tensor])
        for name, tensor in leak.observed.items()
    }
    return dataclasses.replace(leak, observed=observed, resolution=6.5e-9 / rate)


def worst(found: CertifiedReconstruction, images: Tensor, labels: Tensor) -> float:
    """PSNR of the worst image, in dB; -inf where a label is wrong."""
    decibels = []
    for guess, named, truth, true in zip(found.images, found.labels, images, labels, strict=True):
        order = scores.match(guess, truth)
        right = torch.equal(named[order], true)
        decibels.append(float(scores.psnr(scores.mse(guess[order], truth)).min()) if right else -torch.inf)
    return min(decibels)


@pytest.mark.parametrize("model", [ONE_LAYER, "mlp(width=160)", "mlp(width=160, depth=1, standardised=True)"])
@pytest.mark.parametrize("wire", [on_the_wire, lambda leak: leak], ids=["weights", "gradients"])
def test_every_image_and_label_of_a_batch_comes_back_certified(model: str, wire: Callable[[Leak], Leak]) -> None:
    images, labels, leak = leaked(model, victims=2)
    found = ExactBatch()(wire(leak))
    assert worst(found, images, labels) > 60
    assert found.certified.all()
    assert found.columns(0) == {"labels": found.labels[0].tolist(), "certified": True, "recovered": 1.0}


def test_a_clip_costs_nothing() -> None:
    images, labels, leak = leaked()
    length = torch.stack([tensor.square().sum() for tensor in leak.observed.values()]).sum().sqrt()
    observed = {name: tensor * (0.01 / length) for name, tensor in leak.observed.items()}
    clipped = dataclasses.replace(leak.protocol, defence="clip(0.01)")
    found = ExactBatch()(dataclasses.replace(leak, observed=observed, protocol=clipped))
    assert worst(found, images, labels) > 60
    assert found.certified.all()


def test_a_sum_of_clients_is_a_batch() -> None:
    images, labels, leak = leaked("mlp(width=320, depth=1)", batch=9)
    summed = dataclasses.replace(leak.protocol, summed=9, threat_model="secure_aggregation")
    found = ExactBatch()(dataclasses.replace(on_the_wire(leak), protocol=summed))
    assert worst(found, images, labels) > 60
    assert found.certified.all()


def test_units_that_no_image_switches_on_do_no_harm() -> None:
    """As in a network that has been trained: these fulfil all equations, of any direction."""
    images, labels = batches()
    network = build("mlp(width=320, depth=1)", (3, 8, 8), 10, seed=3)
    with torch.no_grad():
        network.get_parameter("1.bias")[::2] -= 10
    found = ExactBatch()(on_the_wire(leak_of(images, labels, network, "mlp(width=320, depth=1)")))
    assert worst(found, images, labels) > 60
    assert found.certified.all()


@pytest.mark.parametrize(("steps", "learning_rate"), [(3, 1e-3), (5, 0.05)])
def test_several_local_steps_on_one_batch_are_undone(steps: int, learning_rate: float) -> None:
    images, labels, leak = leaked(kind="update", steps=steps, learning_rate=learning_rate)
    found = ExactBatch()(leak)
    assert worst(found, images, labels) > 40
    assert found.certified.all()
    others = {name: tensor.detach() for name, tensor in build(ONE_LAYER, (3, 8, 8), 10, seed=9).named_parameters()}
    assert not ExactBatch(rounds=1)(dataclasses.replace(leak, weights=others)).certified.any()


def test_units_that_several_steps_switch_on_are_those_of_the_clients_own_training() -> None:
    images, labels, leak = leaked(kind="update", steps=4, learning_rate=0.1)
    client = build(ONE_LAYER, (3, 8, 8), 10, seed=3)
    sgd = torch.optim.SGD(client.parameters(), 0.1)
    on = torch.zeros(BATCH, 160, dtype=torch.bool)
    for _ in range(4):
        on |= client[1](client[0](images[0])) > 0  # type: ignore[index]
        sgd.zero_grad()
        F.cross_entropy(client(images[0]), labels[0]).backward()
        sgd.step()
    exact = _in_double(leak)
    assert float((_switched_on(exact, first(exact), images[0].double(), labels[0]) == on).double().mean()) > 0.999
    path = weights_along(leak, images[0], targets(labels[0], 10))
    for name, weight in client.named_parameters():
        torch.testing.assert_close(path[-1][name], weight.detach(), rtol=1e-4, atol=1e-6)


def test_victims_with_weights_of_their_own_fare_as_they_do_alone() -> None:
    apart = []
    for seed in (0, 1):
        images, labels = batches(seed=seed)
        apart.append(leak_of(images, labels, build(ONE_LAYER, (3, 8, 8), 10, seed=seed), ONE_LAYER))
    both = stack([apart[0], dataclasses.replace(apart[1], network=apart[0].network)])
    assert both.stacked
    found = ExactBatch()(both)
    assert found.certified.all()
    for victim, leak in enumerate(apart):
        alone = ExactBatch()(leak)
        assert worst(alone, found.images[[victim]], found.labels[[victim]]) > 60


# The certificate.


def test_wrong_weights_are_not_certified() -> None:
    _, _, leak = leaked()
    others = {name: tensor.detach() for name, tensor in build(ONE_LAYER, (3, 8, 8), 10, seed=9).named_parameters()}
    found = ExactBatch(rounds=1)(dataclasses.replace(leak, weights=others))
    assert not found.certified.any()
    assert float(found.objective[0]) > 1e-2


def test_one_wrong_image_or_label_takes_the_certificate_away() -> None:
    images, labels, leak = leaked()
    leak = _in_double(on_the_wire(leak))
    right = images.double()
    share, holds = certificate(leak, right, labels)
    assert holds.all()
    assert float(share) < 1e-9
    noisy, blended, another = right.clone(), right.clone(), labels.clone()
    noisy[0, 2] = (
        right[0, 2] + 0.05 * torch.randn(right[0, 2].shape, generator=torch.Generator().manual_seed(0))
    ).clamp(0, 1)
    blended[0, 2] = 0.9 * right[0, 2] + 0.1 * right[0, 3]
    another[0, 2] = (labels[0, 2] + 1) % 10
    for wrong, named in ((noisy, labels), (blended, labels), (right, another), (right.flip(1), labels)):
        share, holds = certificate(leak, wrong, named)
        assert not holds.any()
        assert float(share) > 1e-7


def test_a_doubled_image_and_a_silent_victim_are_not_certified() -> None:
    images, labels = batches()
    images[0, 1], labels[0, 1] = images[0, 0], labels[0, 0]
    leak = leak_of(images, labels, build(ONE_LAYER, (3, 8, 8), 10, seed=3), ONE_LAYER)
    for one in (leak, dataclasses.replace(leak, observed={name: 0 * each for name, each in leak.observed.items()})):
        found = ExactBatch(rounds=1)(one)
        assert not found.certified.any()
        assert found.images.isfinite().all()


def test_noise_that_hides_the_images_hides_whether_they_are_right() -> None:
    _, _, leak = leaked()
    draw = torch.Generator().manual_seed(1)
    noisy = {name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in leak.observed.items()}
    protocol = dataclasses.replace(leak.protocol, defence="noise(0.1)")
    found = ExactBatch(rounds=1)(dataclasses.replace(leak, observed=noisy, protocol=protocol))
    assert not found.certified.any()


# The equations.


def columns(leak: Leak, images: Tensor, labels: Tensor) -> Tensor:
    """Oracle: ``dL/dz`` of the first layer, an example a column, by autograd."""
    network = build(leak.protocol.model, leak.protocol.shape, 10, seed=3).double()
    z = network[1](network[0](images[0].double()))  # type: ignore[index]
    loss = F.cross_entropy(network[2:](z), labels[0])  # type: ignore[index]
    (sent,) = torch.autograd.grad(loss, z)
    return sent.T


@pytest.mark.parametrize("model", [ONE_LAYER, "mlp(width=160)"])
def test_the_equations_have_the_examples_columns_as_their_solutions(model: str) -> None:
    images, labels, leak = leaked(model)
    draw = torch.Generator().manual_seed(0)
    space = _space(_in_double(leak), "1", "3", draw)
    truth = F.normalize(space.u.T @ columns(leak, images, labels), dim=0)
    matrices = relu_columns.solutions(space, 1, draw)
    assert matrices is not None
    # each solution is diagonal in the basis of the examples' directions
    inverse = torch.linalg.inv(truth)
    mixed = inverse @ matrices @ inverse.T
    rest = mixed - torch.diag_embed(mixed.diagonal(dim1=1, dim2=2))
    assert float(rest.abs().max()) < 1e-3 * float(mixed.abs().max())
    found, misfit = relu_columns.refitted(space, relu_columns.told_apart(matrices, draw), 20)
    assert float((truth.T @ found).abs().amax(0).min()) > 1 - 1e-9
    assert float(misfit.max()) < 1e-5


def test_the_search_finds_what_the_equations_leave_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relu_columns, "MOST_PRODUCTS", 0)
    images, labels, leak = leaked(batch=4)
    found = ExactBatch()(leak)
    assert worst(found, images, labels) > 60
    assert found.certified.all()


def planted(seed: int, rank: int, units: int = 96) -> tuple[relu_columns.ColumnSpace, Tensor]:
    """A column space of random columns, sent back by three units, half of each off; and their directions."""
    draw = torch.Generator().manual_seed(seed)
    back, sent = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((units, 3), (3, rank)))
    apart = (back @ sent) * (torch.rand(units, rank, generator=draw) > 0.5)
    u, s, v = torch.linalg.svd(apart, full_matrices=False)
    return relu_columns.ColumnSpace(u, s, v, 1e-14, back), F.normalize(u.T @ apart, dim=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(2, 6))
def test_directions_are_refitted_alone_as_they_are_together(seed: int, rank: int) -> None:
    space, truth = planted(seed, rank)
    near = F.normalize(truth + 0.02 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)), dim=0)
    together, misfit = relu_columns.refitted(space, near, 20)
    for number in range(rank):
        alone, error = relu_columns.refitted(space, near[:, [number]], 20)
        torch.testing.assert_close((alone * together[:, [number]]).sum().abs(), torch.ones(()).double())
        torch.testing.assert_close(error[0], misfit[number], rtol=1e-2, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(2, 6))
def test_planted_columns_are_told_apart(seed: int, rank: int) -> None:
    space, truth = planted(seed, rank)
    matrices = relu_columns.solutions(space, 1, torch.Generator().manual_seed(seed))
    assert matrices is not None
    found = relu_columns.told_apart(matrices, torch.Generator().manual_seed(seed))
    assert float((truth.T @ found).abs().amax(1).min()) > 1 - 1e-6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(2, 6))
def test_an_example_is_zero_where_it_is_off_and_a_mixture_almost_nowhere(seed: int, rank: int) -> None:
    space, truth = planted(seed, rank)
    off = torch.cat([((space.u @ q).abs() < 1e-12).double().mean()[None] for q in truth.T])
    torch.testing.assert_close(relu_columns.not_zero(space, truth), 1 - off)
    mixture = truth.sum(1, keepdim=True)
    assert float(relu_columns.not_zero(space, mixture)) > float(relu_columns.not_zero(space, truth).max())
    assert bool(relu_columns.not_zero(space, mixture * torch.nan).isnan().all())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), many=st.integers(0, 12))
def test_chosen_directions_are_independent_and_fit_best(seed: int, many: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q = F.normalize(torch.randn(4, many, generator=draw, dtype=torch.float64), dim=0)
    q, misfit = torch.cat([q, -q], 1), torch.rand(2 * many, generator=draw, dtype=torch.float64)
    chosen, error = relu_columns.independent(q, misfit)
    assert chosen.shape[1] == min(4, many) or float(torch.linalg.svdvals(q)[-1]) < 1e-2
    if many:
        assert float(torch.linalg.svdvals(chosen)[-1]) > relu_columns.INDEPENDENT
        assert float(error[0]) == float(misfit.min())
        assert bool((error.diff() >= 0).all())


# What is refused.


def test_what_follows_the_first_layer_is_found() -> None:
    _, _, leak = leaked("mlp(width=160)")
    assert _next_layer(leak, "1") == "3"


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(192, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).relu()
        return self.last(hidden + self.second(hidden))  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    network.get_submodule("3").requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: build("mlp(activation='tanh')", (3, 8, 8), 10, seed=0), r"does not go through a ReLU into one linear"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), r"does not go through a ReLU into one linear layer"),
        (Skips, r"output of first does not go through a ReLU into one linear layer that is trained"),
        (frozen, r"output of 1 does not go through a ReLU"),
        (lambda: build("convnet", (3, 8, 8), 10, seed=0), r"exact_batch needs a model whose first layer.*Conv2d"),
        (lambda: build("mlp(bias=False)", (3, 8, 8), 10, seed=0), r"exact_batch needs a model whose first.*with bias"),
        (
            lambda: build("mlp(width=6)", (3, 8, 8), 10, seed=0),
            r"with 6 units on 192 pixels.*a batch of 6: use a wider",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name(make: Callable[[], nn.Module], said: str) -> None:
    images, labels = batches()
    with pytest.raises(FedtapError, match=said):
        ExactBatch()(leak_of(images, labels, make(), "mine", meta=make))


def test_signs_alone_and_fields_out_of_range_are_refused() -> None:
    _, _, leak = leaked()
    adam = dataclasses.replace(leak.protocol, optimiser="adam")
    with pytest.raises(FedtapError, match="how large the gradient's entries are"):
        ExactBatch()(dataclasses.replace(leak, protocol=adam))
    with pytest.raises(FedtapError, match="starts of ExactBatch is 0"):
        ExactBatch(starts=0)
