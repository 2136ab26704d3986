"""Datasets: what is read is what was written, no picture is on two sides, and bad data are refused in words."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import tempfile
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedtap.simulator.data import images as datasets
from fedtap.simulator.data import vision
from fedtap.simulator.data.images import PHOTOGRAPHS, SIDES, Dataset, Side, open_dataset, partition
from fedtap.simulator.errors import FedtapError

SHADES = {"cat": 40, "dog": 140}


@pytest.fixture(scope="module")
def photos() -> Dataset:
    return open_dataset("photos", Path("nowhere"))


def image(shade: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    return Image.new("RGB", size, (shade, 255 - shade, shade // 2))


def folder(path: Path, names: dict[str, int]) -> Path:
    for name, shade in names.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        image(shade).save(path / name)
    return path


def animals(path: Path, each: int = 12) -> Path:
    return folder(path, {f"{name}/{n}.png": shade + n for name, shade in SHADES.items() for n in range(each)})


def zipped(root: Path, target: Path, top: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, f"{top}{file.relative_to(root)}")
    return target


def pixels(side: Side) -> set[bytes]:
    return {image.numpy().tobytes() for image in side.images}


def arrays(train: int = 9, test: int = 2, shape: tuple[int, ...] = (8, 8, 3)) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for part, count in (("train", train), ("test", test)):
        made[f"x_{part}"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"y_{part}"] = np.arange(count) % 3
    return made


def saved(path: Path, **changes: object) -> Path:
    contents = {name: array for name, array in (arrays() | changes).items() if array is not None}
    np.savez(path, **contents)
    return path


# Photographs.


def picture_of(name: str) -> Image.Image:
    return Image.open(files("skimage") / "data" / PHOTOGRAPHS[name].file).convert("RGB")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_sides_of_a_photograph_share_no_pixel(name: str) -> None:
    picture = picture_of(name)
    covered = {}
    for side in SIDES:
        covered[side] = np.zeros((picture.height, picture.width), bool)
        boxes = datasets.windows(PHOTOGRAPHS[name], picture, side)
        assert len(boxes) == len(set(boxes)) >= 20
        for left, top, right, bottom in boxes:
            assert 96 <= right - left == bottom - top <= 256
            assert 0 <= left < right <= picture.width
            assert 0 <= top < bottom <= picture.height
            covered[side][top:bottom, left:right] = True
    for one, other in itertools.combinations(SIDES, 2):
        assert not (covered[one] & covered[other]).any()
        a, b = getattr(PHOTOGRAPHS[name], one), getattr(PHOTOGRAPHS[name], other)
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_no_photograph_shows_what_another_does() -> None:
    assert len({photograph.file for photograph in PHOTOGRAPHS.values()}) == len(PHOTOGRAPHS) == 8
    assert not any("right" in photograph.file for photograph in PHOTOGRAPHS.values())


def test_photos_are_made_of_those_windows(photos: Dataset) -> None:
    name = photos.classes[0]
    box = datasets.windows(PHOTOGRAPHS[name], picture_of(name), "target")[0]
    expected = picture_of(name).crop(box).resize((32, 32), Image.Resampling.LANCZOS)
    assert torch.equal(photos.target.images[0], torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1))


def test_photos_begin_with_eight_different_ones(photos: Dataset) -> None:
    assert photos.shape == (3, 32, 32)
    assert photos.target.labels[:16].tolist() == [*range(8), *range(8)]
    assert len(photos.target) >= 64
    assert min(len(photos.auxiliary), len(photos.train)) >= 300
    for side in (photos.auxiliary, photos.train, photos.target):
        assert set(side.labels.tolist()) == set(range(8))
        assert side.images.float().flatten(1).std(1).min() > 255 * 0.02


def test_photos_are_the_same_each_time_and_of_the_size_asked_for(photos: Dataset) -> None:
    assert torch.equal(open_dataset("photos", Path("nowhere")).train.images, photos.train.images)
    assert open_dataset("photos", Path("nowhere"), size=16).shape == (3, 16, 16)


def test_a_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {"cat": dataclasses.replace(PHOTOGRAPHS["cat"], file="lost.png")}
    monkeypatch.setattr(datasets, "PHOTOGRAPHS", lost)
    datasets.photos.cache_clear()
    with pytest.raises(FedtapError, match=r"lost\.png.*install scikit-image again"):
        open_dataset("photos", Path("nowhere"))


def test_sides_give_pixels_from_0_to_1_and_a_short_repr(photos: Dataset) -> None:
    images, labels = photos.auxiliary.batch(torch.tensor([3, 1]))
    assert images.dtype == torch.float32
    assert torch.equal((images * 255).round().byte(), photos.auxiliary.images[[3, 1]])
    assert torch.equal(labels, photos.auxiliary.labels[[3, 1]])
    assert len(photos.auxiliary.batch(slice(None))[0]) == len(photos.auxiliary)
    assert repr(photos) == "Dataset('photos', classes=8, shape=3x32x32, auxiliary=474, train=474, target=256)"
    assert repr(photos.target) == "Side(256 images)"


# Folders and zips.


def test_a_folder_is_split_in_thirds_that_share_nothing(tmp_path: Path) -> None:
    dataset = open_dataset(str(animals(tmp_path)), Path("nowhere"))
    assert dataset.classes == ("cat", "dog")
    assert dataset.shape == (3, 32, 32)
    sides = [dataset.auxiliary, dataset.train, dataset.target]
    assert [side.labels.tolist() for side in sides] == [[0, 1] * 4] * 3
    assert len(set.union(*map(pixels, sides))) == sum(len(pixels(side)) for side in sides) == 24
    shades = sorted(shade for side in sides for shade in side.images[:, 0, 0, 0].tolist())
    assert shades == [*range(40, 52), *range(140, 152)]


def test_a_zip_reads_like_its_folder_and_leaves_no_file(tmp_path: Path) -> None:
    root = animals(tmp_path / "animals")
    (root / "notes.txt").write_text("no picture")
    (root / "cat" / ".hidden.png").write_bytes(b"no picture")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "0.png").write_bytes(b"no picture")
    plain = open_dataset(str(root), Path("nowhere"), size=8)
    before = set(tmp_path.rglob("*"))
    for archive in (zipped(root, tmp_path / "a.zip"), zipped(root, tmp_path / "b.zip", top="data/set/")):
        dataset = open_dataset(str(archive), Path("nowhere"), size=8)
        assert dataset.classes == plain.classes
        assert torch.equal(dataset.target.images, plain.target.images)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "a.zip", tmp_path / "b.zip"}
    assert open_dataset("a.zip", tmp_path, size=8).name == "a"


def test_a_flat_folder_is_all_victims_with_balanced_pseudo_labels(tmp_path: Path, photos: Dataset) -> None:
    dataset = open_dataset(str(folder(tmp_path / "cats", {f"{n:02}.jpg": 9 * n for n in range(11)})), Path("nowhere"))
    assert dataset.target.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    assert len(dataset.classes) == 8
    assert torch.equal(dataset.auxiliary.images, photos.auxiliary.images)
    assert torch.equal(dataset.train.labels, photos.train.labels)
    assert "cats has no labels" in dataset.note
    assert "all images of cats are target data" in dataset.note.lower()
    assert photos.note == ""


def test_a_labelled_folder_too_small_for_three_sides_is_all_victims(tmp_path: Path) -> None:
    dataset = open_dataset(str(folder(tmp_path / "few", {"a/0.png": 1, "b/0.png": 2})), Path("nowhere"), size=16)
    assert dataset.classes == ("a", "b")
    assert dataset.target.labels.tolist() == [0, 1]
    assert set(dataset.auxiliary.labels.tolist()) == set(dataset.train.labels.tolist()) == {0, 1}
    assert "no labels" not in dataset.note


def test_images_of_one_class_beside_a_test_folder_get_pseudo_labels(tmp_path: Path) -> None:
    names = {f"train/{n}.png": n for n in range(9)} | {f"test/{n}.png": 50 + n for n in range(3)}
    dataset = open_dataset(str(folder(tmp_path / "set", names)), Path("nowhere"), size=8)
    assert dataset.target.labels.tolist() == [0, 1, 2]
    assert (len(dataset.auxiliary), len(dataset.train)) == (5, 4)
    assert "has no labels" in dataset.note


def test_a_grey_folder_keeps_one_channel_and_a_mixed_one_three(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    grey = open_dataset(str(tmp_path), Path("nowhere"), size=8)
    assert grey.shape == (1, 8, 8)
    assert grey.auxiliary.images.shape[1:] == (1, 8, 8)
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "colour.png")
    mixed = open_dataset(str(tmp_path), Path("nowhere"), size=8)
    assert mixed.shape == (3, 8, 8)
    assert mixed.target.images[1, :, 0, 0].tolist() == [40, 40, 40]


def test_sixteen_bits_are_read_and_floats_refused(tmp_path: Path) -> None:
    for number, level in enumerate((0, 32768, 65535)):
        Image.fromarray(np.full((8, 8), level, np.uint16)).save(tmp_path / f"{number}.png")
    dataset = open_dataset(str(tmp_path), Path("nowhere"), size=8)
    assert dataset.target.images[:, 0, 0, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "3.tiff")
    with pytest.raises(FedtapError, match=r"3\.tiff .* is broken \(its pixels are floating point"):
        open_dataset(str(tmp_path), Path("nowhere"))


def test_one_class_is_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, np.int64)
    np.savez(tmp_path / "one.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(FedtapError, match="one class, so the cross-entropy and every gradient are 0"):
        open_dataset("one.npz", tmp_path)


def test_images_are_cropped_at_the_centre_after_the_shorter_side_fits(tmp_path: Path) -> None:
    for number in range(3):
        wide = Image.new("RGB", (96, 32), (255, 0, 0))
        wide.paste((0, 255, number), (32, 0, 64, 32))
        wide.save(tmp_path / f"{number}.png")
    victim = open_dataset(str(tmp_path), Path("nowhere"), size=16).target.images[2]
    assert (victim[:, :, 2:14].int() - torch.tensor([0, 255, 2]).view(3, 1, 1)).abs().max() <= 1


def test_val_beside_train_is_the_victims_side(tmp_path: Path) -> None:
    names = {f"train/{name}/{n}.png": shade + n for name, shade in SHADES.items() for n in range(4)}
    names |= {f"val/{name}/{n}.png": shade + 50 + n for name, shade in SHADES.items() for n in range(3)}
    dataset = open_dataset(str(folder(tmp_path / "set", names)), Path("nowhere"))
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.auxiliary), len(dataset.train), len(dataset.target)) == (4, 4, 6)
    assert sorted(dataset.target.images[:, 0, 0, 0].tolist()) == [90, 91, 92, 190, 191, 192]


def test_val_with_classes_of_its_own_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"train/cat/0.png": 1, "train/cat/1.png": 2, "val/images/0.png": 3})
    with pytest.raises(FedtapError, match=r"a class that train does not \(images\).*same subfolders"):
        open_dataset(str(tmp_path), Path("nowhere"))


def test_the_same_picture_under_two_names_counts_once(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a.png": 1, "b.png": 1, "c.png": 2, "d.png": 3, "e.png": 1})
    assert open_dataset(str(root), Path("nowhere")).target.images[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    whole = (animals(tmp_path) / "cat" / "0.png").read_bytes()
    (tmp_path / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FedtapError, match=r"cat/3\.png .* is broken .*: replace it or take it out"):
        open_dataset(str(tmp_path), Path("nowhere"))


def test_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match=r"holds no images .*name a folder or zip"):
        open_dataset(str(tmp_path), Path("nowhere"))


def test_a_zip_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("nonsense")
    with pytest.raises(FedtapError, match=r"a\.zip cannot be read as a zip"):
        open_dataset("a.zip", tmp_path)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_damaged_zip_is_refused_or_read(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            content = io.BytesIO()
            image(number, (4, 4)).save(content, "PNG")
            archive.writestr(f"{number}.png", content.getvalue())
    _refused_or_read(data, buffer.getvalue(), ".zip")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_npz_is_refused_or_read(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays(shape=(2, 2)))
    _refused_or_read(data, buffer.getvalue(), ".npz")


def _refused_or_read(data: st.DataObject, whole: bytes, suffix: str) -> None:
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    path = _scratch(suffix)
    path.write_bytes(bytes(damaged[:cut]))
    try:
        with contextlib.suppress(FedtapError):
            open_dataset(str(path), Path("nowhere"), size=4)
    finally:
        path.unlink()


def _scratch(suffix: str) -> Path:
    with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
        return Path(file.name)


# Arrays.


@given(st.integers(3, 40), st.integers(1, 5), st.sampled_from([(5, 4, 3), (4, 6, 1), (4, 4)]))
@settings(max_examples=25, deadline=None)
def test_an_npz_is_public_train_and_victims_in_that_order(train: int, test: int, shape: tuple[int, ...]) -> None:
    path, made = _scratch(".npz"), arrays(train, test, shape)
    try:
        np.savez(path, **made)
        dataset = open_dataset(str(path), Path("nowhere"))
    finally:
        path.unlink()
    assert len(dataset.auxiliary) == train // 3
    whole = torch.cat([dataset.auxiliary.images, dataset.train.images]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(whole.reshape(made["x_train"].shape), made["x_train"])
    assert np.array_equal(torch.cat([dataset.auxiliary.labels, dataset.train.labels]).numpy(), made["y_train"])
    assert np.array_equal(
        dataset.target.images.permute(0, 2, 3, 1).numpy().reshape(made["x_test"].shape), made["x_test"]
    )
    assert dataset.shape == (shape[2] if len(shape) == 3 else 1, *shape[:2])


def test_public_is_ten_thousand_at_most(tmp_path: Path) -> None:
    made = arrays(30_003, 2, (1, 1))
    np.savez(tmp_path / "many.npz", **made)
    dataset = open_dataset("many.npz", tmp_path)
    assert (len(dataset.auxiliary), len(dataset.train)) == (10_000, 20_003)


def test_labels_in_a_column_are_read_too(tmp_path: Path) -> None:
    dataset = open_dataset(str(saved(tmp_path / "a.npz", y_train=np.arange(9)[:, None] % 3)), Path("nowhere"))
    assert dataset.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x_test": None}, "lacks an array .x_test"),
        ({"x_train": np.zeros((9, 8, 8, 3))}, "x_train is float64, not uint8"),
        ({"x_train": np.zeros((9, 8), np.uint8)}, "not N x H x W x C"),
        ({"x_train": np.zeros((9, 8, 8, 4), np.uint8)}, "not N x H x W x C"),
        ({"x_test": np.zeros((2, 9, 8, 3), np.uint8)}, "differ in size"),
        ({"y_train": np.zeros(8, np.int64)}, "not one whole number"),
        ({"y_train": np.zeros(9)}, "not one whole number"),
        ({"y_test": np.array([0, -1])}, "not one whole number"),
        ({"y_test": np.array([{}, {}])}, "allow_pickle=False"),
        ({"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": np.zeros(2, int)}, "fewer than 3"),
        ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test none"),
    ],
)
def test_a_bad_npz_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        open_dataset(str(saved(tmp_path / "bad.npz", **changes)), Path("nowhere"))


def test_an_npz_that_is_something_else_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(FedtapError, match=r"a\.npz cannot be used"):
        open_dataset("a.npz", tmp_path)
    (tmp_path / "b.npz").write_text("nonsense")
    with pytest.raises(FedtapError, match=r"b\.npz cannot be used"):
        open_dataset("b.npz", tmp_path)


def test_cifar10_is_the_npz_of_the_data_root(cifar10: Path) -> None:
    dataset = open_dataset("cifar10", cifar10)
    assert repr(dataset) == "Dataset('cifar10', classes=10, shape=3x32x32, auxiliary=10000, train=20000, target=2000)"
    assert dataset.classes[3] == "cat"
    with np.load(cifar10 / "cifar10_32k.npz") as archive:
        assert np.array_equal(dataset.target.images[:64].permute(0, 2, 3, 1).numpy(), archive["x_test"][:64])


def test_cifar10_is_downloaded_where_no_npz_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "cifar10_arrays", lambda root: arrays(shape=(32, 32, 3)))
    dataset = open_dataset("cifar10", tmp_path)
    assert (dataset.name, len(dataset.classes), len(dataset.target)) == ("cifar10", 10, 2)


def test_cifar10_with_an_eleventh_class_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "cifar10.npz", y_test=np.array([0, 10]))
    with pytest.raises(FedtapError, match="label 10 where there are 10 classes"):
        open_dataset("cifar10", tmp_path)


# Names.


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fotos", "no dataset named 'fotos': did you mean photos"),
        ("some/where", "some/where is not there"),
        ("gone.npz", r"gone\.npz is not there"),
    ],
)
def test_an_unknown_dataset_is_refused(name: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        open_dataset(name, Path("nowhere"))


def test_a_file_of_another_kind_and_a_size_of_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(FedtapError, match=r"neither a folder nor a \.zip or \.npz"):
        open_dataset("a.txt", tmp_path)
    with pytest.raises(FedtapError, match="--size of 1 or more"):
        open_dataset("photos", tmp_path, size=0)


# Partition.


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.integers(1, 60),
    st.none() | st.floats(1e-6, 1e6),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_a_partition_gives_every_image_to_one_client(
    labels: list[int], clients: int, alpha: float | None, seed: int
) -> None:
    clients = min(clients, len(labels))
    shares = partition(torch.tensor(labels), clients, alpha, seed)
    assert len(shares) == clients
    assert min(map(len, shares)) >= 1
    assert sorted(torch.cat(shares).tolist()) == list(range(len(labels)))
    if alpha is None:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    again = partition(torch.tensor(labels), clients, alpha, seed)
    assert all(torch.equal(one, other) for one, other in zip(shares, again, strict=True))


def test_a_small_concentration_gives_each_client_few_classes() -> None:
    labels = torch.arange(10).repeat(100)

    def classes_held(alpha: float | None) -> float:
        shares = partition(labels, 10, alpha, seed=0)
        return float(np.mean([len(labels[share].unique()) for share in shares]))

    assert classes_held(0.05) < 5 < classes_held(1.0) <= classes_held(None) == 10


@pytest.mark.parametrize(
    ("clients", "alpha", "said"),
    [(0, None, "0 clients"), (4, None, "ask for 1 to 3"), (2, 0.0, "above 0"), (2, float("nan"), "above 0")],
)
def test_an_impossible_partition_is_refused(clients: int, alpha: float | None, said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        partition(torch.tensor([0, 1, 2]), clients, alpha, 0)
