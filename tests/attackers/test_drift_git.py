"""Drift GIT: its linear algebra against dense oracles, no drift, drift, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedtap.attackers.gradients.drift_git import LEAST_SCALE, SNAPSHOTS, DriftGIT, Joint, PublicPrior, determined
from fedtap.attackers.gradients.gauss_newton import GaussNewton
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.parts.newton import linear, stepped
from fedtap.attackers.parts.priors import shrinkage
from fedtap.simulator.attack import Attack, Learned
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.registry import build
from fedtap.simulator.run import unexplained_of
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))


def broadcast() -> nn.Module:
    torch.manual_seed(0)
    network = small()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return network


def drifted(share: float, seed: int = 0) -> nn.Module:
    """The broadcast network, each tensor moved by this share of its root mean square."""
    network, draw = copy.deepcopy(broadcast()), torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        size = share * parameter.data.square().mean().sqrt()
        parameter.data += size * torch.randn(parameter.shape, generator=draw)
    return network


def leak_at(network: nn.Module, seed: int = 0, kind: str = "gradient", steps: int = 1) -> tuple[Tensor, Leak]:
    """Pictures, and their leak at this network's weights, of which only the broadcast ones are known."""
    images, labels = pictures(2, 1, size=8, seed=seed)
    leak = leak_of(images, labels, network, "small", kind=kind, steps=steps, meta=small)
    known = {name: parameter.detach().clone() for name, parameter in broadcast().named_parameters()}
    return images, dataclasses.replace(leak, weights=known)


def error(attack: Attack, images: Tensor, leak: Leak) -> float:
    return float((attack(leak).images - images).square().mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    auxiliary = auxiliary_for(leak_at(broadcast())[1], tmp_path_factory.mktemp("pairs"), 160, network=broadcast())
    return DriftGIT(steps=10, inner=10).fit(auxiliary)


def curved_residual(elements: int = 2, unknowns: int = 6, entries: int = 9) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(elements, entries, unknowns, generator=draw, dtype=torch.float64)
    return matrix, torch.randn(elements, unknowns, generator=draw, dtype=torch.float64)


def test_products_are_those_of_the_dense_jacobian() -> None:
    matrix, z = curved_residual()

    def residual(z: Tensor) -> Tensor:
        return torch.einsum("eru,eu->er", matrix, z).sin()

    jacobian = torch.stack([torch.func.jacrev(lambda z, e=e: (matrix[e] @ z).sin())(z[e]) for e in range(2)])
    r, back, curved = linear(residual, z)
    v = torch.ones_like(z)
    torch.testing.assert_close(r, residual(z))
    torch.testing.assert_close(back(r), torch.einsum("eru,er->eu", jacobian, r))
    torch.testing.assert_close(curved(v), torch.einsum("eru,erw,ew->eu", jacobian, jacobian, v) + v)


def test_one_step_solves_a_linear_problem_and_a_step_too_long_is_cut() -> None:
    matrix, z = curved_residual()
    there, value = stepped(lambda z: torch.einsum("eru,eu->er", matrix, z) - 1, z, 50)
    normal = matrix.transpose(1, 2) @ matrix + torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(there, torch.linalg.solve(normal, matrix.sum(1)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        value, (torch.einsum("eru,eu->er", matrix, there) - 1).square().sum(1) + there.square().sum(1)
    )
    start = torch.full((1, 1), 3.0, dtype=torch.float64)  # a full step of atan's leads farther away
    bent, lower = stepped(lambda z: 100 * z.atan(), start, 10)
    assert float(lower) < float((100 * start.atan()).square() + start.square())
    assert float(bent.abs()) < 3


def test_determined_is_exact_where_the_curvature_is_diagonal() -> None:
    z, gain = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([0.0, 1.0, 3.0, 100.0], dtype=torch.float64)
    found = determined(lambda z: gain * z, z, 50)
    torch.testing.assert_close(found, (gain**2 / (gain**2 + 1)).expand(2, 4), rtol=1e-3, atol=1e-3)


def test_the_drifts_scale_is_found_from_the_leak_alone() -> None:
    draw = torch.Generator().manual_seed(1)
    mixing = torch.randn(400, 300, generator=draw, dtype=torch.float64)
    true = torch.tensor([0.02, 0.5], dtype=torch.float64)
    leaked = (true[:, None] * torch.randn(2, 300, generator=draw, dtype=torch.float64)) @ mixing.T
    prior = PublicPrior(1, 300, 0).double()
    zeros, ones = torch.zeros(1, 300, dtype=torch.float64), torch.ones(1, 300, dtype=torch.float64)
    joint = Joint(prior, leaked, torch.zeros_like(leaked), lambda x, w: w @ mixing.T, zeros, ones, 1)
    z, scale = torch.zeros(2, 301, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64)
    for _ in range(4):
        residual = joint.residual(scale, 0.01)
        z, _ = stepped(residual, z, 100)
        before = joint.weights(z, scale)
        z, scale = joint.rescaled(z, scale, residual, 100)
        torch.testing.assert_close(joint.weights(z, scale), before)
    torch.testing.assert_close(scale, true, rtol=0.15, atol=0)
    _, scale = joint.rescaled(torch.zeros_like(z), scale, residual, 10)
    assert torch.equal(scale, torch.full_like(scale, LEAST_SCALE))


def test_the_prior_is_the_public_images_mean_and_shrunk_covariance() -> None:
    images = pictures(300, 1, size=8)[0][:, 0].double()
    prior = PublicPrior(192, 1, 0).double()
    prior.see(images)
    rows = images.flatten(1)
    torch.testing.assert_close(prior.mean, rows.mean(0))
    covariance = torch.cov(rows.T, correction=0)
    trace = covariance.trace()
    share = shrinkage(trace, covariance.square().sum(), 300, 192)
    shrunk = (1 - share) * covariance + share * trace / 192 * torch.eye(192).double()
    torch.testing.assert_close(prior.root @ prior.root.T, shrunk)
    prior.see(torch.full((3, 3, 8, 8), 0.25))  # all the same: a grey level of doubt is left
    torch.testing.assert_close(prior.root, torch.eye(192).double() / 255)


def test_auxiliary_trainings_give_the_drifts_mean_and_spread() -> None:
    ways = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0))
    prior = PublicPrior(1, 7, 20)
    prior.follow(ways)
    rows = ways.flatten(0, 1)
    torch.testing.assert_close(prior.drift, rows.mean(0))
    torch.testing.assert_close(prior.spread.T @ prior.spread, torch.cov(rows.T, correction=0))


def test_without_drift_it_is_as_good_as_who_believes_the_weights(trained: Learned) -> None:
    images, leak = leak_at(broadcast())
    # 1e-3 is what s leaves open
    assert error(trained, images, leak) < error(GaussNewton(steps=5, inner=15), images, leak) + 1e-3


@pytest.mark.parametrize(("kind", "steps"), [("gradient", 1), ("update", 2)])
def test_at_drifted_weights_it_beats_who_believes_the_broadcast_ones(trained: Learned, kind: str, steps: int) -> None:
    network = drifted(0.1)
    images, leak = leak_at(network, kind=kind, steps=steps)
    blind = float((images - trained.inverter.mean.reshape(3, 8, 8)).square().mean())  # type: ignore[operator]
    assert error(trained, images, leak) < 0.3 * min(error(IDLG(steps=40), images, leak), blind)
    assert error(trained, images, leak_at(network, seed=9, kind=kind, steps=steps)[1]) > 0.9 * blind


def test_the_gradient_is_explained_at_the_weights_that_it_returns(trained: Learned) -> None:
    network = drifted(0.1)
    _, leak = leak_at(network)
    found, known, true = trained(leak), broadcast().state_dict(), network.state_dict()
    assert found.weights is not None
    for name, weights in found.weights.items():
        apart = (weights - true[name]).flatten(1).norm(dim=1)
        assert float(apart.max()) < float((known[name] - true[name]).norm())
    here, there = unexplained_of(leak, found), unexplained_of(leak, dataclasses.replace(found, weights=None))
    for explained, believed in zip(here, there, strict=True):
        assert explained is not None
        assert believed is not None
        assert explained < 0.3 * believed


def test_trainings_are_learned_from_and_need_the_weights(tmp_path: Path) -> None:
    images, leak = leak_at(drifted(0.02))
    auxiliary = auxiliary_for(leak, tmp_path, 48, network=broadcast())
    learned = DriftGIT(steps=5, inner=2, trainings=2, epochs=2, learning_rate=0.1).fit(auxiliary)
    prior = learned.inverter
    assert isinstance(prior, PublicPrior)
    assert prior.spread.shape == (16, sum(parameter.numel() for parameter in broadcast().parameters()))
    assert float(prior.drift.norm()) > 0
    assert learned(leak).images.shape == images.shape
    with pytest.raises(FedtapError, match="trains from the broadcast weights"):
        DriftGIT(trainings=2).fit(
            auxiliary_for(dataclasses.replace(leak, weights=None), tmp_path / "unknown", 16, network=broadcast())
        )
    named = dataclasses.replace(auxiliary, about=dataclasses.replace(auxiliary.about, labels="random"))
    with pytest.raises(FedtapError, match="these have random labels: use --auxiliary-labels own"):
        DriftGIT(trainings=2).fit(named)


@pytest.mark.parametrize("model", ["lenet", "resnet20"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_trainings_at_once_are_those_one_by_one(model: str, epochs: int) -> None:
    images, labels = pictures(70, 1, size=16)
    images = images.double()  # in float32 a ResNet of random weights amplifies the rounding a hundredfold a step
    network = build(model, (3, 16, 16), 10, seed=3).double()
    leak = leak_of(images[:1], labels[:1], network, model, meta=lambda: copy.deepcopy(network))
    attack, seen = DriftGIT(trainings=3, epochs=epochs, learning_rate=0.03), (images.flatten(0, 1), labels.flatten())

    def draws() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in range(3)]

    together = attack.trained_at_once(leak, *seen, draws())
    alone = torch.stack([attack.training(leak, *seen, draw) for draw in draws()])
    assert together.shape == (3, SNAPSHOTS, sum(weight.numel() for weight in leak.network.parameters()))
    assert not torch.equal(together[0], together[1])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)


def test_what_it_cannot_use_is_refused() -> None:
    with pytest.raises(FedtapError, match="trainings of DriftGIT"):
        DriftGIT(trainings=-1)
    with pytest.raises(FedtapError, match="steps of DriftGIT"):
        DriftGIT(steps=4)
    _, leak = leak_at(broadcast())
    with pytest.raises(FedtapError, match="does not know them"):
        DriftGIT().accepts(dataclasses.replace(leak, weights=None))
