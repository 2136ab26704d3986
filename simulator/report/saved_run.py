"""A run that is read again: `run.json` and `rows.jsonl` of the folder that it left. Reading them imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.report.columns import AnyRow, said

_RESUMED = "run again without --resume"

_AGAIN = "play it again, with --overwrite"


@dataclass(frozen=True)
class SavedRun:
    """What a run's folder says."""

    path: Path
    """The folder."""
    about: Mapping[str, Any]
    """run.json."""
    rows: list[dict[str, Any]]
    """rows.jsonl, in its order."""

    @property
    def name(self) -> str:
        """The scenario's, or `attack` for a run on saved leaks."""
        return str(self.about["name"])

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.about.get("finished") is True

    @property
    def options(self) -> dict[str, list[Any]]:
        """Option -> its values over the run's settings, each once, in their order."""
        found: dict[str, dict[str, Any]] = {}
        for setting in self.about.get("settings") or ():
            for name, value in setting.items() if isinstance(setting, dict) else ():
                found.setdefault(name, {})[said(value)] = value
        return {name: list(values.values()) for name, values in found.items()}


def read_run(path: Path, *, unfinished: bool = False) -> SavedRun:
    """The run that a folder holds.

    Args:
        path: the folder, or its run.json.
        unfinished: whether a run may have stopped before its end.

    Raises:
        FedtapError: there is no run, it is damaged, of another version of run.json, or not finished.
    """
    folder = path.parent if path.name == "run.json" else path
    try:
        content = (folder / "run.json").read_bytes()
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise FedtapError(
            f"{short(folder)} holds no run, since its run.json cannot be read "
            f"({getattr(error, 'strerror', None) or error}): name a folder that fedtap run left, such as runs/NAME."
        ) from error
    try:
        about = parsed(content)
        if not isinstance(about, dict) or type(about["name"]) is not str or "fedtap" not in dict(about["versions"]):
            raise ValueError("it names no scenario or no version of fedtap")
        written, wanted = about["schema"], schema("run")["properties"]["schema"]["const"]
    except (ValueError, KeyError, TypeError) as error:
        raise FedtapError(f"{short(folder / 'run.json')} is damaged ({short(error)}): {_AGAIN}.") from error
    if written != wanted:
        raise FedtapError(
            f"{short(folder / 'run.json')} is of version {short(written, 20)}, written by fedtap "
            f"{short(dict(about['versions'])['fedtap'], 20)}, and this fedtap reads version {wanted}: read it with "
            "that fedtap, or play it again here."
        )
    run = SavedRun(folder, about, read_rows(folder / "rows.jsonl", remedy=_AGAIN, units=False))
    if not (run.finished or unfinished):
        raise FedtapError(
            f"The run in {short(folder)} is not finished, and half of its rows would mislead: finish it, with --resume."
        )
    if not (run.rows or unfinished):
        raise FedtapError(f"The run in {short(folder)} has no rows, so there is nothing to show: {_AGAIN}.")
    return run


def runs_below(folder: Path) -> Iterator[SavedRun | FedtapError]:
    """Every run in a folder or below it, finished or not, by name; the error in the place of one that is damaged."""
    for file in sorted(folder.rglob("run.json")):
        try:
            yield read_run(file, unfinished=True)
        except FedtapError as error:
            yield error


def read_rows(path: Path, *, remedy: str = _RESUMED, units: bool = True) -> list[dict[str, Any]]:
    """The rows of a run; none where the file is not there yet.

    Args:
        remedy: what to do about a damaged file.
        units: whether each row has to name its unit, by which a run is resumed.

    Raises:
        FedtapError: a line is no row. Files are written whole, so the last one is no exception.
    """
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                raise ValueError("it is cut short")
            rows.append(_row(parsed(line), units))
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"line {len(rows) + 1}: {short(error)}"
        raise FedtapError(f"{short(path)} is damaged ({why}): {remedy}.") from error


def _row(row: Any, units: bool) -> dict[str, Any]:
    """Raises: ValueError: it is none."""
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    if units and type(row.get("unit")) is not str:
        raise ValueError("it names no unit")
    return row


def parsed(content: bytes) -> Any:
    """JSON in UTF-8, of numbers that a float can hold.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(content.decode(), parse_float=_number, parse_int=_number, parse_constant=_number)
    except RecursionError as error:
        raise ValueError("brackets within brackets, too many") from error


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{short(text)} is no number")
    return int(text) if text.lstrip("-").isdigit() else value


def schema(of: Literal["row", "run"]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a line of rows.jsonl, or of run.json."""
    text = resources.files("fedtap.simulator.report").joinpath(f"{of}.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def same_victims(first: list[AnyRow], second: list[AnyRow]) -> bool:
    """Whether two groups of rows are of the same victims, each once: the same clients in the same rounds under the same
    seeds, whose blind guesses are as good."""
    one, other = _by_victim(first), _by_victim(second)
    if len(one) < len(first) or len(other) < len(second) or one.keys() != other.keys():
        return False
    return all(_close(one[who].get(name), other[who].get(name)) for who in one for name in BLINDS)


BLINDS = ("psnr_blind", "blind", "blind_distance")
"""Columns of the blind guess, which depends on the victim's data and not on the attack."""


def _by_victim(rows: list[AnyRow]) -> dict[tuple[Any, ...], AnyRow]:
    return {tuple(row.get(name) for name in ("client", "round", "seed")): row for row in rows}


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-9)
    return bool(one == other)
