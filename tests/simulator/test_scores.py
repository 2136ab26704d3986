"""Scores against known values and independent computations; matching, floors, and guesses that are no images."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import uniform_filter
from scipy.stats import binom
from torch import Tensor
from torch.nn import functional as F

from fedtap.simulator import scores
from fedtap.simulator.data import vision
from fedtap.simulator.data.images import open_dataset
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.scores import PSNR_CAP, RECOVERED_DB, score, score_all


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """The eight portraits, `8 3 32 32`."""
    return open_dataset("photos", Path("nowhere")).target.batch(slice(8))[0]


# Known values.


@pytest.mark.parametrize(
    ("offset", "decibels"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0), (math.sqrt(1e-3), RECOVERED_DB)]
)
def test_a_constant_offset_has_a_known_mse_and_psnr(offset: float, decibels: float) -> None:
    truth = torch.zeros(1, 3, 8, 8)
    error = scores.mse(truth + offset, truth)
    assert error.item() == pytest.approx(offset**2, rel=1e-6)
    assert scores.psnr(error).item() == pytest.approx(decibels, abs=1e-5)


def test_the_same_image_has_a_finite_psnr() -> None:
    image = noise(1, 3, 8, 8)
    assert scores.psnr(scores.mse(image, image)).item() == PSNR_CAP


def test_a_guess_is_clamped_before_it_is_scored() -> None:
    truth = torch.ones(1, 1, 8, 8)
    assert scores.mse(truth * 7, truth).item() == 0.0


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b, c1 = 0.3, 0.6, 0.01**2
    value = scores.ssim(torch.full((1, 3, 9, 9), a), torch.full((1, 3, 9, 9), b)).item()
    assert value == pytest.approx((2 * a * b + c1) / (a**2 + b**2 + c1), rel=1e-5)


def test_ssim_is_what_its_formula_says(photographs: Tensor) -> None:
    truth = photographs
    guess = (truth + 0.2 * (noise(*truth.shape) - 0.5)).clamp(0, 1)
    for value, a, b in zip(scores.ssim(guess, truth), guess.double().numpy(), truth.double().numpy(), strict=True):
        assert float(value) == pytest.approx(ssim_by_hand(a, b), abs=1e-9)


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, with a uniform 7 x 7 window and sample covariances; borders left out."""

    def mean(image: np.ndarray) -> np.ndarray:
        return uniform_filter(image, (1, 7, 7))[:, 3:-3, 3:-3]

    unbiased = 49 / 48
    variance_a, variance_b = unbiased * (mean(a * a) - mean(a) ** 2), unbiased * (mean(b * b) - mean(b) ** 2)
    covariance = unbiased * (mean(a * b) - mean(a) * mean(b))
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean(a) * mean(b) + c1) * (2 * covariance + c2)
    return float((above / ((mean(a) ** 2 + mean(b) ** 2 + c1) * (variance_a + variance_b + c2))).mean())


def test_lpips_is_what_its_paper_says(photographs: Tensor) -> None:
    """Against the formula written out: unit-length features, squared differences, learned weights, spatial means."""
    guess, truth = photographs.flip(0), photographs
    assert torch.allclose(scores.lpips(guess, truth), lpips_by_hand(guess, truth), atol=1e-5)


def lpips_by_hand(guess: Tensor, truth: Tensor) -> Tensor:
    """Zhang et al. 2018, equation 1, on AlexNet's five ReLU layers."""
    import lpips

    trunk = {name: tensor.float() for name, tensor in vision.alexnet_features().items()}
    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu")

    def layers(images: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        hidden, seen = (2 * images - 1 - shift.view(-1, 1, 1)) / scale.view(-1, 1, 1), []
        for number, stride, padding, pool in ((0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)):
            hidden = F.max_pool2d(hidden, 3, 2) if pool else hidden
            weight, bias = trunk[f"features.{number}.weight"], trunk[f"features.{number}.bias"]
            hidden = F.conv2d(hidden, weight, bias, stride=stride, padding=padding).relu()
            seen.append(hidden / (hidden.norm(dim=1, keepdim=True) + 1e-10))
        return seen

    pairs = zip(layers(guess), layers(truth), strict=True)
    return sum(
        ((a - b).square() * heads[f"lin{n}.model.1.weight"]).sum(1).mean((1, 2)) for n, (a, b) in enumerate(pairs)
    )


def test_lpips_is_zero_for_the_same_and_grows_with_noise(photographs: Tensor) -> None:
    assert scores.lpips(photographs, photographs).abs().max() < 1e-6
    steps = [scores.lpips(photographs + s * (noise(*photographs.shape) - 0.5), photographs) for s in (0.1, 0.3, 0.9)]
    assert all((less < more).all() for less, more in itertools.pairwise(steps))


def test_lpips_of_grey_images_is_that_of_the_same_in_colour(photographs: Tensor) -> None:
    grey = photographs.mean(1, keepdim=True)
    colour = grey.expand(-1, 3, -1, -1)
    assert torch.equal(scores.lpips(grey.flip(0), grey), scores.lpips(colour.flip(0), colour))


def test_images_too_small_for_a_score_leave_it_empty_and_say_why() -> None:
    for side, has_ssim in ((30, True), (6, False)):
        image = noise(1, 3, side, side)
        result = score(image, torch.tensor([0]), image, torch.tensor([0]))
        assert result["lpips"] is None
        assert "LPIPS needs 31 pixels a side" in str(result["lpips_note"])
        assert (result["ssim"] is not None) == has_ssim == (result["ssim_note"] is None)
        assert result["psnr"] == PSNR_CAP
    smallest = noise(1, 3, 31, 31)
    assert score(smallest, torch.tensor([0]), smallest, torch.tensor([0]))["lpips"] == 0


def test_lpips_without_its_weights_is_empty_never_random(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise FedtapError("LPIPS cannot be loaded (no such file): install fedtap again.")

    monkeypatch.setattr(vision, "lpips_alex", lost)
    image = noise(1, 3, 32, 32)
    result = score(image, torch.tensor([0]), image, torch.tensor([0]))
    assert result["lpips"] is None
    assert "no such file" in str(result["lpips_note"])
    assert result["ssim"] == pytest.approx(1)


# Batches.


@given(st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_the_order_of_a_batch_does_not_matter(batch: int, seed: int) -> None:
    truth = noise(batch, 3, 8, 8, seed=seed)
    guess = (truth + 0.4 * noise(batch, 3, 8, 8, seed=seed + 1)).clamp(0, 1)
    labels, guessed = torch.arange(batch) % 3, torch.arange(batch) % 2
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    one = score(guess, guessed, truth, labels)
    other = score(guess[order], guessed[order], truth, labels)
    for column in ("mse", "psnr", "ssim", "label_correct", "recovered"):
        assert one[column] == pytest.approx(other[column], abs=1e-9)
    assert torch.equal(guess[one["matching"]], guess[order][other["matching"]])


@given(st.integers(1, 5), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_the_matching_is_the_best_of_all(batch: int, seed: int) -> None:
    guess, truth = noise(batch, 1, 2, 2, seed=seed), noise(batch, 1, 2, 2, seed=seed + 1)
    best = min(scores.mse(guess[list(order)], truth).sum() for order in itertools.permutations(range(batch)))
    assert scores.mse(guess[scores.match(guess, truth)], truth).sum().item() == pytest.approx(best.item(), rel=1e-9)


def test_a_batch_is_scored_by_the_mean_of_its_images() -> None:
    truth = torch.zeros(2, 3, 8, 8)
    guess = truth + torch.tensor([0.1, 0.001]).view(2, 1, 1, 1)
    result = score(guess, torch.tensor([0, 1]), truth, torch.tensor([1, 2]))
    assert result["psnr"] == pytest.approx((20 + 60) / 2, abs=1e-4)
    assert result["mse"] == pytest.approx((1e-2 + 1e-6) / 2, rel=1e-5)
    assert result["recovered"] == 0.5
    assert result["label_correct"] == 0.5


@pytest.mark.parametrize(
    ("guess", "truth", "share"),
    [
        ([3], [3], 1.0),
        ([3], [4], 0.0),
        ([1, 1, 2], [2, 1, 1], 1.0),
        ([1, 1, 1], [1, 2, 2], 1 / 3),
        ([-1, 0], [0, 0], 0.5),
    ],
)
def test_labels_are_counted_with_repeats(guess: list[int], truth: list[int], share: float) -> None:
    assert scores.label_correct(torch.tensor(guess), torch.tensor(truth)) == pytest.approx(share)


def test_victims_are_scored_as_if_alone_and_nothing_is_changed(photographs: Tensor) -> None:
    truth = photographs.view(4, 2, 3, 32, 32)
    guess = (truth + 0.3 * (noise(*truth.shape) - 0.5)).flip(1)
    labels = torch.arange(8).view(4, 2)
    kept = guess.clone(), truth.clone(), torch.get_rng_state()
    together = score_all(guess, labels, truth, labels)
    for victim, result in enumerate(together):
        alone = score(guess[victim], labels[victim], truth[victim], labels[victim])
        assert result["matching"] == alone["matching"] == [1, 0]
        for column in ("mse", "psnr", "ssim", "lpips", "label_correct", "recovered"):
            assert result[column] == pytest.approx(alone[column], rel=1e-5)
    assert torch.equal(guess, kept[0])
    assert torch.equal(truth, kept[1])
    assert torch.equal(torch.get_rng_state(), kept[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_guess_with_nan_has_recovered_nothing_and_spares_its_neighbours(value: float) -> None:
    truth = noise(2, 1, 3, 32, 32)
    guess = truth.clone()
    guess[0, 0, 1, 2, 3] = value
    labels = torch.zeros(2, 1, dtype=torch.int64)
    strange, sound = score_all(guess, labels, truth, labels)
    assert [strange[column] for column in ("mse", "psnr", "ssim", "lpips")] == [None] * 4
    assert strange["recovered"] == 0.0
    assert strange["label_correct"] == 1.0
    assert "NaN or infinity" in str(strange["lpips_note"])
    assert (sound["psnr"], sound["recovered"]) == (PSNR_CAP, 1.0)


# Floors.


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_no_constant_beats_the_best_constant(seed: int) -> None:
    public = noise(5, 3, 4, 4, seed=seed)
    best = scores.best_constant(public)
    assert best.flatten(1).std(1).max() < 1e-6
    rival = noise(3, 1, 1, seed=seed + 1).expand_as(best)
    assert scores.mse(best.expand_as(public), public).mean() <= scores.mse(rival.expand_as(public), public).mean()


def test_the_training_mean_is_the_mean_image() -> None:
    public = noise(4, 3, 5, 5)
    assert torch.allclose(scores.training_mean(public), sum(public) / 4)


def test_blind_takes_the_floor_that_does_better_on_images_it_was_not_made_of() -> None:
    scene = noise(3, 16, 16)
    alike = (scene + 0.1 * noise(40, 3, 16, 16, seed=1)).clamp(0, 1)
    assert torch.equal(scores.blind(alike), scores.training_mean(alike))
    unlike = noise(10, 3, 16, 16)  # the mean of a few such images keeps their noise, and generalises worse
    assert torch.equal(scores.blind(unlike), scores.best_constant(unlike))
    assert torch.equal(scores.blind(unlike[:1]), scores.training_mean(unlike[:1]))


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 50), st.floats(1e-4, 0.4))
def test_limits_are_where_what_was_won_is_as_rare_as_the_doubt(won: int, more: int, doubt: float) -> None:
    tries = won + more
    low, high = scores.limits(won, tries, doubt)
    assert 0 <= low <= won / tries <= high <= 1
    assert binom.cdf(won, tries, high) == pytest.approx(doubt, rel=1e-3)
    assert low == 0 if won == 0 else binom.sf(won - 1, tries, low) == pytest.approx(doubt, rel=1e-3)


def test_games_are_won_by_the_right_guess_alone() -> None:
    assert scores.games_won(torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2, 2, 0])) == 2


# Levels.


def level(guess: Tensor, truth: Tensor) -> list[str]:
    labels = torch.zeros(len(truth), dtype=torch.long)
    return score(guess, labels, truth, labels)["levels"]


def test_a_face_at_28_decibels_is_recognisable_and_the_same_to_the_byte_is_identical(photographs: Tensor) -> None:
    face = photographs[:1]
    spoiled = (face + 0.09 * (noise(*face.shape) - 0.5) * 1.6).clamp(0, 1)
    result = score(spoiled, torch.tensor([0]), face, torch.tensor([0]))
    assert result["psnr"] is not None
    assert 27 < result["psnr"] < RECOGNISED
    assert (result["recovered"], result["recognisable"], result["identical"]) == (0.0, 1.0, 0.0)
    assert level(face, face) == ["identical"]
    assert level((face * 255).round() / 255, face) == ["identical"]


RECOGNISED = scores.IDENTICAL_PSNR


def test_what_is_made_without_the_leak_is_nothing(photographs: Tensor) -> None:
    dataset = open_dataset("photos", Path("nowhere"))
    public = dataset.auxiliary.batch(slice(None))[0]
    smooth = (0.5 + 0.02 * noise(1, 3, 32, 32)).expand(2, -1, -1, -1)  # a sky: any constant is at 40 dB
    for truth in (photographs, smooth, smooth.mean(1, keepdim=True), smooth[..., :20, :20], smooth[..., :5, :5]):
        for guess in (
            truth.mean((2, 3), keepdim=True).expand_as(truth),
            truth.mean((1, 2, 3), keepdim=True).expand_as(truth),
            torch.full_like(truth, 0.5),
            torch.full_like(truth, float("nan")),
        ):
            assert set(level(guess, truth)) == {"nothing"}
    for guess in (scores.blind(public), scores.training_mean(public)):
        assert set(level(guess.expand_as(photographs), photographs)) == {"nothing"}


def test_an_image_beside_the_wrong_member_of_its_batch_is_nothing(photographs: Tensor) -> None:
    truth, guess = photographs, photographs.roll(1, dims=0)
    found = scores.levels(guess, truth, scores.mse(guess, truth), scores.ssim(guess, truth), scores.lpips(guess, truth))
    assert not found.any()


def test_half_a_batch_is_half_a_success_and_not_a_mean_of_decibels(photographs: Tensor) -> None:
    truth = photographs[:4]
    guess = torch.cat([truth[:2], torch.full_like(truth[2:], 0.5)])
    result = score(guess, torch.arange(4), truth, torch.arange(4))
    assert result["levels"] == ["identical", "identical", "nothing", "nothing"]
    assert (result["recognisable"], result["identical"]) == (0.5, 0.5)
    assert result["psnr_images"] is not None
    assert result["psnr_images"][:2] == [PSNR_CAP, PSNR_CAP]
    assert max(result["psnr_images"][2:]) < 15
    assert result["mse"] is not None
    assert float(scores.psnr(torch.tensor(result["mse"]))) < 18 < 50 < result["psnr"]  # type: ignore[operator]


def test_images_too_small_for_lpips_and_ssim_have_levels_too() -> None:
    for side in (30, 5):
        truth = noise(2, 3, side, side)
        assert level(truth, truth) == ["identical", "identical"]
        assert level(truth + 0.3 * (noise(2, 3, side, side, seed=1) - 0.5), truth) == ["recognisable"] * 2
        assert level(noise(2, 3, side, side, seed=2), truth) == ["nothing", "nothing"]


def test_a_negative_is_no_picture(photographs: Tensor) -> None:
    assert float(scores.correlation(1 - photographs, photographs).max()) == pytest.approx(-1)
    assert set(level(1 - photographs[:1], photographs[:1])) == {"nothing"}
    assert float(scores.correlation(photographs * 0.3, photographs).min()) == pytest.approx(1)


SCORES = st.lists(st.sampled_from([-2.0, 0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(members=SCORES, others=SCORES)
def test_auc_is_the_share_of_pairs(members: list[float], others: list[float]) -> None:
    pairs = [1.0 if one > other else 0.5 * (one == other) for one in members for other in others]
    assert scores.auc(torch.tensor(members), torch.tensor(others)) == pytest.approx(sum(pairs) / len(pairs))


@settings(max_examples=60, deadline=None)
@given(members=SCORES, others=SCORES, rate=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.9]))
def test_true_positives_are_the_most_at_that_rate(members: list[float], others: list[float], rate: float) -> None:
    best = 0.0
    for threshold in [*others, *members]:
        if sum(one > threshold for one in others) <= rate * len(others):
            best = max(best, sum(one > threshold for one in members) / len(members))
    assert scores.true_positives(torch.tensor(members), torch.tensor(others), rate) == pytest.approx(best)
