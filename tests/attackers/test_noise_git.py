"""Noise GIT: its parts against dense oracles, labels under noise, what it leads back to, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedtap.attackers.gradients.denoiser import ImageDenoiser
from fedtap.attackers.gradients.noise_git import NoiseGIT, PosteriorMean, most_probable
from fedtap.attackers.parts.labels import logit_gradients, mean_embedding, recovered
from fedtap.attackers.parts.newton import residual
from fedtap.attackers.parts.priors import PublicImages
from fedtap.attackers.parts.teaching import teach
from fedtap.attackers.wrappers.saved import Saved
from fedtap.scenarios.gradients import noise
from fedtap.simulator.attack import Learned
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.registry import build
from tests.attackers.test_exact_git import announcing, drawn, noisy, sigmoid_net
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures

SIGMA = 0.05
QUICK = NoiseGIT(steps=1, inner=4, width=4, epochs=2, batch=20)


def leaked(victims: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Leak]:
    """Pictures, their labels, and what noise leaves of their leak."""
    images, labels = pictures(victims, 1, size=8, seed=seed)
    leak = leak_of(images, labels, drawn(sigmoid_net).float(), "mine", meta=sigmoid_net)
    return images, labels, announcing(noisy(leak, SIGMA), SIGMA)


def error(found: Tensor, images: Tensor) -> float:
    return float((found.clamp(0, 1) - images.reshape(found.shape)).square().mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    folder, network = tmp_path_factory.mktemp("pairs"), drawn(sigmoid_net).float()
    return QUICK.fit(auxiliary_for(leaked(1)[2], folder, 200, network=network))


def at_zero() -> nn.Module:
    """A network of one layer; at zero weights its softmax is even, and its gradient is linear in the image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10))


def linear_problem() -> tuple[Tensor, Leak, PublicImages, Tensor]:
    """Three victims of `at_zero`, a prior, and the derivative of their gradient by the image."""
    images, labels = pictures(3, 1, size=4)
    network = at_zero()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    leak = announcing(noisy(leak_of(images, labels, network, "one", meta=at_zero), 0.3), 0.3)
    prior = PublicImages(48)
    prior.see(pictures(300, 1, size=4, seed=9)[0][:, 0])
    zeros = torch.zeros(1, 48, dtype=torch.float64)
    each = [torch.func.jacrev(residual(leak[v], labels[v : v + 1]))(zeros)[0, :, 0] for v in range(3)]
    return labels, leak, prior, torch.stack(each)


def test_the_most_probable_image_of_a_linear_problem_is_the_posterior_mean() -> None:
    labels, leak, prior, jacobian = linear_problem()
    found, objective = most_probable(leak, labels, prior, 1, 60)
    root, mean = prior.root.double(), prior.mean.double()
    covariance = root @ root.T
    for victim in range(3):
        j = jacobian[victim]
        at_mean = residual(leak[victim], labels[victim : victim + 1])(mean[None])[0]
        gain = covariance @ j.T @ torch.linalg.inv(j @ covariance @ j.T + torch.eye(len(j)).double())
        true = mean - gain @ at_mean
        torch.testing.assert_close(found[victim].double(), true, rtol=1e-3, atol=1e-3)
        z = torch.linalg.solve_triangular(root, (true - mean)[:, None], upper=False)
        value = (at_mean + j @ (true - mean)).square().sum() + z.square().sum()
        torch.testing.assert_close(objective[victim].double(), value, rtol=1e-4, atol=1e-2)


def test_the_genies_error_is_the_trace_of_the_posterior_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, leak, prior, jacobian = linear_problem()
    monkeypatch.setattr(noise, "GENIE_PROBES", 400)
    bounds = noise.genie_mse(leak, pictures(3, 1, size=4)[0], labels, prior)
    precision = torch.linalg.inv(prior.root.double() @ prior.root.T.double())
    dense = [torch.linalg.inv(j.T @ j + precision).trace() / 48 for j in jacobian]
    torch.testing.assert_close(bounds.double(), torch.stack(dense), rtol=0.05, atol=0)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_mean_embedding_of_public_images_tells_labels_under_noise(batch: int) -> None:
    images, labels = pictures(96 // batch, batch)
    network = build("lenet", (3, 16, 16), 10, seed=1234)
    clear = leak_of(images, labels, network, "lenet")
    told = announcing(noisy(clear, 1.0), 1.0)
    embedding = mean_embedding(told, pictures(64, 1, seed=9)[0][:, 0])
    without, within = (
        (found == labels.sort(1).values).double().mean() for found in (recovered(told), recovered(told, embedding))
    )
    assert within > without + 0.05
    slopes, of_labels = logit_gradients(clear), logit_gradients(told, embedding)
    assert (of_labels - slopes).norm() < 0.5 * (logit_gradients(told) - slopes).norm()


def test_the_matched_filter_is_exact_on_the_image_of_that_embedding() -> None:
    images, labels = pictures(1, 1)
    for bias in (True, False):
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10, bias=bias))
        leak = leak_of(images, labels, network, "one", meta=lambda bias=bias: at_size(bias))  # type: ignore[misc]
        embedding = mean_embedding(leak, images[:, 0])
        torch.testing.assert_close(embedding, images.flatten())
        output = network(images[:, 0]).softmax(1)
        torch.testing.assert_close(
            logit_gradients(leak, embedding), output.detach() - nn.functional.one_hot(labels[:, 0], 10)
        )


def at_size(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10, bias=bias))


def test_labels_and_its_own_estimate_of_the_error_hold_for_victims(trained: Learned) -> None:
    images, labels, leak = leaked(64)
    inverter = trained.inverter
    assert isinstance(inverter, PosteriorMean)
    found = trained(leak)
    assert torch.equal(found.labels, labels)
    blind = error(inverter.prior.mean.expand(64, -1), images)
    assert error(found.images, images) < 0.7 * blind
    # pairs that were held out of the denoiser's training, and of the prior with which they were solved
    assert 0.7 < error(found.images, images) / float(found.objective[0]) < 1.4


def test_the_denoiser_approaches_a_posterior_mean_that_no_linear_estimate_is() -> None:
    draw = torch.Generator().manual_seed(0)
    level = 0.5 + 0.3 * (torch.randint(2, (840, 1), generator=draw) * 2 - 1)  # images of one of two greys
    seen = level + 0.3 * torch.randn(840, 1, generator=draw)
    rows, images = torch.cat([seen.expand(-1, 16), torch.zeros(840, 1)], 1), level[:, None].expand(-1, -1, 16)
    torch.manual_seed(0)
    denoiser = ImageDenoiser((1, 4, 4), 1, 8)
    adam = torch.optim.Adam(denoiser.parameters(), 5e-3)
    constant = torch.optim.lr_scheduler.ConstantLR(adam, 1.0)
    found = teach(denoiser, rows, images, adam, constant, epochs=6, batch=20, seed=0)
    # linear: 1 / (1 / 0.3^2 + 1 / 0.3^2); posterior mean 0.5 + 0.3 tanh((y - 0.5) / 0.3), whose error is on these
    linear = 0.3**2 / 2
    best = float((0.5 + 0.3 * ((seen - 0.5) / 0.3).tanh() - level)[-42:].square().mean())
    assert best < linear
    assert float(found) < 0.5 * (best + linear)


def test_neither_a_strangers_gradient_nor_a_wrong_prior_beats_the_blind_guess(trained: Learned) -> None:
    images, labels, leak = leaked()
    prior = trained.inverter.prior
    assert isinstance(prior, PublicImages)
    blind = error(prior.mean.expand(16, -1), images)
    assert error(trained(leak).images.roll(1, 0), images) > blind
    wrong = PublicImages(192)
    wrong.see(pictures(600, 1, size=8, seed=100)[0][:, 0])
    wrong.mean.neg_()
    wrong.root.mul_(0.01)  # sure of images that there are none of
    assert error(most_probable(leak, labels, wrong, 3, 15)[0], images) > blind


def test_a_saved_one_is_the_same(trained: Learned, tmp_path: Path) -> None:
    _, _, leak = leaked(2)
    trained.save(tmp_path / "noise.safetensors")
    restored = Saved(str(tmp_path / "noise.safetensors"))
    assert restored.name == "noise_git"
    assert torch.equal(restored(leak).images, trained(leak).images)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_a_denoiser_that_has_not_learned_changes_nothing(channels: int, high: int, wide: int) -> None:
    pixels = channels * high * wide
    rows = torch.rand(2, pixels + 1)
    found = ImageDenoiser((channels, high, wide), 1, 2)(rows)
    torch.testing.assert_close(found, rows[:, None, :pixels])


def test_what_it_cannot_use_is_refused(tmp_path: Path) -> None:
    _, _, leak = leaked(2)
    for defence, match in (("none", "announces none"), ("clip(1.0)+noise(0.1)", r"clip\(1\.0\) changes the gradient")):
        with pytest.raises(FedtapError, match=match):
            NoiseGIT().accepts(dataclasses.replace(leak, protocol=dataclasses.replace(leak.protocol, defence=defence)))
    two = leak_of(*pictures(1, 2, size=8), drawn(sigmoid_net).float(), "mine", meta=sigmoid_net)
    with pytest.raises(FedtapError, match="noise_git reads the gradient of one image"):
        NoiseGIT().accepts(announcing(two, 0.1))
    unknown = dataclasses.replace(leak, weights=None, buffers={})
    with pytest.raises(FedtapError, match="does not know them"):
        NoiseGIT().accepts(unknown)
    with pytest.raises(FedtapError, match="does not know them"):
        QUICK.fit(auxiliary_for(unknown, tmp_path, network=drawn(sigmoid_net).float()))
    with pytest.raises(FedtapError, match="at least 40 auxiliary pairs"):
        QUICK.fit(auxiliary_for(leak, tmp_path / "few", 20, network=drawn(sigmoid_net).float()))
    with pytest.raises(FedtapError, match="steps of NoiseGIT"):
        NoiseGIT(steps=0)
