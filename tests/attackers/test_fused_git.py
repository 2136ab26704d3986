"""Gauss-Newton and the fused attack: linear algebra against dense oracles, and the limits of no noise and of much."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtap.attackers.baselines.ridge import Ridge
from fedtap.attackers.baselines.training_mean import TrainingMean
from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.gradients.fused_git import FusedGIT, LearnedPrior
from fedtap.attackers.gradients.gauss_newton import GaussNewton
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.parts.newton import conjugate_gradients, fitted, residual, standard_errors
from fedtap.attackers.wrappers.refine import Refine
from fedtap.simulator.auxiliary import Provenance
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from tests.attackers.test_exact_git import announcing, drawn, noisy, psnr, sigmoid_net
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 10**6))
def test_conjugate_gradients_solve_each_lane(lanes: int, size: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(lanes, size, size, generator=draw, dtype=torch.float64)
    matrix = root @ root.transpose(1, 2) + 0.5 * torch.eye(size, dtype=torch.float64)
    right = torch.randn(lanes, size, generator=draw, dtype=torch.float64)
    right[0] = 0
    found = conjugate_gradients(lambda v: (matrix @ v[:, :, None])[:, :, 0], right, 20 * size)
    true = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(found, true, rtol=1e-2, atol=1e-3 * float(true.abs().max() + 1e-9))


def test_a_linear_problem_is_solved_as_its_normal_equations_are() -> None:
    draw = torch.Generator().manual_seed(0)
    matrix, right = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 20, 6), (3, 20)))
    mean, precision = torch.ones(3, 6, dtype=torch.float64), torch.rand(6, generator=draw, dtype=torch.float64)
    x, value = fitted(
        lambda x: (matrix @ x[:, :, None])[:, :, 0] - right,
        torch.zeros_like(mean),
        mean,
        lambda v: v * precision,
        25,
        50,
    )
    normal = matrix.transpose(1, 2) @ matrix + torch.diag(precision)
    true = torch.linalg.solve(normal, (matrix.transpose(1, 2) @ right[:, :, None])[:, :, 0] + precision * mean)
    torch.testing.assert_close(x, true, rtol=1e-4, atol=1e-6)
    cost = ((matrix @ x[:, :, None])[:, :, 0] - right).square().sum(1) + ((x - mean).square() * precision).sum(1)
    torch.testing.assert_close(value, cost)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 30), st.integers(0, 1000))
def test_the_priors_precision_is_the_inverse_of_its_covariance(samples: int, seed: int) -> None:
    about = Provenance(leaked(1)[1].protocol, "test", 20 * samples)
    prior = LearnedPrior(about, torch.nn.Identity())
    draw = torch.Generator().manual_seed(seed)
    prior.errors.copy_(torch.randn(prior.errors.shape, generator=draw) * torch.rand(192, generator=draw))
    errors = prior.errors.double()
    n, p = errors.shape
    empirical = errors.T @ errors / n
    trace, square = empirical.trace(), empirical.square().sum()
    share = min(1.0, float(((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))))
    covariance = (1 - share) * empirical + share * trace / p * torch.eye(p, dtype=torch.float64)
    v = torch.randn(3, p, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(prior.precision()(v) @ covariance, v, rtol=1e-6, atol=1e-8)


def leaked(victims: int = 2, seed: int = 0) -> tuple[Tensor, Leak]:
    images, labels = pictures(victims, 1, size=8, seed=seed)
    return images, leak_of(images, labels, drawn(sigmoid_net).float(), "mine", meta=sigmoid_net)


def test_the_residual_is_in_standard_errors() -> None:
    images, leak = leaked()
    clean = residual(leak, leak_labels())(images.flatten(1).double())
    assert float(clean.abs().max()) < 50, "the format's rounding and no more"
    sent = announcing(noisy(leak, 0.1), 0.1)
    whitened = residual(sent, leak_labels())(images.flatten(1).double())
    assert abs(float(whitened.std()) - 1) < 0.1
    assert all(bool((error >= 0.1).all()) for error in standard_errors(sent).values())


def leak_labels() -> Tensor:
    return pictures(2, 1, size=8)[1]


def test_gauss_newton_ends_at_the_image_and_a_strangers_leak_at_the_stranger() -> None:
    images, leak = leaked()
    guess = GaussNewton(steps=6, inner=30)(leak, start=(images + 0.1 * torch.randn(images.shape)).clamp(0, 1))
    assert psnr(guess.images, images) > 50
    stranger = GaussNewton(steps=2, inner=10)(leaked(seed=9)[1], start=images)
    assert psnr(stranger.images, images) < 20


def auxiliary_at(attack: FusedGIT, leak: Leak, folder: Path, pairs: int = 120) -> Tensor:
    network = drawn(sigmoid_net).float()
    return attack.fit(auxiliary_for(leak, folder, pairs, network=network))(leak).images


def test_without_noise_it_is_exact_and_under_much_it_is_the_public_mean(tmp_path: Path) -> None:
    images, leak = leaked()
    fused = FusedGIT(Ridge(), steps=3, inner=30)
    exact = psnr(ExactGIT()(leak).images, images)
    assert psnr(auxiliary_at(fused, leak, tmp_path), images) > min(exact - 0.2, 90)
    drowned = announcing(noisy(leak, 1e3), 1e3)
    pairs = auxiliary_for(drowned, tmp_path, 120, network=drawn(sigmoid_net).float())
    mean = TrainingMean().fit(pairs)(drowned).images
    torch.testing.assert_close(auxiliary_at(fused, drowned, tmp_path), mean, rtol=0, atol=5e-3)


def test_between_the_two_it_is_better_than_both(tmp_path: Path) -> None:
    images, leak = leaked(4)
    sent = announcing(noisy(leak, 3e-3), 3e-3)
    auxiliary = auxiliary_for(sent, tmp_path, 600, network=drawn(sigmoid_net).float())
    scores = {
        attack.name: float(-10 * math.log10(float((attack.fit(auxiliary)(sent).images - images).square().mean())))
        for attack in (ExactGIT(), Ridge(), FusedGIT(Ridge(), steps=5, inner=40))
    }
    assert scores["fused_git"] > max(scores["exact_git"], scores["ridge"]) + 1, scores


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="idlg, which is not trained"):
        FusedGIT(prior=IDLG())
    _, leak = leaked()
    with pytest.raises(FedtapError, match="at least 40 auxiliary pairs"):
        auxiliary_at(FusedGIT(Ridge()), leak, tmp_path, pairs=20)
    with pytest.raises(FedtapError, match="does not know them"):
        FusedGIT().accepts(dataclasses.replace(leak, weights=None, buffers={}))


def test_a_floor_can_be_the_prior_and_a_start(tmp_path: Path) -> None:
    images, leak = leaked()
    guess = auxiliary_at(FusedGIT(TrainingMean(), steps=2, inner=20), leak, tmp_path)
    assert psnr(guess, images) > 60
    network = drawn(sigmoid_net).float()
    refined = Refine(TrainingMean(), GaussNewton(steps=2, inner=10)).fit(auxiliary_for(leak, tmp_path, network=network))
    assert refined(leak).objective.isfinite().all()
