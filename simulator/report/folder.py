"""The folder a run leaves: `run.json`, `rows.jsonl`, `leaks/`, `reconstructions/`, `trained_attacks/`, `strip.png`,
`report.html`.

Auxiliary pairs lie in `auxiliary/`, and stay there for the next run that asks for the same ones. An attack on saved
leaks also leaves `pictures/`.

Every file is written whole or not at all, so a run that is stopped leaves what it had finished. A run takes nobody's
place but its own: one with other settings goes to another folder, unless it is told to overwrite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedtap.simulator.attack import Attack, Reconstructed
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import TEMPORARY, check_writable, remove_leftovers, write_atomically
from fedtap.simulator.leaks import Leak
from fedtap.simulator.report.saved_run import parsed, read_rows
from fedtap.simulator.scenario import Row

SCHEMA = 2
"""Version of run.json; version 1, of fedtap 0.1, held the settings in Python's own words."""

SETTINGS = ("schema", "name", "settings", "seed", "leak", "device", "versions")
"""What is the same in run.json of two runs that give the same rows."""

FILES = ("rows.jsonl", "rows.csv", "strip.png", "report.html")
"""Beside run.json, what a run leaves in its folder."""

FOLDERS = {
    "leaks": re.compile(r"part_\d+(-round_\d+-client_\d+)?\.(safetensors|json)"),
    "reconstructions": re.compile(r"(part_\d+-)?\d+-[a-z0-9_]*\.safetensors"),
    "pictures": re.compile(r"\d+-[a-z0-9_]*-victim_\d+\.png"),
    "films": re.compile(r"part_\d+-\d+-[a-z0-9_]*\.gif"),
    "trained_attacks": re.compile(r"part_\d+(-\d+)+-[a-z0-9_]*\.(safetensors|json)"),
}
"""Its folders, and how the files are named that it leaves in them."""


class Folder:
    """An output folder of ours: new, played again, or gone on with.

    Args:
        path: the folder; made where it does not exist.
        about: what is played: `name`, `scenario` (the parts' reprs), seed, versions, device.
        resume: go on with the run that is there, if it is the same.
        overwrite: take the place of another run.

    Raises:
        FedtapError: see `judged`.
    """

    def __init__(self, path: Path, about: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self.about = about
        self.rows: list[Row] = []
        self.before: dict[str, list[Row]] = {}
        """Rows of the resumed run, by unit, that this one has not come to yet."""
        self._done: dict[str, str] = {}
        """Unit -> digest of its rows, once all of them are there; file of reconstructions/ -> digest of its bytes."""
        before = check_folder(path, about, resume=resume, overwrite=overwrite)
        if resume and before is not None:
            for row in read_rows(path / "rows.jsonl"):
                self.before.setdefault(row["unit"], []).append(row)
            done = before.get("done")
            self._done = dict(done) if isinstance(done, dict) else {}
        for folder in (path, *(path / name for name in FOLDERS), *(path / "auxiliary").glob("*")):
            remove_leftovers(folder)
        if before is not None and not resume:
            self._clear(before)
        self.describe(finished=False, done=self._done)

    def describe(self, **more: Any) -> None:
        """Write run.json, with `more` in it."""
        self.about |= more
        self.write("run.json", _lines(self.about, indent=2))

    def add(self, rows: list[Row]) -> None:
        """Append rows to rows.jsonl, before those that are still to be come to."""
        self.rows += rows
        self.write("rows.jsonl", b"".join(map(_lines, itertools.chain(self.rows, *self.before.values()))))

    def replace(self, unit: str, rows: list[Row]) -> None:
        """Append the rows of a unit, in the place of those that the resumed run had of it."""
        self.before.pop(unit, None)
        self.add(rows)

    def done(self, unit: str) -> list[Row] | None:
        """The rows that the resumed run has of a unit; None unless all of them are there, as they were written."""
        rows = self.before.get(unit)
        return rows if rows and self._done.get(unit) == _digest(b"".join(map(_lines, rows))) else None

    def complete(self, unit: str, rows: list[Row]) -> None:
        """Append all rows of a unit, and note that they are all."""
        self.replace(unit, rows)
        self._done[unit] = _digest(b"".join(map(_lines, rows)))
        self.describe(done=self._done)

    def finish(self) -> None:
        """Nothing more comes."""
        if self.before:  # of units that this run does not have
            self.before = {}
            self.add([])
        self.describe(finished=True)

    def write(self, name: str, content: bytes) -> None:
        """Write one of the folder's files."""
        write_atomically(self.path / name, content)

    def leak(self, unit: str, leak: Leak) -> None:
        """Save a part's leak.

        Raises:
            FedtapError: the run that is resumed heard another one: its data or its clients have changed.
        """
        path = self.path / f"leaks/{unit}.safetensors"
        if (self.rows or self.before) and path.is_file() and path.read_bytes() != leak.packed():
            raise FedtapError(
                f"{short(path)} is not what this run hears: the data or the clients have changed since; "
                "run again without --resume."
            )
        leak.save(path)
        self.settled(unit)

    def observed(self, unit: str, leak: Leak) -> None:
        """Save the leak of one victim as it is observed; it stays there if the part is never played to its end."""
        (client,), (rnd,) = leak.clients.tolist(), leak.rounds.tolist()
        leak.save(self.path / f"leaks/{unit}-round_{rnd}-client_{client}.safetensors")

    def settled(self, unit: str) -> None:
        """Remove the single leaks of a part of which all were observed: what is to be kept of them is in one stack."""
        for file in (self.path / "leaks").glob(f"{unit}-round_*"):
            if FOLDERS["leaks"].fullmatch(file.name):
                file.unlink()

    def keep(self, unit: str, reconstruction: Reconstructed) -> None:
        """Save a reconstruction, so that a resumed run can show it."""
        # a copy of each: an attack may bring back one tensor under two names, which safetensors refuses
        tensors = {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in reconstruction.tensors().items()
        }
        content = save(tensors)
        self.write(f"reconstructions/{unit}.safetensors", content)
        self._done[f"reconstructions/{unit}"] = _digest(content)

    def kept(self, unit: str, attack: Attack[Any], leak: Leak) -> Reconstructed | None:
        """The saved reconstruction of this unit, if it is there, byte by byte as it was written, and of such a leak."""
        try:
            content = (self.path / f"reconstructions/{unit}.safetensors").read_bytes()
            if self._done.get(f"reconstructions/{unit}") != _digest(content):
                return None
            tensors, made = load(content), attack.reconstructs
            names = {field.name for field in dataclasses.fields(made)}  # type: ignore[arg-type]
            return made(**{name: tensor for name, tensor in tensors.items() if name in names}).checked(leak)
        except (OSError, SafetensorError, KeyError, TypeError, AssertionError):
            return None

    def _clear(self, before: dict[str, Any]) -> None:
        """Remove what fedtap left, and nothing else. In between, run.json does not call the old run finished."""
        self.write("run.json", _lines(before | {"finished": False}, indent=2))
        try:
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
            for name, pattern in FOLDERS.items():
                folder = self.path / name
                files = folder.iterdir() if folder.is_dir() else ()
                for file in [file for file in files if pattern.fullmatch(file.name)]:
                    file.unlink()
                with contextlib.suppress(OSError):  # it is not there, or holds files of the user's own
                    folder.rmdir()
        except OSError as error:
            raise FedtapError(
                f"The run in {short(self.path)} cannot be removed ({error.strerror}): name another folder, --out."
            ) from error


def check_folder(
    path: Path, about: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any] | None:
    """run.json of the run in a folder in which a run of `about` may be left; None where there is none.

    Nothing is lost there: it is the run to resume, a run with the same settings, or one that may be overwritten.

    Raises:
        FedtapError: the folder cannot be written, holds something else or another run, or rows to resume are damaged.
    """
    before = left_by_us(path)
    if before is not None:
        _compare(path, before, about, resume, overwrite)
    if resume:
        read_rows(path / "rows.jsonl")  # damage is told before anything is played
    check_writable(path)
    return before


def _compare(path: Path, before: dict[str, Any], about: dict[str, Any], resume: bool, overwrite: bool) -> None:
    differs = [name for name in SETTINGS if before.get(name) != about.get(name)]
    if not differs or (overwrite and not resume):
        return
    what = " and ".join(differs)
    if resume:
        raise FedtapError(
            f"{short(path)} holds a run that differs in {what}, so it cannot be resumed: repeat what its run.json "
            f"says, "
            "or name another --out without --resume."
        )
    whose = f"a run of {short(before.get('name'))}" if "name" in differs else f"a run that differs in {what}"
    raise FedtapError(
        f"{short(path)} holds {whose}, which this one would replace: add --overwrite, or name another --out."
    )


def place(
    about: dict[str, Any], out: Path | None, usual: Path, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """The folder in which a run of `about` is to be left.

    Args:
        out: as the user said; then it is this one.
        usual: where nothing was said: this folder, or the same name with -2, -3, … The newest of them that holds a run
            with the same settings; where none does, the first that is free.

    Raises:
        FedtapError: see `judged`; or there are runs, and none of them can be resumed.
    """
    if resume and overwrite:
        raise FedtapError("--resume goes on with a run and --overwrite removes it: leave out one of them.")
    if out is not None or overwrite:
        check_folder(out or usual, about, resume=resume, overwrite=overwrite)
        return out or usual
    runs, free = _numbered(usual)
    same = [path for path, before in runs if all(before.get(name) == about.get(name) for name in SETTINGS)]
    if resume and runs and not same:
        check_folder(runs[-1][0], about, resume=True)
    where = same[-1] if same else free
    check_folder(where, about, resume=resume)
    return where


def _numbered(usual: Path) -> tuple[list[tuple[Path, dict[str, Any]]], Path]:
    """Of `usual` and its numbered siblings, the runs, newest last, and the first that is free."""
    name = re.compile(re.escape(usual.name) + r"(?:-([1-9]\d*))?")
    try:
        found = {int(match[1] or 1): path for path in usual.parent.iterdir() if (match := name.fullmatch(path.name))}
    except OSError:  # there is none yet, or `judged` will say why it cannot be
        found = {}
    runs, taken = [], set()
    for number, path in sorted(found.items()):
        try:
            before = left_by_us(path)
        except FedtapError:
            taken.add(number)
            continue
        if before is not None:
            taken.add(number)
            runs.append((path, before))
    free = next(number for number in itertools.count(1) if number not in taken)
    runs.sort(key=lambda run: str(run[1].get("started")))
    return runs, usual if free == 1 else usual.with_name(f"{usual.name}-{free}")


def left_by_us(path: Path) -> dict[str, Any] | None:
    """run.json of the run that a folder holds; None where there is no such folder, or nothing but our temporaries.

    Raises:
        FedtapError: the folder cannot be looked into, or holds something else.
    """
    try:
        files = [file.name for file in path.iterdir()]
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise FedtapError(
            f"{short(path)} is a file or lies in one, and a run leaves several: name a folder with --out."
        ) from error
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, NUL in it, no permission
        why = getattr(error, "strerror", None) or error
        raise FedtapError(f"{short(path)} cannot be looked into ({why}): name another folder, --out.") from error
    if all(map(TEMPORARY.fullmatch, files)):
        return None
    try:
        before = parsed((path / "run.json").read_bytes())
        if not isinstance(before, dict) or "fedtap" not in dict(before["versions"]):
            raise ValueError("no versions of fedtap")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedtapError(
            f"{short(path)} holds files that no fedtap run left, and a run would mix with them: name another --out."
        ) from error
    return before


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _lines(document: Any, indent: int | None = None) -> bytes:
    return json.dumps(document, indent=indent, allow_nan=False).encode() + b"\n"
