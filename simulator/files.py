"""Files that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from simulator.errors import FedtapError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and move it there in one step, so that a reader never sees half of it.

    Raises:
        FedtapError: the folder cannot be made or written (no permission, no space left).
    """
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise FedtapError(
            f"{path} could not be written ({error.strerror or error}): make room or name another folder, --out."
        ) from error
