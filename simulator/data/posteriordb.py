"""Files of posteriordb: reference draws of a posterior, and the data that they are of, as JSON or zipped JSON.

Magnusson and others 2024, https://github.com/stan-dev/posteriordb. Draws are chains, each parameter name -> numbers;
data are name -> number or list of numbers.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.files import check_zip, is_file, parse_json, read_bytes

LARGEST_ARCHIVE = 1 << 27
"""Bytes of a file, unfolded."""

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
            f"{short(path, 100)} holds no draws in posteriordb's form: it is a list of chains, each an object of "
            "parameter name and list of numbers."
        )
    names = tuple(chains[0])
    if any(set(chain) != set(names) for chain in chains):
        raise FedtapError(
            f"The chains in {short(path, 100)} are of different parameters, so they are not of one posterior."
        )
    parts = [_columns(path, chain, names) for chain in chains]
    return names, torch.cat(parts)


def read_columns(path: Path, names: Sequence[str]) -> Float[Tensor, "records columns"]:
    """These columns of a data file.

    Raises:
        FedtapError: the file is damaged, has no such column, or they are of unequal length or no numbers.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise FedtapError(
            f"{short(path, 100)} holds no data in posteriordb's form: it is one object of name and list of numbers."
        )
    columns = [name for name, values in content.items() if isinstance(values, list)]
    for name in names:
        if name not in columns:
            raise unknown(f"column of {short(path.name)}", name, columns)
    return _columns(path, content, names)


def _columns(path: Path, content: Mapping[str, Any], names: Sequence[str]) -> Float[Tensor, "rows columns"]:
    for name in names:
        values = content[name]
        if not isinstance(values, list) or not values:
            raise FedtapError(
                f"{short(name)} in {short(path, 100)} is no list of numbers: give posteriordb's own form."
            )
        if len(values) != len(content[names[0]]):
            raise FedtapError(
                f"{short(names[0], 30)} and {short(name, 30)} in {short(path, 80)} have {len(content[names[0]])} and "
                f"{len(values)} entries, and belong together one by one: the file is not whole."
            )
        for at, value in enumerate(values):
            sound = isinstance(value, int | float) and not isinstance(value, bool)
            if not sound or not -LARGEST_NUMBER < value < LARGEST_NUMBER:  # nor NaN
                raise FedtapError(
                    f"Entry {at + 1} of {short(name, 40)} in {short(path)} is {json.dumps(value)[:40]}, and no finite "
                    "number of a size that can be squared: take it out, and what stands beside it."
                )
    return torch.tensor([content[name] for name in names], dtype=torch.float64).T


def _read(path: Path) -> Any:
    if not is_file(path):
        raise FedtapError(f"{short(path, 120)} is no file: name a .json or .json.zip file of posteriordb's form.")
    if path.suffix.lower() != ".zip":
        return parse_json(read_bytes(path, LARGEST_ARCHIVE), path)
    try:
        with zipfile.ZipFile(path) as folder:
            check_zip(folder, LARGEST_ARCHIVE)
            files = [info for info in folder.infolist() if info.filename.endswith(".json")]
            content = folder.read(files[0]) if len(files) == 1 else b""
    except Exception as error:  # zipfile raises all sorts
        raise FedtapError(
            f"{short(path, 100)} cannot be read ({short(error, 90)}): it is damaged or of another format; fetch it "
            "again."
        ) from error
    if len(files) != 1:
        raise FedtapError(
            f"{short(path, 100)} holds {len(files)} .json files, so it is not clear which is meant: give a .json.zip "
            "with one, or unpack it and give a .json."
        )
    return parse_json(content, path)
