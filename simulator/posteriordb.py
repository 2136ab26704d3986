"""Files of posteriordb: reference draws of a posterior, and the data that they are of, as JSON or zipped JSON.

Magnusson and others 2024, https://github.com/stan-dev/posteriordb. Draws are chains, each parameter name -> numbers;
data are name -> number or list of numbers.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simulator.errors import FedtapError, unknown

LARGEST = 1 << 30
"""Bytes that a zipped file may unfold to."""

LARGEST_NUMBER = 1e100
"""Squares of larger ones, summed, are infinite in double precision."""


def read_draws(path: Path) -> tuple[tuple[str, ...], Float[Tensor, "draws d"]]:
    """The parameters' names, in the file's order, and the draws of all chains.

    Raises:
        FedtapError: the file is damaged, of another form, or holds what is no number.
    """
    content = _read(path)
    chains = content if isinstance(content, list) else [content]
    if not chains or not all(isinstance(chain, dict) and chain for chain in chains):
        raise FedtapError(
            f"{path} holds no draws in posteriordb's form: it is a list of chains, each an object of parameter name "
            "and list of numbers."
        )
    names = tuple(chains[0])
    if any(set(chain) != set(names) for chain in chains):
        raise FedtapError(f"The chains in {path} are of different parameters, so they are not of one posterior.")
    parts = [_columns(path, chain, names) for chain in chains]
    return names, torch.cat(parts)


def read_columns(path: Path, names: Sequence[str]) -> Float[Tensor, "records columns"]:
    """These columns of a data file.

    Raises:
        FedtapError: the file is damaged, has no such column, or they are of unequal length or no numbers.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise FedtapError(f"{path} holds no data in posteriordb's form: it is one object of name and list of numbers.")
    columns = [name for name, values in content.items() if isinstance(values, list)]
    for name in names:
        if name not in columns:
            raise unknown(f"column of {path.name}", name, columns)
    return _columns(path, content, names)


def _columns(path: Path, content: Mapping[str, Any], names: Sequence[str]) -> Float[Tensor, "rows columns"]:
    for name in names:
        values = content[name]
        if not isinstance(values, list) or not values:
            raise FedtapError(f"{name} in {path} is no list of numbers: give posteriordb's own form.")
        if len(values) != len(content[names[0]]):
            raise FedtapError(
                f"{names[0]} and {name} in {path} have {len(content[names[0]])} and {len(values)} entries, and belong "
                "together one by one: the file is not whole."
            )
        for at, value in enumerate(values):
            sound = isinstance(value, int | float) and not isinstance(value, bool)
            if not sound or not -LARGEST_NUMBER < value < LARGEST_NUMBER:  # nor NaN
                raise FedtapError(
                    f"Entry {at + 1} of {name} in {path} is {json.dumps(value)[:40]}, and no finite number of a "
                    "size that can be squared: take it out, and what stands beside it."
                )
    return torch.tensor([content[name] for name in names], dtype=torch.float64).T


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FedtapError(f"{path} is no file: name a .json or .json.zip file of posteriordb's form.")
    try:
        if path.suffix.lower() != ".zip":
            return json.loads(path.read_text(encoding="utf-8"))
        with zipfile.ZipFile(path) as folder:
            files = [info for info in folder.infolist() if info.filename.endswith(".json")]
            if len(files) != 1:
                raise FedtapError(
                    f"{path} holds {len(files)} .json files, so it is not clear which is meant: give a .json.zip with "
                    "one, or unpack it and give a .json."
                )
            if files[0].file_size > LARGEST:
                raise FedtapError(f"{path} unfolds to {files[0].file_size:,} bytes, which is no such file: unpack it.")
            return json.loads(folder.read(files[0]))
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        # json and UTF-8 raise ValueErrors, zipfile a RuntimeError of a password; deep nesting is one too
        raise FedtapError(
            f"{path} cannot be read ({error}): it is damaged or of another format; fetch it again."
        ) from error
