"""Datasets: image datasets with three sides that share no picture, and their partition over clients.

The auxiliary data are the attacker's, the train side is the clients', and the target data are what is attacked; they
serve as test data too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from io import BytesIO
from itertools import chain, cycle, islice
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from fedtap.simulator.data import DATASETS
from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.files import check_zip, exists, read_bytes
from fedtap.simulator.progress import progress

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom excluded."""

Fitted: TypeAlias = UInt8[np.ndarray, "..."]
"""Height, width, and three channels; a grey one has no third axis."""

SideName: TypeAlias = Literal["auxiliary", "train", "target"]

SIDES: tuple[SideName, ...] = ("auxiliary", "train", "target")

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, repr=False, eq=False)
class Side:
    """Images, kept as bytes in [0, 255], and their classes."""

    images: UInt8[Tensor, "images channel height width"]
    labels: Int64[Tensor, " images"]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Side({len(self)} images)"

    def batch(
        self, indices: Int64[Tensor, " batch"] | slice
    ) -> tuple[Float[Tensor, "batch channel height width"], Int64[Tensor, " batch"]]:
        """The chosen images in [0, 1], and their labels."""
        return self.images[indices].float() / 255, self.labels[indices]


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """A dataset of three sides."""

    name: str
    classes: tuple[str, ...]
    auxiliary: Side
    train: Side
    target: Side
    note: str = ""
    """What a reader of the results has to know about how the dataset was made; the page shows it."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise FedtapError(
                f"{self.name} has one class, so the cross-entropy and every gradient are 0 whatever the images: "
                "give it labels of two classes."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.target.images.shape[1:]
        return channels, height, width

    def __repr__(self) -> str:
        sides = f"auxiliary={len(self.auxiliary)}, train={len(self.train)}, target={len(self.target)}"
        return f"Dataset({self.name!r}, classes={len(self.classes)}, shape={'x'.join(map(str, self.shape))}, {sides})"


def open_dataset(name: str, data_root: Path, size: int = 32) -> Dataset:
    """The dataset of this name, or the folder, .zip or .npz at this path (from here, else from the data root).

    Args:
        name: one of WORLDS, or a path.
        data_root: where datasets lie, and where CIFAR-10 is downloaded to.
        size: height and width, in pixels, that photographs are brought to; arrays keep theirs.

    Raises:
        FedtapError: there is no such dataset, or what is there cannot be used.
    """
    if size < 1:
        raise FedtapError(f"Images of {size} pixels a side hold nothing: give --size of 1 or more, 32 by default.")
    if name == "photos":
        return photos(size)
    if name == "cifar10":
        return cifar10_dataset(data_root)
    path = next((path for path in (Path(name), data_root / name) if exists(path)), None)
    if path is None:
        if "/" in name or PurePosixPath(name).suffix in (".npz", ".zip"):
            raise FedtapError(
                f"The dataset {short(name, 120)} is not there: give the path of a folder, a .zip or an .npz that is."
            )
        raise unknown("dataset", name, (*DATASETS, "or a folder, a .zip or an .npz by its path"))
    if path.suffix == ".npz":
        return npz(path)
    if path.is_dir() or path.suffix == ".zip":
        return pictures(path, size)
    raise FedtapError(
        f"{short(name, 120)} is neither a folder nor a .zip or .npz, so no images can be read from it: give one."
    )


def _plain(error: Exception) -> str:
    """An error without the address of the object in memory that Pillow names."""
    return short(str(error).partition(" <_io.")[0] or type(error).__name__, 100)


def partition(labels: Int64[Tensor, " images"], clients: int, alpha: float | None, seed: int) -> list[Tensor]:
    """Share images among clients: for each client its indices, shuffled. Every image goes to one, every client has one.

    Args:
        labels: each image's class.
        clients: how many.
        alpha: Dirichlet concentration, > 0: small ones give each client few classes. None is IID, in equal shares.
        seed: of the shuffle and the shares.

    Raises:
        FedtapError: more clients than images, no client, or a concentration that is not positive.
    """
    if not 1 <= clients <= len(labels):
        raise FedtapError(
            f"{clients} clients cannot share {len(labels)} images so that each has one: "
            f"ask for 1 to {len(labels)} clients."
        )
    if alpha is not None and not 0 < alpha < math.inf:
        raise FedtapError(f"A Dirichlet concentration of {alpha} has no distribution: give a number above 0.")
    random = np.random.default_rng(seed)
    if alpha is None:
        return [torch.from_numpy(share) for share in np.array_split(random.permutation(len(labels)), clients)]
    owners = np.empty(len(labels), np.int64)
    for label in np.unique(labels.numpy()):
        members = random.permutation(np.flatnonzero(labels.numpy() == label))
        ends = np.cumsum(random.dirichlet(np.full(clients, alpha)))[:-1] * len(members)
        for client, share in enumerate(np.split(members, ends.round().astype(np.int64))):
            owners[share] = client
    held = np.bincount(owners, minlength=clients)
    for poor in np.flatnonzero(held == 0):  # it gets an image from the richest
        richest = int(held.argmax())
        owners[random.choice(np.flatnonzero(owners == richest))] = poor
        held[richest] -= 1
    return [torch.from_numpy(random.permutation(np.flatnonzero(owners == client))) for client in range(clients)]


# The embedded photographs.


@dataclass(frozen=True)
class Photograph:
    """A photograph and its three regions, which share no pixel. The target data begin with the portraits."""

    file: str
    portraits: tuple[Box, Box]
    target: Box
    auxiliary: Box
    train: Box


PHOTOGRAPHS = {
    "astronaut": Photograph(
        file="astronaut.png",
        portraits=((130, 0, 338, 208), (330, 0, 512, 182)),
        target=(112, 0, 512, 240),
        auxiliary=(0, 240, 256, 512),
        train=(256, 240, 512, 512),
    ),
    "cat": Photograph(
        file="chelsea.png",
        portraits=((96, 44, 352, 300), (140, 80, 240, 180)),
        target=(96, 0, 352, 300),
        auxiliary=(0, 0, 96, 300),
        train=(352, 0, 451, 300),
    ),
    "coffee": Photograph(
        file="coffee.png",
        portraits=((176, 0, 432, 256), (300, 200, 440, 340)),
        target=(160, 0, 440, 400),
        auxiliary=(0, 0, 160, 400),
        train=(440, 0, 600, 400),
    ),
    "motorcycle": Photograph(
        file="motorcycle_left.png",
        portraits=((480, 250, 700, 470), (200, 180, 456, 436)),
        target=(190, 170, 741, 480),
        auxiliary=(0, 0, 190, 500),
        train=(190, 0, 741, 170),
    ),
    "rocket": Photograph(
        file="rocket.jpg",
        portraits=((192, 171, 448, 427), (220, 120, 440, 340)),
        target=(192, 100, 448, 427),
        auxiliary=(0, 0, 192, 427),
        train=(448, 0, 640, 427),
    ),
    "retina": Photograph(
        file="retina.jpg",
        portraits=((160, 520, 416, 776), (150, 550, 330, 730)),
        target=(100, 480, 520, 860),
        auxiliary=(250, 60, 1160, 480),
        train=(250, 860, 1160, 1350),
    ),
    "tissue": Photograph(
        file="ihc.png",
        portraits=((230, 290, 430, 490), (256, 272, 496, 512)),
        target=(208, 272, 512, 512),
        auxiliary=(0, 0, 208, 512),
        train=(208, 0, 512, 272),
    ),
    "galaxies": Photograph(
        file="hubble_deep_field.jpg",
        portraits=((677, 424, 773, 520), (752, 540, 880, 668)),
        target=(620, 0, 1000, 872),
        auxiliary=(0, 0, 310, 872),
        train=(310, 0, 620, 872),
    ),
}
"""Class -> photograph. Of the stereo pair of the motorcycle only the left side: the right one shows the same again."""

WINDOW_WIDTHS = range(96, 257, 32)
"""Sides of the square windows, in pixels."""

WINDOW_STRIDE = 8

FLAT = 0.03
"""Standard deviation of a window's grey pixels in [0, 1], each the mean of 8 x 8, below which it shows nothing."""

WINDOWS: dict[SideName, int] = {"auxiliary": 64, "train": 64, "target": 32}
"""Windows taken from a photograph, at most."""


@lru_cache(maxsize=2)
def photos(size: int) -> Dataset:
    """Windows of eight photographs, resized; classes take turns, and the first eight target images are portraits."""
    sides: dict[SideName, list[list[Fitted]]] = {side: [] for side in WINDOWS}
    for name, photograph in PHOTOGRAPHS.items():
        try:
            picture = _decoded((files("skimage") / "data" / photograph.file).read_bytes()).convert("RGB")
        except Exception as error:  # no package, no file, or one that Pillow cannot read
            raise FedtapError(
                f"The photograph {photograph.file} of scikit-image cannot be read ({error}), so the dataset photos "
                f"lacks "
                f"its {name}: install scikit-image again, or use another --dataset."
            ) from error
        for side, classes in sides.items():
            classes.append([_fitted(picture.crop(box), size) for box in windows(photograph, picture, side)])
    return _dataset("photos", tuple(PHOTOGRAPHS), sides, grey=False)


def windows(photograph: Photograph, picture: Image.Image, side: SideName) -> list[Box]:
    """Windows of one side of a photograph, flat ones left out: the portraits, then others in a fixed shuffled order."""
    left, top, right, bottom = getattr(photograph, side)
    boxes = [
        (x, y, x + width, y + width)
        for width in WINDOW_WIDTHS
        for y in range(top, bottom - width + 1, WINDOW_STRIDE)
        for x in range(left, right - width + 1, WINDOW_STRIDE)
    ]
    shuffled = (boxes[number] for number in np.random.default_rng(0).permutation(len(boxes)))
    portraits = photograph.portraits if side == "target" else ()
    return list(islice(chain(portraits, (box for box in shuffled if not _flat(picture.crop(box)))), WINDOWS[side]))


def _flat(window: Image.Image) -> bool:
    return float(np.asarray(window.convert("L").reduce(8)).std()) / 255 < FLAT


# Folders and zips.

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, whatever a file's name ends in: Pillow would start Ghostscript for a PostScript file named x.png."""

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

HELD_OUT_FOLDERS = {"val", "valid", "validation", "test"}
"""Folders beside one named train whose images are the target data."""


def pictures(path: Path, size: int) -> Dataset:
    """A folder or .zip of images, each resized (shorter side to `size`) and cropped at its centre.

    A class is a subfolder, below any folder that holds all the rest. In order of class and name the images go to
    auxiliary, train and target by turns, a third to each; but where the top folders are `train` and some of
    HELD_OUT_FOLDERS, the
    latter are the target data, and `train` goes to the other two by turns. Images without subfolders have no labels:
    they get balanced pseudo-labels, and all of them are target data, as are all of a folder too small for three sides;
    the auxiliary and the training side are then the embedded photographs. Images that are all grey have one channel. Of
    images that are the same to the last pixel only the first is used. Nothing is unpacked to disk.

    Raises:
        FedtapError: there are no images, or one of them is broken.
    """
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.is_file())
        readers = {PurePosixPath(file.relative_to(path)): partial(read_bytes, file, LARGEST_IMAGE) for file in found}
        return _pictures(path, readers, size)
    try:
        archive = zipfile.ZipFile(path)
        check_zip(archive, LARGEST_ARRAY)
    except Exception as error:  # zipfile raises all sorts
        raise FedtapError(
            f"{short(path, 100)} cannot be read as a zip ({short(error, 100)}): fetch or pack it again."
        ) from error
    with archive:
        members = (member for member in archive.infolist() if member.filename and not member.is_dir())
        return _pictures(
            path, {PurePosixPath(member.filename): partial(archive.read, member) for member in members}, size
        )


def _pictures(path: Path, readers: Mapping[PurePosixPath, Callable[[], bytes]], size: int) -> Dataset:
    images = sorted(
        file
        for file in readers
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") or part == "__MACOSX" for part in file.parts)
    )
    if not images:
        raise FedtapError(
            f"{short(path, 100)} holds no images ({', '.join(sorted(SUFFIXES))}): name a folder or zip that does."
        )
    if len(images) * size * size * 3 > LARGEST_ARRAY:
        raise FedtapError(
            f"{short(path, 100)} holds {len(images):,} images, which at {size} pixels a side fill more than "
            f"{LARGEST_ARRAY:,} bytes: lower --size, or take some out."
        )
    classes_of, held_out = _layout(images, path.stem)
    classes = tuple(sorted(set(classes_of.values())))
    fitted: dict[PurePosixPath, Fitted] = {}
    seen: set[bytes] = set()
    for file in progress(images, f"images of {path.name}"):
        try:
            picture = _fitted(_decoded(readers[file]()), size)
        except Exception as error:  # Pillow and zipfile raise all sorts
            raise FedtapError(
                f"The image {short(file)} in {short(path)} is broken ({_plain(error)}): replace it or take it out."
            ) from error
        digest = hashlib.blake2b(picture.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            fitted[file] = picture
    grey = all(picture.ndim == 2 for picture in fitted.values())
    turns = cycle(("auxiliary", "train") if held_out else SIDES)
    side_of: dict[PurePosixPath, SideName] = {file: "target" if file in held_out else next(turns) for file in fitted}
    alike = len(classes) == 1
    if (not held_out and (alike or len(fitted) < _SMALL)) or set(side_of.values()) != set(SIDES):
        labels = [classes.index(classes_of[file]) for file in fitted]
        return _beside_photos(
            path.stem, _stacked(list(fitted.values()), grey), None if alike else labels, classes, size
        )
    sides: dict[SideName, list[list[Fitted]]] = {side: [[] for _ in classes] for side in SIDES}
    for file, picture in fitted.items():
        sides[side_of[file]][classes.index(classes_of[file])].append(picture)
    return _called(path.stem, sides, grey) if alike else _dataset(path.stem, classes, sides, grey)


_SMALL = 24
"""Images below which a folder is not split: a third of them would be less than one for each of a few clients."""

PSEUDO_LABELS = 8
"""Classes of images that have no labels; the embedded photographs have as many."""


def _beside_photos(
    name: str,
    images: UInt8[Tensor, "images channel height width"],
    labels: list[int] | None,
    classes: tuple[str, ...],
    size: int,
) -> Dataset:
    """All of these images as target data; the auxiliary and the training side are the embedded photographs."""
    others = photos(size)
    note = (
        f"All images of {name} are target data; the auxiliary and the training images are scikit-image's photographs."
    )
    if labels is None:
        classes, labels = _pseudo(len(images))
        note += NO_LABELS.format(name)
    auxiliary, train = (
        Side(side.images if images.shape[1] == 3 else _luminance(side.images), side.labels % len(classes))
        for side in (others.auxiliary, others.train)
    )
    return Dataset(name, classes, auxiliary, train, Side(images, torch.tensor(labels)), note)


NO_LABELS = f" {{}} has no labels, so its images are called 0 to {PSEUDO_LABELS - 1} by turns."


def _pseudo(images: int) -> tuple[tuple[str, ...], list[int]]:
    """The names of the pseudo-classes, and a label for each image, all of them equally often."""
    return tuple(map(str, range(PSEUDO_LABELS))), [number % PSEUDO_LABELS for number in range(images)]


def _called(name: str, sides: dict[SideName, list[list[Fitted]]], grey: bool) -> Dataset:
    """Images of one class on sides of their own, with pseudo-labels."""
    made = {
        side: Side(_stacked(of_class[0], grey), torch.tensor(_pseudo(len(of_class[0]))[1]))
        for side, of_class in sides.items()
    }
    note = NO_LABELS.format(name).strip()
    return Dataset(name, _pseudo(0)[0], made["auxiliary"], made["train"], made["target"], note)


def _luminance(
    images: UInt8[Tensor, "images 3 height width"],
) -> UInt8[Tensor, "images 1 height width"]:
    """ITU-R 601, as Pillow's."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).round().byte()


def _layout(images: list[PurePosixPath], single: str) -> tuple[dict[PurePosixPath, str], set[PurePosixPath]]:
    """The class of each image, and the images in a folder of HELD_OUT_FOLDERS beside one named train."""
    inner = {file: file.parts for file in images}

    def tops() -> set[str]:
        return {parts[0] if len(parts) > 1 else "" for parts in inner.values()}

    while len(tops()) == 1 and tops() != {""}:
        single = tops().pop()
        inner = {file: parts[1:] for file, parts in inner.items()}
    held_out: set[PurePosixPath] = set()
    if "train" in tops() and {"train"} < tops() <= {"train"} | HELD_OUT_FOLDERS:
        held_out = {file for file, parts in inner.items() if parts[0] != "train"}
        inner = {file: parts[1:] for file, parts in inner.items()}
    classes = {file: parts[0] if len(parts) > 1 else single for file, parts in inner.items()}
    strange = {classes[file] for file in held_out} - {name for file, name in classes.items() if file not in held_out}
    if strange:
        raise FedtapError(
            f"The folders beside train hold a class that train does not ({short(min(strange))}), which no model can "
            "learn: give them the same subfolders as train."
        )
    return classes, held_out


# Arrays.


def npz(path: Path, classes: Sequence[str] = ()) -> Dataset:
    """An .npz of `x_train y_train x_test y_test`: uint8 images N x H x W x C (or N x H x W, grey) and their classes.

    Auxiliary data are the first third of `x_train`, 10,000 at most; train is the rest of it; target data are `x_test`.

    Raises:
        FedtapError: the file cannot be read, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as members:
            check_zip(members, LARGEST_ARRAY)
            for name in ARRAYS:
                _check_header(members, name)
        with np.load(path, allow_pickle=False) as archive:
            return of_arrays(path.stem, {name: archive[name] for name in ARRAYS}, classes)
    except KeyError as error:
        raise FedtapError(
            f"{short(path, 120)} lacks an array ({short(error.args[0])}): an .npz holds {' '.join(ARRAYS)}."
        ) from error
    except Exception as error:  # numpy and zipfile raise all sorts
        raise FedtapError(
            f"{short(path, 100)} cannot be used ({short(error, 100)}): write {' '.join(ARRAYS)} with numpy.savez."
        ) from error


def _check_header(members: zipfile.ZipFile, name: str) -> None:
    """Raise ValueError of an array that promises more entries than are there, KeyError of one that is not there."""
    if f"{name}.npy" not in members.namelist():
        raise KeyError(name)
    info = members.getinfo(f"{name}.npy")
    with members.open(info) as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{name} is in version {version} of numpy's format")
        shape, _, kind = readers[version](file)
    if math.prod(shape) * kind.itemsize > info.file_size:
        raise ValueError(f"{name} promises {short(shape, 30)} entries, and there are fewer")


def cifar10_dataset(data_root: Path) -> Dataset:
    """CIFAR-10: the first cifar10*.npz in the data root, else torchvision's, downloaded there.

    Raises:
        FedtapError: the file cannot be used, or the download fails.
    """
    found = sorted(data_root.glob("cifar10*.npz"))
    if found:
        return dataclasses.replace(npz(found[0], CIFAR10_CLASSES), name="cifar10")
    from fedtap.simulator.data import vision

    return of_arrays("cifar10", vision.cifar10_arrays(data_root), CIFAR10_CLASSES)


LARGEST_ARRAY = 2**31
"""Bytes that a dataset's images may fill, unfolded and resized."""

LARGEST_IMAGE, MOST_PIXELS = 2**28, 2**26
"""Bytes of an image file, and pixels of an image, at most."""

MOST_LABELS = 2**16
"""Classes of an .npz, which are counted from its labels."""

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def of_arrays(name: str, arrays: dict[str, Shaped[np.ndarray, "..."]], classes: Sequence[str]) -> Dataset:
    train, test = (_side(arrays[f"x_{part}"], arrays[f"y_{part}"], part) for part in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError("images of x_train and x_test differ in size or channels")
    if len(train) < 3 or not len(test):
        raise ValueError("x_train holds fewer than 3 images, or x_test none")
    highest = int(max(train.labels.max(), test.labels.max()))
    if classes and highest >= len(classes):
        raise ValueError(f"label {highest} where there are {len(classes)} classes")
    auxiliary = min(len(train) // 3, 10_000)
    return Dataset(
        name,
        tuple(classes) or tuple(map(str, range(highest + 1))),
        auxiliary=Side(train.images[:auxiliary], train.labels[:auxiliary]),
        train=Side(train.images[auxiliary:], train.labels[auxiliary:]),
        target=test,
    )


def _side(images: Shaped[np.ndarray, "..."], labels: Shaped[np.ndarray, "..."], part: str) -> Side:
    if images.dtype != np.uint8:
        raise ValueError(f"x_{part} is {images.dtype}, not uint8")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise ValueError(f"x_{part} has shape {images.shape}, not N x H x W x C with 1 or 3 channels")
    if labels.dtype.kind not in "iu" or labels.size != len(images) or (labels.size and int(labels.min()) < 0):
        raise ValueError(f"y_{part} is not one whole number from 0 for each image of x_{part}")
    if labels.size and int(labels.max()) >= MOST_LABELS:
        raise ValueError(f"y_{part} holds {labels.max()}, where {MOST_LABELS - 1:,} is the highest possible")
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Side(torch.from_numpy(channels_first), torch.from_numpy(labels.reshape(-1).astype(np.int64)))


# Shared by photographs and folders.


def _decoded(content: bytes) -> Image.Image:
    """An image file's picture, upright, in colour or, where the file has no other, in grey; of 16 bits the upper 8."""
    try:
        stored = Image.open(BytesIO(content), formats=FORMATS)
        pixels = stored.width * stored.height
    except Image.DecompressionBombError:
        pixels = MOST_PIXELS + 1
    if pixels > MOST_PIXELS:
        raise ValueError(f"it has more than {MOST_PIXELS:,} pixels")
    picture = ImageOps.exif_transpose(stored)
    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.int64)
        if deep.min() < 0 or deep.max() >= 2**16:
            raise ValueError("its pixels are no numbers from 0 to 65535")
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if picture.mode.startswith("F"):
        raise ValueError("its pixels are floating point numbers, of no stated range")
    return picture.convert("L" if picture.mode in ("1", "L", "LA", "La") else "RGB")


def _fitted(picture: Image.Image, size: int) -> Fitted:
    """The largest square at its centre, resized with antialiasing."""
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS))


def _stacked(pictures: Sequence[Fitted], grey: bool) -> UInt8[Tensor, "images channel height width"]:
    """With one channel, or in colour."""
    each = [picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1) for picture in pictures]
    whole = each if grey else [np.broadcast_to(picture, (3, *picture.shape[1:])) for picture in each]
    return torch.from_numpy(np.ascontiguousarray(np.stack(whole)))


def _dataset(name: str, classes: tuple[str, ...], sides: dict[SideName, list[list[Fitted]]], grey: bool) -> Dataset:
    """The dataset of these pictures, side -> class -> pictures; on each side the classes take turns."""
    made = {}
    for side, of_class in sides.items():
        turns = sorted((rank, label) for label, pictures in enumerate(of_class) for rank in range(len(pictures)))
        images = _stacked([of_class[label][rank] for rank, label in turns], grey)
        made[side] = Side(images, torch.tensor([label for _, label in turns]))
    return Dataset(name, classes, made["auxiliary"], made["train"], made["target"])
