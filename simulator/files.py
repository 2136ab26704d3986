"""Files that are whole or absent, and files that strangers sent."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

from fedtap.simulator.errors import FedtapError, short

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON = 16 << 20
"""Bytes of a JSON file that describes something; draws and data of posteriordb may be larger."""

DEEPEST, MOST_INSIDE = 32, 1_000_000
"""How deep lists and objects of a JSON file may stand in each other, and how many there may be."""


LARGEST_TENSORS = 1 << 36
"""Bytes of a safetensors file."""

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.fedtap-part", re.DOTALL)
"""Names of files that are being written: a run that is killed may leave one."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and move it there in one step, so that a reader never sees half of it.

    Raises:
        FedtapError: the folder cannot be made or written (no permission, no space left, no such name).
    """
    with whole(path) as file:
        file.write(content)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is moved to `path` in one step once all is written, and is gone if that fails.

    Raises:
        FedtapError: as `write_atomically`.
    """
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                yield file
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a name with NUL in it is a ValueError
        raise _not_written(path, error) from error


def is_file(path: Path) -> bool:
    """Whether a file lies there; no path is too long or too strange to ask."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a loop of links, a folder that may not be entered
        return False


def exists(path: Path) -> bool:
    """Whether anything lies there; no path is too long or too strange to ask."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a file that a stranger sent.

    Raises:
        FedtapError: there is no such file, it cannot be read, or it has more than `largest` bytes.
    """
    try:
        if not is_file(path):  # nor read from a pipe or a device, which may never end
            raise FileNotFoundError
        size = path.stat().st_size
        if size <= largest:
            return path.read_bytes()
    except FileNotFoundError as error:
        raise FedtapError(f"{short(path, 120)} is no file, so it cannot be read: check the path.") from error
    except (OSError, ValueError, MemoryError) as error:
        reason = short(getattr(error, "strerror", None) or error or "it does not fit into memory")
        raise FedtapError(f"{short(path, 120)} cannot be read ({reason}): check its permissions and size.") from error
    raise FedtapError(
        f"{short(path, 120)} has {size:,} bytes, and no file of its kind has more than {largest:,}: give another."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a stranger sent.

    Its numbers fit into 64 bits, its strings are Unicode, and it is nested no deeper than DEEPEST.

    Raises:
        FedtapError: naming the path; the file is absent, too large, not UTF-8, no JSON, nested too deep, or no object.
    """
    content = parse_json(read_bytes(path, LARGEST_JSON), path)
    if not isinstance(content, dict):
        raise FedtapError(
            f"{short(path, 120)} holds no JSON object but {short(json.dumps(content), 30)}: it is another file, or "
            "damaged."
        )
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file that a stranger sent, by name; never larger than the file.

    Raises:
        FedtapError: the file is absent, too large, cut short, or of another format.
    """
    return parse_tensors(read_bytes(path, LARGEST_TENSORS), path)


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """What the bytes of a safetensors file hold, as `read_tensors`; `path` is the one to name."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        # all but the first are torch's, of a type or a shape that it does not know
        raise FedtapError(
            f"{short(path, 120)} cannot be read as safetensors ({short(error)}): it is truncated or of another format; "
            "save it again."
        ) from error


def check_zip(archive: zipfile.ZipFile, largest: int) -> None:
    """Refuse a zip that unfolds to more than its reader could hold; nothing is unfolded.

    Raises:
        ValueError: it unfolds to more than `largest` bytes, or by a method whose tables alone may fill the memory.
    """
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in archive.infolist()):
        raise ValueError("it is compressed by another method than deflate")
    size = sum(info.file_size for info in archive.infolist())  # zipfile reads no more of a member than this says
    if size > largest:
        raise ValueError(f"it unfolds to {size:,} bytes, and no more than {largest:,} are read")


def parse_json(content: bytes, path: Path) -> Any:
    """What the bytes of a JSON file, or of a line of it, say, as `read_json` but of any type.

    Raises:
        FedtapError: as `read_json`; `path` is the one to name.
    """
    try:
        if content.count(b"[") + content.count(b"{") > MOST_INSIDE:
            raise ValueError(f"it holds more than {MOST_INSIDE:,} lists and objects")
        value = json.loads(content.decode("utf-8-sig"))  # some editors put a byte order mark first (RFC 8259, 8.1)
        _check(value)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, and a number of 5,000 digits
        deep = isinstance(error, RecursionError)
        reason = f"it is nested deeper than {DEEPEST}" if deep else short(getattr(error, "reason", error))
        raise FedtapError(
            f"{short(path, 120)} cannot be read as JSON ({reason}): it is damaged or another file; fetch it again."
        ) from error
    return value


def _check(value: Any) -> None:
    """Raise ValueError of what later code, or a terminal, could not bear."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST}")
        inside: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inside += one
                inside += one.values()
            elif isinstance(one, list):
                inside += one
            elif isinstance(one, str):
                one.encode("utf-8")  # half of a surrogate pair cannot be printed or written
            elif isinstance(one, int) and not -(2**63) <= one < 2**63:
                raise ValueError("it holds a whole number that 64 bits cannot hold")
        level, depth = inside, depth + 1


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


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries that a killed run left in this folder; none where there is no such folder."""
    with contextlib.suppress(OSError):
        for file in [file for file in folder.iterdir() if TEMPORARY.fullmatch(file.name)]:
            file.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.fedtap-part")


def _not_written(path: Path, error: OSError | ValueError) -> FedtapError:
    why = short(getattr(error, "strerror", None) or error)
    return FedtapError(f"{short(path, 120)} could not be written ({why}): make room or name another folder, --out.")
