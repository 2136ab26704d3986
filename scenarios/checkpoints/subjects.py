"""Who holds which images in a federation that tunes a diffusion model, and what they are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedtap.simulator.attack import generator
from fedtap.simulator.data.images import Dataset, Side, open_dataset
from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.models.diffusion import Pixels

MIXED = "mixed"
"""In the place of a class: each image of a client is of another class."""

OTHERS_KEPT = 256
"""Images of other subjects, at most."""


@dataclass(frozen=True, eq=False)
class Subjects:
    """Images in [0, 1], by what they are for.

    Args:
        named: client -> class of its images, or MIXED.
        private: client -> what it tunes on.
        held_out: client -> images of the same classes that nobody tunes on.
        others: images of classes that no client holds; where all are held, of those that are not private.
    """

    named: Mapping[int, str]
    private: Mapping[int, Pixels]
    held_out: Mapping[int, Pixels]
    others: Pixels
    note: str


@lru_cache(maxsize=2)
def subjects(data_root: Path, name: str, size: int, channels: int, first: str, private: int, clients: int) -> Subjects:
    """The images of so many clients, each of a class of its own, or each mixed.

    Args:
        first: the class of the first client, after which they take turns; MIXED, or nothing for the first class, and of
            the photographs MIXED.

    Raises:
        FedtapError: there is no such dataset or class, or a class has too few images.
    """
    dataset = open_dataset(name, data_root, size)
    if dataset.shape != (channels, size, size):
        raise FedtapError(
            f"The images of {short(name, 60)} are {short('x'.join(map(str, dataset.shape)))}, and the diffusion model "
            f"draws {channels}x{size}x{size}: give a folder or a zip of colour images, which are brought to its size."
        )
    first = first or (MIXED if name == "photos" else dataset.classes[0])
    if first == MIXED:
        return _mixed(dataset, private, clients)
    if first not in dataset.classes:
        raise unknown("class", first, (*dataset.classes, MIXED))
    begun = dataset.classes.index(first)
    named = {client: dataset.classes[(begun + client) % len(dataset.classes)] for client in range(clients)}
    if clients > len(dataset.classes):
        raise FedtapError(
            f"{short(name, 60)} has {len(dataset.classes)} classes, and {clients} clients have one each: lower "
            "--victims or --averaged."
        )
    of = {client: _all_of(dataset, label) for client, label in named.items()}
    for client, images in of.items():
        if len(images) <= private:
            raise FedtapError(
                f"{short(named[client])} of {short(name, 60)} has {len(images)} images, and {private} private ones and "
                "at least one that is held out are needed: lower --private, or name another --subject."
            )
    taken = torch.tensor([dataset.classes.index(label) for label in named.values()])
    held_out = {client: images[private:] for client, images in of.items()}
    others = _without(dataset, taken)
    return Subjects(
        named=named,
        private={client: images[:private] for client, images in of.items()},
        held_out=held_out,
        others=others if len(others) else torch.cat(list(held_out.values()))[:OTHERS_KEPT],
        note=dataset.note,
    )


def _mixed(dataset: Dataset, private: int, clients: int) -> Subjects:
    """Target images to clients, in the dataset's order; held out are the other sides' images of the same classes."""
    if private * clients > len(dataset.target):
        raise FedtapError(
            f"{short(dataset.name)} has {len(dataset.target)} target images, and {clients} clients have {private} "
            "each: lower --private, --victims or --averaged."
        )
    blocks = {client: slice(client * private, (client + 1) * private) for client in range(clients)}
    away = torch.cat([_spread(side, OTHERS_KEPT) for side in (dataset.train, dataset.auxiliary)])
    labels = torch.cat([_labels(side, OTHERS_KEPT) for side in (dataset.train, dataset.auxiliary)])
    held = {client: torch.isin(labels, dataset.target.labels[block]) for client, block in blocks.items()}
    inside = torch.stack(list(held.values())).any(0)
    if not all(bool(own.any()) for own in held.values()):
        raise FedtapError(
            f"{short(dataset.name)} has no image of a private image's class that could be held out: name a dataset "
            "with several images of each, or a --subject."
        )
    return Subjects(
        named=dict.fromkeys(blocks, MIXED),
        private={client: dataset.target.batch(block)[0] for client, block in blocks.items()},
        held_out={client: away[own] for client, own in held.items()},
        others=away[~inside] if bool((~inside).any()) else away,
        note=dataset.note,
    )


def _all_of(dataset: Dataset, label: str) -> Pixels:
    number = dataset.classes.index(label)
    sides = (dataset.target, dataset.train, dataset.auxiliary)
    return torch.cat([side.batch((side.labels == number).nonzero()[:, 0])[0] for side in sides])


def _without(dataset: Dataset, taken: Tensor) -> Pixels:
    sides = (dataset.target, dataset.train, dataset.auxiliary)
    found = torch.cat([side.images[~torch.isin(side.labels, taken)] for side in sides])
    order = torch.randperm(len(found), generator=generator("others"))[:OTHERS_KEPT]
    return found[order].float() / 255


def _at(side: Side, many: int) -> Tensor:
    return torch.arange(0, len(side), max(1, len(side) // many))


def _spread(side: Side, many: int) -> Pixels:
    return side.batch(_at(side, many))[0]


def _labels(side: Side, many: int) -> Tensor:
    return side.labels[_at(side, many)]


@lru_cache(maxsize=2)
def pretraining_images(data_root: Path, names: str, size: int) -> Pixels:
    """The auxiliary and training images of datasets, commas between: what a model was trained on before.

    Raises:
        FedtapError: there is no such dataset, or its images are of another shape.
    """
    found = []
    for name in filter(None, (name.strip() for name in names.split(","))):
        dataset = open_dataset(name, data_root, size)
        if dataset.shape != (3, size, size):
            raise FedtapError(
                f"The images of {short(name, 60)} are {short('x'.join(map(str, dataset.shape)))}, and the diffusion "
                f"model draws 3x{size}x{size}, so it was not trained on them: name what it was trained on."
            )
        found += [dataset.auxiliary.batch(slice(None))[0], dataset.train.batch(slice(None))[0]]
    return torch.cat(found) if found else torch.zeros(0, 3, size, size)
