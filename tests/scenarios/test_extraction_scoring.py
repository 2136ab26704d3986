"""How extracted images are scored: planted features against plain loops, and images of everybody that do not mix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fedtap.scenarios.checkpoints.extraction_report import SHOWN_IMAGES, beside, extraction_charts, extraction_sentences
from fedtap.scenarios.checkpoints.extraction_scoring import compared, highest, identified_share
from fedtap.scenarios.checkpoints.subjects import MIXED, OTHERS_KEPT, Subjects, pretraining_images, subjects
from fedtap.simulator.data.images import photos
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.copy_detection import BASELINE, encoder
from fedtap.simulator.scenario import Row

WIDTH = 12


def features(many: int, seed: int, width: int = WIDTH) -> Tensor:
    """Of norm 1, as an encoder gives them."""
    drawn = torch.randn(many, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn.double()).float()


def axes(*which: int) -> Tensor:
    """Features that are orthogonal to those of other numbers."""
    return torch.eye(WIDTH)[list(which)]


# Scores.


def test_scores_of_planted_features() -> None:
    private, held_out, others = axes(0, 1), axes(2, 3), axes(4, 5)
    half = F.normalize(axes(0) + axes(2))  # as near to a private image as to a held-out one, at cosine 0.71
    found = compared(torch.cat([axes(0), half]), private, held_out, others, tau=0.6)
    assert found == {
        "similarity_training": pytest.approx(0.5),  # 1 of the first, 0 of the second
        "similarity_held_out": pytest.approx(0.5**0.5 / 2),
        "similarity_others": 0.0,
        "gap": pytest.approx(0.5 - 0.5**0.5 / 2),
        "extracted": 0.5,
    }
    assert compared(half, private, held_out, others, tau=0.7)["extracted"] == 0.5
    assert compared(half, private, held_out, others, tau=0.72)["extracted"] == 0.0
    assert identified_share(torch.cat([axes(0), axes(2), half, axes(1)]), private, torch.cat([held_out, others])) == 0.5


def test_nearest_is_the_largest_cosine() -> None:
    one, among = features(5, 0), features(7, 1)
    wanted = [max(float(F.cosine_similarity(a, b, 0)) for b in among) for a in one]
    assert highest(one, among).tolist() == pytest.approx(wanted, abs=1e-6)


SIZES = st.integers(1, 6)


@given(private=SIZES, held_out=SIZES, others=SIZES, extracted=SIZES, seed=st.integers(0, 10**6), tau=st.floats(0, 1))
def test_scores_are_those_of_plain_loops(
    private: int, held_out: int, others: int, extracted: int, seed: int, tau: float
) -> None:
    sides = [features(many, seed + at) for at, many in enumerate((private, held_out, others))]
    drawn = features(extracted, seed + 3)
    found = compared(drawn, *sides, tau)
    best = [[max(float(one @ other) for other in drawn) for one in side] for side in sides]
    means = [sum(side) / len(side) for side in best]
    names = ("similarity_training", "similarity_held_out", "similarity_others")
    assert [found[name] for name in names] == pytest.approx(means, abs=1e-5)
    assert found["gap"] == pytest.approx(means[0] - means[1], abs=1e-5)
    if min(abs(one - tau) for one in best[0]) > 1e-5:
        assert found["extracted"] == pytest.approx(sum(one >= tau for one in best[0]) / private)
    rest = torch.cat(sides[1:])
    wanted = [max(float(s @ p) for p in sides[0]) > max(float(s @ r) for r in rest) for s in drawn]
    assert identified_share(drawn, sides[0], rest) == pytest.approx(sum(wanted) / extracted)


@given(private=SIZES, rest=SIZES, seed=st.integers(0, 10**6))
def test_private_images_are_identified_and_held_out_ones_are_not(private: int, rest: int, seed: int) -> None:
    ours, away = features(private, seed), features(rest, seed + 1)
    assert identified_share(ours, ours, away) == 1
    assert identified_share(away, ours, away) == 0
    assert identified_share(torch.cat([ours, away]), ours, away) == pytest.approx(private / (private + rest))
    assert identified_share(ours, ours, torch.cat([ours, away])) == 0  # what is both is not told apart


@given(many=SIZES, extracted=SIZES, seed=st.integers(0, 10**6))
def test_there_is_no_gap_where_private_images_are_held_out_too(many: int, extracted: int, seed: int) -> None:
    ours, drawn = features(many, seed), features(extracted, seed + 1)
    assert compared(drawn, ours, ours, features(2, seed + 2), 0.5)["gap"] == 0
    assert compared(drawn, ours, ours.flip(0), features(2, seed + 2), 0.5)["gap"] == pytest.approx(0, abs=1e-6)


@given(private=SIZES, seed=st.integers(0, 10**6))
def test_what_is_extracted_whole_scores_1(private: int, seed: int) -> None:
    ours, away = features(private, seed), features(3, seed + 1)
    found = compared(ours, ours, away, away, 0.999)
    assert found["similarity_training"] == pytest.approx(1, abs=1e-5)
    assert found["extracted"] == 1
    assert found["gap"] >= 0
    more = compared(torch.cat([ours[:1], away]), ours, away, away, 0.999)
    assert compared(ours[:1], ours, away, away, 0.999)["similarity_training"] <= more["similarity_training"] + 1e-6


# Who holds which images.


def flat(images: Tensor) -> set[bytes]:
    return {(255 * image).round().byte().numpy().tobytes() for image in images}


def check_apart(found: Subjects) -> None:
    """No image is on two sides."""
    private = [flat(images) for images in found.private.values()]
    assert sum(map(len, private)) == len(set.union(*private))
    for held_out in found.held_out.values():
        assert len(held_out) > 0
        assert not flat(held_out) & set.union(*private)
    assert len(found.others) > 0
    assert not flat(found.others) & set.union(*private)
    for images in (*found.private.values(), *found.held_out.values(), found.others):
        assert images.shape[1:] == (3, 16, 16)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1


def test_each_client_has_its_own_class(tmp_path: Path) -> None:
    data = photos(16)
    found = subjects(tmp_path, "photos", 16, 3, data.classes[6], 3, 3)
    assert list(found.named.values()) == [data.classes[6], data.classes[7], data.classes[0]]  # they take turns
    check_apart(found)
    for client, name in found.named.items():
        own = data.classes.index(name)
        everywhere = [side.images[side.labels == own] for side in (data.target, data.train, data.auxiliary)]
        assert flat(torch.cat([found.private[client], found.held_out[client]])) == flat(torch.cat(everywhere) / 255)
        assert not flat(found.others) & flat(torch.cat(everywhere) / 255)
    assert len(found.others) == OTHERS_KEPT
    again = subjects.__wrapped__(tmp_path, "photos", 16, 3, data.classes[6], 3, 3)
    assert torch.equal(again.others, found.others)


@pytest.mark.parametrize("clients", [1, 3])
def test_mixed_clients_have_images_of_several_classes(clients: int, tmp_path: Path) -> None:
    data = photos(16)
    found = subjects(tmp_path, "photos", 16, 3, "", 4, clients)
    assert set(found.named.values()) == {MIXED}
    check_apart(found)
    for client, images in found.private.items():
        block = slice(4 * client, 4 * client + 4)
        assert torch.equal(images, data.target.images[block].float() / 255)
        away = [(side.images, side.labels) for side in (data.train, data.auxiliary)]
        of = torch.cat([images[torch.isin(labels, data.target.labels[block])] for images, labels in away])
        assert flat(found.held_out[client]) <= flat(of / 255)


def test_where_clients_hold_all_classes_others_are_not_private(tmp_path: Path) -> None:
    check_apart(subjects(tmp_path, "photos", 16, 3, photos(16).classes[0], 2, 8))
    check_apart(subjects(tmp_path, "photos", 16, 3, MIXED, 8, 2))


def grey(path: Path, channels: int = 1, side: int = 16) -> str:
    """An .npz of two classes."""
    draw = np.random.default_rng(0)
    shape = (24, side, side, channels) if channels > 1 else (24, side, side)
    images = {f"x_{name}": draw.integers(0, 256, shape, dtype=np.uint8) for name in ("train", "test")}
    np.savez(path, **images, y_train=np.arange(24) % 2, y_test=np.arange(24) % 2)
    return str(path)


NONE: dict[str, tuple[tuple[str, int, str, int, int], str]] = {
    "no such class": (("photos", 3, "spaceship", 2, 1), "no class"),
    "a class misspelt": (("photos", 3, "cofee", 2, 1), "did you mean coffee"),
    "more clients than classes": (("photos", 3, "coffee", 2, 9), "has 8 classes, and 9 clients have one each"),
    "too few images": (("photos", 3, "coffee", 200, 1), "at least one that is held out are needed: lower --private"),
    "too few target images": (("photos", 3, MIXED, 100, 9), "and 9 clients have 100 each: lower --private"),
    "no such dataset": (("fotos", 3, "", 2, 1), "did you mean photos"),
    "grey images": (("grey.npz", 3, "", 2, 1), "are 1x16x16, and the diffusion model draws 3x16x16: give a folder"),
    "colours for a grey model": (("photos", 1, "", 2, 1), "are 3x16x16, and the diffusion model draws 1x16x16"),
    "of another size": (("large.npz", 3, "", 2, 1), "are 3x20x20, and the diffusion model draws 3x16x16"),
}  # fmt: skip


@pytest.mark.parametrize("case", NONE)
def test_images_that_do_not_do_are_one_sentence(case: str, tmp_path: Path) -> None:
    (name, channels, first, private, clients), said = NONE[case]
    grey(tmp_path / "grey.npz")
    grey(tmp_path / "large.npz", 3, 20)
    with pytest.raises(FedtapError) as raised:
        subjects(tmp_path, name, 16, channels, first, private, clients)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 400


def test_what_a_model_was_trained_on_before_is_read(tmp_path: Path) -> None:
    data = photos(16)
    assert pretraining_images(tmp_path, "", 16).shape == (0, 3, 16, 16)
    found = pretraining_images(tmp_path, "photos", 16)
    assert len(found) == len(data.auxiliary) + len(data.train)
    assert not flat(found) & flat(data.target.images.float() / 255)
    assert len(pretraining_images(tmp_path, "photos, photos", 16)) == 2 * len(found)
    with pytest.raises(FedtapError, match="did you mean photos"):
        pretraining_images(tmp_path, "photo", 16)


@pytest.mark.parametrize(("channels", "side"), [(1, 16), (3, 20)])
def test_images_of_another_shape_cannot_be_those_of_the_pretraining(channels: int, side: int, tmp_path: Path) -> None:
    grey(tmp_path / "other.npz", channels, side)
    with pytest.raises(FedtapError, match=r"other\.npz"):
        pretraining_images(tmp_path, "photos,other.npz", 16)


# What the page says.


def row(attack: str, share: float, **more: object) -> Row:
    return {"attack": attack, "identified": share, "extracted": 0.5, "gap": 0.1, "gap_samples": 0.2, "w": None} | more


def test_the_answer_is_how_much_came_back() -> None:
    found = extraction_sentences([row("direct_sampling", 0.4), row("finextract", 0.9)], ())
    assert len(found) == 1
    assert found[0].startswith("Images of the clients were extracted: of those that finextract draws, 90% are nearer")
    assert "50% of the private images have an extracted one" in found[0]
    assert "direct_sampling 40%" in found[0]
    (none,) = extraction_sentences([row("finextract", 0.1, extracted=0.0)], ())
    assert none.startswith("No image of the clients was extracted")
    (alike,) = extraction_sentences([row("finextract", 0.1, gap=-0.1)], ())  # as much of what nobody tuned on
    assert alike.startswith("No image of the clients was extracted")
    assert extraction_sentences([{"error": "a client failed", "attack": "finextract"}], ()) == []
    rows = [row("finextract", 0.9, private=4), row("finextract", 0.2, private=8, extracted=0.0)]
    swept = extraction_sentences(rows, ["private"])
    assert [text.partition(":")[0] for text in swept] == ["private 4", "private 8"]
    assert "No image" in swept[1]


def test_scores_are_drawn_against_what_is_swept() -> None:
    rows = [row(attack, 0.5, rank=rank) for attack in ("finextract", "guided_sampling") for rank in (2, 8)]
    found = extraction_charts(rows, ["rank"])
    assert list(found) == ["Against rank"]
    assert "<svg" in found["Against rank"]
    assert "guided_sampling" in found["Against rank"]
    assert extraction_charts(rows, []) == {}
    against = extraction_charts([row(f"finextract(w={w})", 0.5, w=w) for w in (1.0, 3.0, 5.0)], [])
    assert list(against) == ["Against w"]
    words = extraction_charts(
        [row("finextract", 0.5, countermeasure=name) for name in ("none", "noise")], ["countermeasure"]
    )
    assert "noise" in words["Against countermeasure"]
    lost = [row("finextract", 0.5, rank=2), {"attack": "finextract", "rank": 8, "w": None}]  # a failed client's
    assert "<svg" in extraction_charts(lost, ["rank"])["Against rank"]


def test_extracted_images_stand_beside_the_nearest_ones() -> None:
    images = torch.rand(SHOWN_IMAGES + 2, 3, 8, 8)
    alike = torch.linspace(0, 1, SHOWN_IMAGES + 2)
    text = beside(images, images, alike, images, alike / 2)
    for name in ("extracted", "nearest private image", "nearest held-out image"):
        assert text.count(f"<td>{name}</td>") == 1
    assert text.count("<img") == 3 * SHOWN_IMAGES
    assert "0.11" in text
    assert "0.06" in text


@pytest.mark.parametrize("blank", [torch.zeros, lambda *size: torch.full(size, 0.5)])
def test_a_constant_image_is_like_none(blank: Callable[..., Tensor]) -> None:
    encode = encoder(BASELINE)
    ours, away = encode(torch.rand(2, 3, 8, 8)), encode(torch.rand(3, 3, 8, 8))
    nothing = encode(blank(2, 3, 8, 8))
    assert identified_share(nothing, ours, away) == 0
    assert compared(nothing, ours, away, away, 0.1)["extracted"] == 0
