"""torchvision's data sets of labelled pictures, with local images in the place of what they would download or read.

A class here is torchvision's own with another beginning: items, transforms and names of attributes are its own. An app
that splits such a set among its clients goes on doing so.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fedtap.simulator.data.images import CIFAR10_CLASSES, HELD_OUT_FOLDERS, Dataset, Side
from fedtap.simulator.data.vision import torchvision_datasets
from fedtap.simulator.errors import FedtapError

Opened = Callable[[int], Dataset]
"""From a size, in pixels a side, that photographs are brought to, to the local data; arrays keep their own size."""

_SIZE = 32
"""Pixels a side that photographs are brought to for a set whose own images have many sizes."""

_LUMINANCE = (0.299, 0.587, 0.114)
"""Share of red, green and blue in grey: ITU-R 601, as PIL has it."""


@dataclass(frozen=True)
class _PictureSet:
    """What a set of torchvision's holds, and how."""

    keep: Callable[[Any, Tensor, Tensor, Sequence[str]], None]
    """Puts images (bytes, by image, channel, height, width), labels and names of classes into a set."""
    channels: int
    """Of an image."""
    size: int = 0
    """Height and width of an image, in pixels; 0 for sets whose images have any."""
    classes: Sequence[str] = ()
    """Names of its classes; none for sets that know them by themselves, or have those of their folders."""


def _as_cifar(made: Any, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    made.data, made.targets = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
    made.classes, made.class_to_idx = list(classes), {name: number for number, name in enumerate(classes)}


def _as_mnist(made: Any, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    made.data, made.targets, made.classes = images[:, 0], labels, list(classes)


def _as_svhn(made: Any, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    made.data, made.labels = images.numpy(), labels.numpy()


def _as_usps(made: Any, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    made.data, made.targets = images[:, 0].numpy(), labels.tolist()


def _as_folder(made: Any, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    made.classes, made.targets = list(classes), labels.tolist()
    made.class_to_idx = {name: number for number, name in enumerate(classes)}
    files = {f"{classes[label]}/{number}.png": number for number, label in enumerate(made.targets)}
    made.samples = made.imgs = list(zip(files, made.targets, strict=True))
    made.loader = lambda file: Image.fromarray(images[files[file]].permute(1, 2, 0).numpy())


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


_SETS = {
    "CIFAR10": _PictureSet(_as_cifar, 3, 32, CIFAR10_CLASSES),
    "CIFAR100": _PictureSet(_as_cifar, 3, 32, _numbered(100)),
    "MNIST": _PictureSet(_as_mnist, 1, 28),
    "FashionMNIST": _PictureSet(_as_mnist, 1, 28),
    "KMNIST": _PictureSet(_as_mnist, 1, 28),
    "EMNIST": _PictureSet(_as_mnist, 1, 28),
    "USPS": _PictureSet(_as_usps, 1, 16, _numbered(10)),
    "SVHN": _PictureSet(_as_svhn, 3, 32, _numbered(10)),
    "STL10": _PictureSet(_as_svhn, 3, 96, _numbered(10)),
    "EuroSAT": _PictureSet(_as_folder, 3, 64, _numbered(10)),
    "ImageNet": _PictureSet(_as_folder, 3, 0, _numbered(1000)),
    "ImageFolder": _PictureSet(_as_folder, 3),
}
"""Name of a class in torchvision.datasets -> what it holds."""


@contextmanager
def torchvision_standing_in(opened: Opened, note: Callable[[str], None]) -> Iterator[None]:
    """Inside, the sets of `_SETS` hold local images.

    Args:
        note: is told in a sentence which set an app asked for, and what was done to the images.
    """
    module = torchvision_datasets()
    replaced: list[tuple[ModuleType, str, type]] = []
    for name, about in _SETS.items():
        original = getattr(module, name)
        standing_in = _local(original, about, opened, note)
        for place in (module, sys.modules[original.__module__]):
            replaced.append((place, name, original))
            setattr(place, name, standing_in)
    try:
        yield
    finally:
        for place, name, original in replaced:
            setattr(place, name, original)


def _local(original: type, about: _PictureSet, opened: Opened, note: Callable[[str], None]) -> type:
    """A class of the same name and arguments as `original`, a subclass of it."""
    name, signature = original.__name__, inspect.signature(original)
    base: Any = sys.modules["torchvision.datasets.vision"].VisionDataset

    def __init__(self: Any, *given: Any, **options: Any) -> None:
        asked = signature.bind(*given, **options)
        asked.apply_defaults()
        said = {**asked.arguments, **asked.arguments.get("kwargs", {})}
        base.__init__(self, said["root"], None, said.get("transform"), said.get("target_transform"))
        split = str(said.get("split", "" if "train" in said else Path(said["root"]).name))
        held_out = not said.get("train", True) or split in HELD_OUT_FOLDERS
        self.train, self.split = not held_out, split
        local = opened(about.size or _SIZE)
        side = local.target if held_out else private_side(local)
        named = getattr(self, "classes_split_dict", {}).get(split, getattr(original, "classes", about.classes))
        classes = named or local.classes
        if (highest := int(side.labels.max())) >= len(classes):
            raise FedtapError(
                f"The local data have a label {highest}, and {name}, for which they stand in, has {len(classes)} "
                f"classes: give --data with labels below {len(classes)}."
            )
        found = tuple(side.images.shape[1:])
        wanted = (about.channels, about.size or found[1], about.size or found[2])
        note(f"the app's own data, {name}: local data stood in for them{_change(found, wanted)}")
        about.keep(self, _brought_to(side.images, wanted), side.labels.clone(), classes)

    about_it = {"__init__": __init__, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(name, (original,), about_it)


def private_side(local: Dataset) -> Side:
    """All of the local data that are no test data."""
    both = local.auxiliary, local.train
    return Side(torch.cat([side.images for side in both]), torch.cat([side.labels for side in both]))


def _change(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What the images have to be changed from and to, as (channels, height, width)."""
    if found == wanted:
        return ""
    before, after = ("x".join(map(str, shape)) for shape in (found, wanted))
    return f", and their images were brought from {before} to its {after} (channels, height, width)"


def _brought_to(images: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """A copy of the images, with as many channels and pixels as are wanted."""
    channels, height, width = wanted
    pixels = images.float()
    if channels == 1 and images.shape[1] == 3:
        pixels = (pixels * pixels.new_tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if images.shape[2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return pixels.round().byte().expand(-1, channels, -1, -1).clone()
