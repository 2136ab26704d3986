"""How much of the private data came back: pure functions of (reconstruction, truth), and blind guesses as baselines.

Pixels are in [0, 1]; reconstructions are clamped first. The images of a batch have no order, so they are matched to
the true ones before they are scored.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.stats import beta, binom, rankdata, spearmanr
from torch import Tensor

from fedtap.simulator.errors import FedtapError

RECOVERED_DB = 30.0
"""A PSNR from which a row's column `recovered` counts an image; levels say more."""

LEVELS = ("nothing", "recognisable", "identical")
"""What an image's scores say of it, from the least to the most."""

RECOGNISABLE_LPIPS, RECOGNISABLE_SSIM, RECOGNISABLE_PSNR = 0.08, 0.6, 17.0
"""An image is recognisable up to this LPIPS; where LPIPS has no value, from this SSIM; where neither has, from this
PSNR in dB. `python -m fedtap.scenarios.bench.levels` chose them on training images by an identification test, and says
how often they agree with it."""

LEAST_SSIM, LEAST_CORRELATION = 0.35, 0.5
"""Least SSIM and correlation of a recognisable image, whatever its LPIPS: two pictures of the same kind may be near
in LPIPS and not in SSIM, and an image of one colour, near in all other scores to a picture of almost one colour, has no
correlation with it."""

IDENTICAL_PSNR, IDENTICAL_SSIM = 30.0, 0.95
"""A recognisable image is identical from this PSNR in dB and this SSIM, where that has a value: closer than a JPEG copy
(`python -m fedtap.scenarios.bench.levels` says at which quality)."""

FAINT = 0.1
"""Weight, in examples, below which a pseudo-point stands for none."""

PSNR_CAP = 100.0
"""PSNR of images that are the same, or nearly so (MSE <= 1e-10): a finite number, for files and medians."""

SSIM_PIXELS = 7
"""Shortest side that SSIM's 7 x 7 window fits into."""

LPIPS_PIXELS = 31
"""Shortest side that AlexNet's poolings leave a pixel of."""

LPIPS_AT_ONCE = 64
"""Images in one pass through AlexNet, to bound its memory."""

LEVELLED = (
    f"Recognisable: LPIPS at most {RECOGNISABLE_LPIPS:g}, SSIM from {LEAST_SSIM:g} and correlation with the original "
    f"from {LEAST_CORRELATION:g} (where LPIPS has no value, SSIM from {RECOGNISABLE_SSIM:g}; where neither has, PSNR "
    f"from {RECOGNISABLE_PSNR:g} dB); identical: also PSNR from {IDENTICAL_PSNR:g} dB and SSIM from {IDENTICAL_SSIM:g}"
)
"""The levels in words."""

Image = Float[Tensor, "channel height width"]
ImageBatch = Float[Tensor, "batch channel height width"]


class Score(TypedDict):
    """One victim's scores: means over its batch. None where a score has no value; the notes say why."""

    mse: float | None
    psnr: float | None
    """Decibels, at most PSNR_CAP; the mean of the images' own, so of a batch a mean of capped logarithms: to say how
    well it came back, read `levels`, `psnr_images`, or the PSNR of the mean error, ``-10 log10(mse)``."""
    ssim: float | None
    lpips: float | None
    """Perceptual distance, from 0 for equal images."""
    label_correct: float
    """Share of the batch's labels found, repeats counted: a batch has no order."""
    recovered: float
    """Share of images with at least RECOVERED_DB."""
    psnr_images: list[float] | None
    """Decibels of each image, in the truth's order, to two digits."""
    levels: list[str]
    """Of each image, one of LEVELS."""
    recognisable: float
    """Share of images that are recognisable at least."""
    identical: float
    """Share of images that are identical."""
    matching: list[int]
    """For each true image, the number of the reconstructed image that was matched to it."""
    ssim_note: str | None
    lpips_note: str | None


def mse(reconstruction: ImageBatch, truth: ImageBatch) -> Float[Tensor, " batch"]:
    """Mean squared error of each image."""
    return (reconstruction.double().clamp(0, 1) - truth.double()).square().flatten(1).mean(1)


def psnr(mse: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Peak signal-to-noise ratio in decibels, 10 log10(1 / mse), at most PSNR_CAP."""
    return -10 * mse.clamp(min=10 ** (-PSNR_CAP / 10)).log10()


def ssim(reconstruction: ImageBatch, truth: ImageBatch) -> Float[Tensor, " batch"]:
    """Structural similarity of each image, by scikit-image: a uniform 7 x 7 window, mean over channels.

    Raises:
        FedtapError: the images are smaller than the window.
    """
    from skimage.metrics import structural_similarity

    if min(truth.shape[-2:]) < SSIM_PIXELS:
        raise FedtapError(f"SSIM needs {SSIM_PIXELS} pixels a side and these have {_size(truth)}: use larger images.")
    pairs = zip(reconstruction.double().clamp(0, 1).numpy(), truth.double().numpy(), strict=True)
    return torch.tensor([structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs])  # type: ignore[no-untyped-call]


def lpips(reconstruction: ImageBatch, truth: ImageBatch, device: torch.device | str = "cpu") -> Float[Tensor, " batch"]:
    """Learned perceptual distance (alex, v0.1) of each image at its own size. Grey images are shown as grey in colour.

    Args:
        device: where AlexNet runs.

    Raises:
        FedtapError: the images are too small for AlexNet, or its weights cannot be loaded.
    """
    from fedtap.simulator.data.vision import lpips_alex

    if min(truth.shape[-2:]) < LPIPS_PIXELS:
        raise FedtapError(f"LPIPS needs {LPIPS_PIXELS} pixels a side and these have {_size(truth)}: use larger images.")
    if truth.shape[1] not in (1, 3):
        raise FedtapError(f"LPIPS sees colour or grey images and these have {truth.shape[1]} channels: read the SSIM.")
    network = lpips_alex().to(device)
    sides = (
        torch.split(images.float().clamp(0, 1).expand(-1, 3, -1, -1), LPIPS_AT_ONCE)
        for images in (reconstruction, truth)
    )
    with torch.no_grad():
        found = [
            network(one.to(device), other.to(device), normalize=True).flatten()
            for one, other in zip(*sides, strict=True)
        ]
    return torch.cat(found).cpu()


def correlation(reconstruction: ImageBatch, truth: ImageBatch) -> Float[Tensor, " batch"]:
    """Pearson's, over each image's pixels about their channel's mean, in [-1, 1]; 0 where one side has no contrast."""
    one, other = (
        (images.double() - images.double().mean((2, 3), keepdim=True)).flatten(1)
        for images in (reconstruction.clamp(0, 1), truth)
    )
    sizes = one.norm(dim=1) * other.norm(dim=1)
    faint = sizes < 1e-6 * one.shape[1]  # a thousandth of the pixels' range on both sides: rounding, and no picture
    return torch.where(faint, 0.0, (one * other).sum(1) / sizes.clamp_min(1e-30))


def levels(
    reconstruction: ImageBatch, truth: ImageBatch, errors: Tensor, ssim: Tensor | None, lpips: Tensor | None
) -> Int[Tensor, " batch"]:
    """Of each image its place in LEVELS, from its scores; `ssim` and `lpips` are None where they have no value."""
    decibels = psnr(errors)
    if lpips is not None:
        known = lpips.double() <= RECOGNISABLE_LPIPS
    else:
        known = decibels >= RECOGNISABLE_PSNR if ssim is None else ssim >= RECOGNISABLE_SSIM
    known = known & (correlation(reconstruction, truth) >= LEAST_CORRELATION)
    same = decibels >= IDENTICAL_PSNR
    if ssim is not None:
        known, same = known & (ssim >= LEAST_SSIM), same & (ssim >= IDENTICAL_SSIM)
    same = known & same
    return known.long() + same.long()


def match(reconstruction: ImageBatch, truth: ImageBatch) -> Int[Tensor, " batch"]:
    """For each true image the reconstructed image matched to it: the pairing of least total squared error."""
    one, other = reconstruction.double().clamp(0, 1).flatten(1), truth.double().flatten(1)
    costs = torch.stack([(one - image).square().sum(1) for image in other])  # truth guess
    return torch.from_numpy(linear_sum_assignment(costs.numpy())[1])


def label_correct(reconstruction: Int[Tensor, " batch"], truth: Int[Tensor, " batch"]) -> float:
    """Share of the true labels that were found, counted with multiplicity and in any order."""
    classes = int(max(reconstruction.max(), truth.max())) + 1
    counts = (torch.bincount(labels[labels >= 0], minlength=classes) for labels in (reconstruction, truth))
    return int(torch.minimum(*counts).sum()) / len(truth)


def games_won(reconstruction: Int[Tensor, " games"], truth: Int[Tensor, " games"]) -> int:
    """How many guesses among a few candidates are right."""
    return int((reconstruction == truth).sum())


def limits(won: int, tries: int, doubt: float) -> tuple[float, float]:
    """Clopper and Pearson's limits of the probability of winning; each limit fails with probability `doubt` at most.

    Clopper and Pearson, Biometrika 1934, https://doi.org/10.1093/biomet/26.4.404.

    Args:
        doubt: in (0, 1).
    """
    return lower_limit(won, tries, doubt), 1 - lower_limit(tries - won, tries, doubt)


def lower_limit(won: int, tries: int, doubt: float) -> float:
    """The lower of `limits`, alone."""
    return float(beta.ppf(doubt, won, tries - won + 1)) if won else 0.0


def median_interval(values: Sequence[float], doubt: float = 0.05) -> tuple[float, float]:
    """Order statistics between which the median lies, but for `doubt`; of few values the least and the largest.

    Of n independent values the number below the median is binomial (n, 1/2), whatever their distribution is.
    """
    ordered = sorted(values)
    rank = int(binom.ppf(doubt / 2, len(ordered), 0.5))  # P(rank or fewer below) is above doubt / 2: exclude one less
    first = min(max(rank - 1, 0), (len(ordered) - 1) // 2)
    return ordered[first], ordered[-1 - first]


def relative_error(
    reconstruction: Float[Tensor, "victims *shape"], truth: Float[Tensor, "victims *shape"]
) -> Float[Tensor, " victims"]:
    """``|reconstruction - truth| / |truth|`` of each victim."""
    return (reconstruction.double() - truth.double()).flatten(1).norm(dim=1) / truth.double().flatten(1).norm(dim=1)  # type: ignore[no-any-return]


def score(
    reconstructed_images: ImageBatch,
    reconstructed_labels: Int[Tensor, " batch"],
    true_images: ImageBatch,
    true_labels: Int[Tensor, " batch"],
) -> Score:
    """The scores of one victim."""
    return score_all(reconstructed_images[None], reconstructed_labels[None], true_images[None], true_labels[None])[0]


def score_all(
    reconstructed_images: Float[Tensor, "victims batch channel height width"],
    reconstructed_labels: Int[Tensor, "victims batch"],
    true_images: Float[Tensor, "victims batch channel height width"],
    true_labels: Int[Tensor, "victims batch"],
    device: torch.device | str = "cpu",
) -> list[Score]:
    """The scores of each victim.

    A reconstruction with NaN or infinity has recovered nothing: its distances are None, and its recovery rate is 0.

    Args:
        device: where LPIPS is computed.
    """
    reconstructed_images, true_images = reconstructed_images.detach().cpu(), true_images.detach().cpu()
    reconstructed_labels, true_labels = reconstructed_labels.detach().cpu(), true_labels.detach().cpu()
    sound = reconstructed_images.flatten(1).isfinite().all(1)
    usable = torch.where(sound.view(-1, 1, 1, 1, 1), reconstructed_images, 0.5)
    matchings = torch.stack([match(*pair) for pair in zip(usable, true_images, strict=True)])
    matched = torch.stack([images[order] for images, order in zip(usable, matchings, strict=True)])

    reconstruction, truth, victims = matched.flatten(0, 1), true_images.flatten(0, 1), len(true_images)
    errors = mse(reconstruction, truth)
    decibels = psnr(errors).view(victims, -1)
    columns: dict[str, Tensor | None] = {"mse": errors, "psnr": decibels}
    notes: dict[str, str | None] = {}
    for name, measure in (("ssim", ssim), ("lpips", partial(lpips, device=device))):
        try:
            columns[name], notes[name] = measure(reconstruction, truth), None
        except FedtapError as reason:
            columns[name], notes[name] = None, str(reason)

    found = levels(reconstruction, truth, errors, columns["ssim"], columns["lpips"])
    names = [[LEVELS[level] for level in some] for some in found.view(victims, -1).tolist()]

    def mean(column: str, victim: int) -> float | None:
        values = columns[column]
        return float(values.view(victims, -1)[victim].mean()) if values is not None and sound[victim] else None

    strange = "The reconstruction holds NaN or infinity, so it has no distance to the truth."
    return [
        Score(
            mse=mean("mse", victim),
            psnr=mean("psnr", victim),
            ssim=mean("ssim", victim),
            lpips=mean("lpips", victim),
            label_correct=label_correct(reconstructed_labels[victim], true_labels[victim]),
            recovered=float((decibels[victim] >= RECOVERED_DB).double().mean()) if sound[victim] else 0.0,
            psnr_images=[round(value, 2) for value in decibels[victim].tolist()] if sound[victim] else None,
            levels=names[victim] if sound[victim] else [LEVELS[0]] * len(names[victim]),
            recognisable=float((found.view(victims, -1)[victim] >= 1).double().mean()) if sound[victim] else 0.0,
            identical=float((found.view(victims, -1)[victim] == 2).double().mean()) if sound[victim] else 0.0,
            matching=matchings[victim].tolist(),
            ssim_note=notes["ssim"] if sound[victim] else strange,
            lpips_note=notes["lpips"] if sound[victim] else strange,
        )
        for victim in range(victims)
    ]


def matched_distances(
    points: Float[Tensor, "points features"],
    weights: Float[Tensor, "points"],
    truth: Float[Tensor, "examples features"],
) -> Float[Tensor, "examples"]:
    """Relative distance ``|z - x| / |x|`` of each true example to the point that is matched to it.

    Points and examples are paired so that the distances sum to the least; points of weight below FAINT, which stand for
    no example, are left out, and an example without a point is at distance 1, that of the origin, at most.
    """
    points = points[(weights >= FAINT) & points.isfinite().all(1)]
    distance = torch.cdist(truth, points) / truth.norm(dim=1, keepdim=True).clamp_min(1e-300)
    apart = torch.ones(len(truth), dtype=truth.dtype)
    row, column = map(torch.from_numpy, linear_sum_assignment(distance.clamp_max(1.0).numpy()))
    apart[row] = distance[row, column].clamp_max(1.0)
    return apart


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation in [-1, 1]; NaN where one side is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant sides
        return float(spearmanr(one, other).statistic)


def auc(members: Float[Tensor, "members"], others: Float[Tensor, "others"]) -> float:
    """Share of pairs of a member and another in which the member scores higher, a tie for half; 0.5 is chance."""
    ranks = rankdata(torch.cat([members, others]).double().numpy())
    most = len(members) * len(others)
    return float((ranks[: len(members)].sum() - len(members) * (len(members) + 1) / 2) / most)


def true_positives(members: Float[Tensor, "members"], others: Float[Tensor, "others"], rate: float) -> float:
    """Share of members that score higher than all but a share of the others: the true positive rate at `rate` false."""
    allowed = min(math.floor(rate * len(others)), len(others) - 1)
    threshold = others.sort(descending=True).values[allowed]
    return float((members > threshold).double().mean())


def best_constant(auxiliary: ImageBatch) -> Image:
    """The image of one colour with the least expected squared error: each channel's mean."""
    return auxiliary.mean(dim=(0, 2, 3)).view(-1, 1, 1).expand(auxiliary.shape[1:]).clone()


def training_mean(auxiliary: ImageBatch) -> Image:
    """The mean image."""
    return auxiliary.mean(dim=0)


def blind(auxiliary: ImageBatch) -> Image:
    """The blind guess: the better of `training_mean` and `best_constant`, chosen without any leak.

    The auxiliary images alone decide: every other one makes both baselines, and the rest compare them.
    """
    makers, judges = auxiliary[::2], auxiliary[1::2] if len(auxiliary) > 1 else auxiliary
    baselines = (training_mean, best_constant)
    misses = [float(mse(baseline(makers).expand_as(judges), judges).mean()) for baseline in baselines]
    return baselines[int(np.argmin(misses))](auxiliary)


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[-2:]))


Texts = Int[Tensor, "batch tokens"]


class TextScore(TypedDict):
    """One victim's scores: means over its batch's texts, all in [0, 1]."""

    exact_tokens: float
    """Share of places at which the token is right."""
    exact_texts: float
    """Share of texts of which all tokens are right."""
    rouge1: float
    rouge2: float
    rouge_l: float
    """F1, over tokens."""
    matching: list[int]
    """For each true text, the number of the reconstructed text that was matched to it."""


def match_texts(reconstruction: Texts, truth: Texts) -> Int[Tensor, " batch"]:
    """For each true text the reconstructed text matched to it: the pairing with the most tokens right."""
    right = (reconstruction[None] == truth[:, None]).sum(2)  # truth guess
    return torch.from_numpy(linear_sum_assignment(right.numpy(), maximize=True)[1])


def score_texts(reconstruction: Texts, truth: Texts) -> TextScore:
    """The scores of one victim."""
    matching = match_texts(reconstruction, truth)
    right = reconstruction[matching] == truth
    pairs = list(zip(reconstruction[matching].tolist(), truth.tolist(), strict=True))
    return TextScore(
        exact_tokens=float(right.double().mean()),
        exact_texts=float(right.all(1).double().mean()),
        rouge1=float(np.mean([rouge_n(*pair, 1) for pair in pairs])),
        rouge2=float(np.mean([rouge_n(*pair, 2) for pair in pairs])),
        rouge_l=float(np.mean([rouge_l(*pair) for pair in pairs])),
        matching=matching.tolist(),
    )


def rouge_n(reconstruction: Sequence[int], truth: Sequence[int], n: int) -> float:
    """F1 of the runs of n tokens that both have, each as often as both have it.

    Lin 2004, https://aclanthology.org/W04-1013.
    """
    runs = [Counter(zip(*(text[start:] for start in range(n)), strict=False)) for text in (reconstruction, truth)]
    return _f1((runs[0] & runs[1]).total(), runs[0].total(), runs[1].total())


def rouge_l(reconstruction: Sequence[int], truth: Sequence[int]) -> float:
    """F1 of the longest common subsequence of tokens (Lin 2004)."""
    above = [0] * (len(truth) + 1)
    for token in reconstruction:
        row = [0]
        for place, other in enumerate(truth):
            row.append(above[place] + 1 if token == other else max(above[place + 1], row[-1]))
        above = row
    return _f1(above[-1], len(reconstruction), len(truth))


def _f1(common: int, one: int, other: int) -> float:
    return 2 * common / (one + other) if one + other else 0.0


def blind_text(auxiliary: Int[Tensor, "texts tokens"]) -> Int[Tensor, " tokens"]:
    """The blind guess: at each place the token that most auxiliary texts have there."""
    return auxiliary.mode(0).values
