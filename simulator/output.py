"""The folder a run leaves: `run.json`, `rows.jsonl`, `leaks/`, `guesses/`, `attackers/`, `strip.png`, `report.html`.

Practice pairs lie in `practice/`, and stay there for the next run that asks for the same ones. An attack on saved leaks
also leaves `pictures/`.

Every file is written whole or not at all, so a run that is stopped leaves what it had finished.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from simulator.attack import Guess, Reconstruction
from simulator.errors import FedtapError
from simulator.files import write_atomically
from simulator.leaks import Leak

Row = dict[str, Any]
"""One victim under one attack; the README lists the columns."""


class Folder:
    """An output folder of ours: new, replaced, or gone on with.

    Args:
        path: the folder; made where it does not exist.
        about: what is played: `name`, `scenario` (the parts' reprs), seed, versions, device.
        resume: go on with the run that is there, if it is the same.

    Raises:
        FedtapError: the folder holds something else, another scenario's run, or another run than the one to resume.
    """

    def __init__(self, path: Path, about: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.about = about
        self.rows: list[Row] = []
        before = left_by_us(path, about["name"])
        if resume and before is not None:
            differs = [name for name in ("scenario", "device", "versions") if before.get(name) != about[name]]
            if differs:
                raise FedtapError(
                    f"{path} holds a run with another {' and '.join(differs)}, so it cannot be resumed: "
                    "repeat what its run.json says, or run again without --resume."
                )
            self.rows = self._read_rows()
        elif before is not None:
            for name in ("rows.jsonl", "strip.png", "report.html"):
                (path / name).unlink(missing_ok=True)
            for name in ("leaks", "guesses", "pictures", "attackers"):
                shutil.rmtree(path / name, ignore_errors=True)
        self.describe(finished=False)

    def describe(self, **more: Any) -> None:
        """Write run.json, with `more` in it."""
        self.about |= more
        self.write("run.json", json.dumps(self.about, indent=2).encode() + b"\n")

    def add(self, rows: list[Row]) -> None:
        """Append rows to rows.jsonl."""
        self.rows += rows
        self.write("rows.jsonl", b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in self.rows))

    def write(self, name: str, content: bytes) -> None:
        """Write one of the folder's files."""
        write_atomically(self.path / name, content)

    def leak(self, unit: str, leak: Leak) -> None:
        """Save a part's leak.

        Raises:
            FedtapError: the run that is resumed heard another one: its data or its clients have changed.
        """
        path = self.path / f"leaks/{unit}.safetensors"
        if self.rows and path.is_file() and path.read_bytes() != leak.packed():
            raise FedtapError(
                f"{path} is not what this run hears: the data or the clients have changed since; "
                "run again without --resume."
            )
        leak.save(path)

    def keep(self, unit: str, guess: Guess) -> None:
        """Save a guess, so that a resumed run can show it."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in guess.tensors().items()}
        self.write(f"guesses/{unit}.safetensors", save(tensors))

    def kept(self, unit: str) -> Reconstruction | None:
        """The saved reconstruction of this unit, if it is there and whole."""
        try:
            tensors = load_file(self.path / f"guesses/{unit}.safetensors")
            return Reconstruction(tensors["images"], tensors["labels"], tensors["objective"])
        except (FileNotFoundError, SafetensorError, KeyError):
            return None

    def _read_rows(self) -> list[Row]:
        try:
            return [json.loads(line) for line in (self.path / "rows.jsonl").read_text().splitlines()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise FedtapError(
                f"{self.path / 'rows.jsonl'} is damaged ({error}): run again without --resume."
            ) from error


def left_by_us(path: Path, name: str) -> dict[str, Any] | None:
    """run.json of the run that a folder holds; None where there is no such folder or nothing in it.

    Args:
        name: of the scenario that is to be played there.

    Raises:
        FedtapError: the folder holds something else, or another scenario's run.
    """
    if not path.exists():
        return None
    if not path.is_dir():
        raise FedtapError(f"{path} is a file, and a run leaves several: name a folder with --out.")
    if not any(path.iterdir()):
        return None
    try:
        before = json.loads((path / "run.json").read_text())
        if "fedtap" not in before["versions"]:
            raise KeyError("fedtap")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedtapError(
            f"{path} holds files that no fedtap run left, and a run would mix with them: name another --out."
        ) from error
    if before.get("name") != name:
        raise FedtapError(
            f"{path} holds a run of {before.get('name')!r}, which {name!r} would replace: name another --out."
        )
    return dict(before)
