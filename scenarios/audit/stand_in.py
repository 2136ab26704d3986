"""A local folder, .npz or table in the place of the data set that an app would fetch.

`flwr_datasets` and `datasets` are replaced for the process, by as much of them as Flower's example apps use; their
partitions are independent and identically distributed, whatever partitioner the app names. Images also stand in for
data sets of torchvision's, which an app splits by itself.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedtap.scenarios.audit.torchvision_sets import Opened, private_side, torchvision_standing_in
from fedtap.simulator.data.images import Side, open_dataset
from fedtap.simulator.errors import FedtapError, short

_IMAGE_COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}
"""Last part of a data set's name -> its columns, where they are not `image` and `label`."""

_SIZE = 32
"""Pixels a side that photographs are brought to."""

_TESTED = 5
"""One row of this many is in a table's test split."""

NOT_ASKED = "the local data: the app asked for none by flwr_datasets, datasets or a known class of torchvision.datasets"
"""What is to be said where nothing stood in for anything."""

Transform = Callable[[dict[str, list[Any]]], Mapping[str, Sequence[Any]]]
"""From columns to columns, of some rows."""


class Pictures(Sequence[Image.Image]):
    """Images of a side as PIL's, made when they are asked for."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def __len__(self) -> int:
        return len(self._side)

    def __getitem__(self, index: Any) -> Any:
        pixels = self._side.images[index].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


class LocalRows:
    """LocalRows of a data set, with the methods of `datasets.Dataset` that example apps use."""

    def __init__(
        self, columns: Mapping[str, Sequence[Any]], rows: Sequence[int], change: Transform | None = None
    ) -> None:
        self._columns, self._rows, self._change = columns, list(rows), change

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, which: Any) -> Any:
        """A row as a dict, some rows as a dict of lists, or a column as a list."""
        if isinstance(which, str):
            return self[:][which]
        if isinstance(which, int | np.integer):
            if not -len(self) <= which < len(self):
                raise IndexError(which)
            return {name: values[0] for name, values in self._some([self._rows[int(which)]]).items()}
        chosen = self._rows[which] if isinstance(which, slice) else [self._rows[int(index)] for index in which]
        return self._some(chosen)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """As a DataLoader asks for a batch."""
        return [self[index] for index in indices]

    def _some(self, rows: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        plain = {name: [values[row] for row in rows] for name, values in self._columns.items()}
        return self._change(plain) if self._change else plain

    def select(self, indices: Sequence[int]) -> LocalRows:
        """Some of the rows."""
        return LocalRows(self._columns, [self._rows[int(index)] for index in indices], self._change)

    def shuffle(self, seed: int | None = None, **_: Any) -> LocalRows:
        """The rows in another order."""
        return self.select(np.random.default_rng(seed).permutation(len(self)).tolist())

    def train_test_split(
        self, test_size: float = 0.25, seed: int | None = None, shuffle: bool = True, **_: Any
    ) -> LocalSplits:
        """Two parts of it; `test_size` is a share below 1, or a number of rows."""
        mixed = self.shuffle(seed) if shuffle else self
        tested = round(test_size * len(self)) if test_size < 1 else int(test_size)
        kept = len(self) - tested
        return LocalSplits(train=mixed.select(range(kept)), test=mixed.select(range(kept, len(self))))

    def with_transform(self, transform: Transform, **_: Any) -> LocalRows:
        """These rows, changed as they are read."""
        return LocalRows(self._columns, self._rows, transform)

    def with_format(self, type: str | None = None, **_: Any) -> LocalRows:
        """These rows as tensors (`torch`), arrays (`numpy`) or plain."""
        make: dict[str, Callable[[Any], Any]] = {"torch": _tensor, "numpy": lambda value: _tensor(value).numpy()}
        if type not in make:
            return LocalRows(self._columns, self._rows)
        return self.with_transform(lambda some: {name: [make[type](one) for one in some[name]] for name in some})

    def map(self, function: Callable[[Any], Any], batched: bool = False, **_: Any) -> LocalRows:
        """LocalRows with the columns that the function makes of a row, or of all rows, beside their own."""
        whole = {name: list(values) for name, values in self[:].items()}
        if batched:
            made = dict(function(whole))
        else:
            each = [function(row) for row in self]
            made = {name: [row[name] for row in each] for name in (each[0] if each else ())}
        return LocalRows({**whole, **made}, range(len(self)))

    def to_pandas(self) -> Any:
        """As a DataFrame."""
        import pandas

        return pandas.DataFrame(dict(self[:]))


class LocalSplits(dict[str, LocalRows]):
    """LocalRows by the name of their split."""

    def with_transform(self, transform: Transform, **_: Any) -> LocalSplits:
        """Each split, changed as it is read."""
        return LocalSplits({name: rows.with_transform(transform) for name, rows in self.items()})

    def with_format(self, type: str | None = None, **_: Any) -> LocalSplits:
        """Each split in this format."""
        return LocalSplits({name: rows.with_format(type) for name, rows in self.items()})


def _tensor(value: Any) -> Tensor:
    """An image as `channel height width`, a number as a tensor of no axis."""
    if isinstance(value, Image.Image):
        pixels = np.asarray(value)
        return torch.from_numpy(np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1)))
    return torch.as_tensor(value)


class _Partitioner:
    """Any partitioner: it is asked for nothing but the number of its partitions."""

    def __init__(self, *given: Any, **options: Any) -> None:
        numbers = [value for value in (*given, options.get("num_partitions")) if isinstance(value, int)]
        self.num_partitions = numbers[0] if numbers else None


def _any_partitioner(name: str) -> type[_Partitioner]:
    """For each name that an app imports."""
    if name.startswith("__"):  # what Python asks of a module
        raise AttributeError(name)
    return _Partitioner


def _splits(opened: Opened, name: str) -> LocalSplits:
    """What stands in for the data set of this name.

    Args:
        opened: gives the local data.
    """
    image, label = _IMAGE_COLUMNS.get(name.rpartition("/")[2].lower(), ("image", "label"))
    found = opened(_SIZE)
    sides = {"train": private_side(found), "test": found.target}
    return LocalSplits(
        {
            split: LocalRows({image: Pictures(side), label: side.labels.tolist()}, range(len(side)))
            for split, side in sides.items()
        }
    )


def _table(path: Path) -> LocalSplits:
    """A .csv with a line of names; columns of numbers are numbers.

    Raises:
        FedtapError: it is no table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            names, *lines = list(csv.reader(file))
        columns = {name: _typed([line[place] for line in lines]) for place, name in enumerate(names)}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise FedtapError(
            f"--data {short(path, 100)} cannot be read as a table ({short(error, 80)}): give a .csv whose first line "
            "names its columns, a folder of images, or an .npz."
        ) from error
    rows = range(len(lines))
    return LocalSplits(
        train=LocalRows(columns, [row for row in rows if (row + 1) % _TESTED]),
        test=LocalRows(columns, [row for row in rows if not (row + 1) % _TESTED]),
    )


def _typed(texts: Sequence[str]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(text) for text in texts]
        except ValueError:
            continue
    return list(texts)


@contextmanager
def standing_in(data: Path | None, nodes: int) -> Iterator[list[str]]:
    """Inside, `flwr_datasets`, `datasets` and torchvision's data sets hand out what is at `data`; nothing is changed
    where that is None. A table stands in for no data set of torchvision's.

    Args:
        nodes: partitions, where the app's partitioner does not say.

    Yields:
        What an app asked for until now and got local data for, in a sentence each.

    Raises:
        FedtapError: nothing usable is there.
    """
    asked: list[str] = []
    if data is None:
        yield asked
        return

    def note(sentence: str) -> None:
        if sentence not in asked:
            asked.append(sentence)

    with ExitStack() as stack:
        if data.suffix == ".csv":
            table = _table(data)
            stack.enter_context(_modules_standing_in(lambda name: table, nodes, note))
        else:
            opened = cache(lambda size: open_dataset(str(data), Path(), size))
            opened(_SIZE)  # what cannot be used is told at once
            stack.enter_context(_modules_standing_in(cache(partial(_splits, opened)), nodes, note))
            stack.enter_context(torchvision_standing_in(opened, note))
        yield asked


@contextmanager
def _modules_standing_in(load: Callable[[str], LocalSplits], nodes: int, note: Callable[[str], None]) -> Iterator[None]:
    """Inside, `flwr_datasets` and `datasets` are modules that hand out what `load` gives for a data set's name."""

    class FederatedDataset:
        """As flwr_datasets' own."""

        def __init__(self, *, dataset: str = "", partitioners: Mapping[str, Any] | None = None, **_: Any) -> None:
            self._splits = load(dataset)
            note("the app's own data and partitions: local data stood in for them, split evenly")
            self.partitioners = {
                split: _Partitioner(one) if isinstance(one, int) else one for split, one in (partitioners or {}).items()
            }

        def load_partition(self, partition_id: int, split: str | None = None) -> LocalRows:
            """Every so many-th row."""
            name = split or next(iter(self.partitioners), "train")
            rows, partitioner = self.load_split(name), self.partitioners.get(name)
            many = getattr(partitioner, "num_partitions", None) or nodes
            return rows.select(range(partition_id, len(rows), many))

        def load_split(self, split: str) -> LocalRows:
            """All rows of a split; what is not called train is the test split."""
            return self._splits["train" if split.startswith("train") else "test"]

    def load_dataset(path: str, *_: Any, split: str | None = None, **options: Any) -> LocalRows | LocalSplits:
        splits = load(path)
        note("the app's own data: local data stood in for them")
        return splits if split is None else splits["train" if split.startswith("train") else "test"]

    flower, partitioner, plain = (
        ModuleType(name) for name in ("flwr_datasets", "flwr_datasets.partitioner", "datasets")
    )
    vars(flower).update(FederatedDataset=FederatedDataset, partitioner=partitioner, __path__=[])
    vars(partitioner).update(__getattr__=_any_partitioner)
    vars(plain).update(load_dataset=load_dataset, Dataset=LocalRows, DatasetDict=LocalSplits)
    replaced = {module.__name__: module for module in (flower, partitioner, plain)}
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
