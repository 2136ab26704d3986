"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from uuid import uuid4

from simulator.errors import FedtapError, short

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.fedtap-part", re.DOTALL)
"""Names of files that are being written: a run that is killed may leave one."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and move it there in one step, so that a reader never sees half of it.

    Raises:
        FedtapError: the folder cannot be made or written (no permission, no space left, no such name).
    """
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a name with NUL in it is a ValueError
        raise _not_written(path, error) from error


def check_writable(folder: Path) -> None:
    """Make the folder and a file in it, and take away again what was not there.

    Raises:
        FedtapError: it cannot be made or written.
    """
    made: list[Path] = []
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = _beside(folder / "run.json")
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise _not_written(folder, error) from error
    finally:
        for empty in made:
            with contextlib.suppress(OSError):  # it could not be made, or another run has begun in it
                empty.rmdir()


def sweep(folder: Path) -> None:
    """Remove the temporaries that a killed run left in this folder; none where there is no such folder."""
    with contextlib.suppress(OSError):
        for file in [file for file in folder.iterdir() if TEMPORARY.fullmatch(file.name)]:
            file.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.fedtap-part")


def _not_written(path: Path, error: OSError | ValueError) -> FedtapError:
    why = getattr(error, "strerror", None) or error
    return FedtapError(f"{short(path)} could not be written ({why}): make room or name another folder, --out.")
