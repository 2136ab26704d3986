"""`--parallel N`: a sweep's settings in processes of their own, and their folders put together into one run.

Each process plays its share of the settings into a folder beside the run's. What it leaves there is what a run that was
stopped leaves, so that the run goes on from it (`--resume`): it finds every attack done, in the order of the settings,
and makes the page. So the rows are those of one process, but for the times in them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import write_atomically
from fedtap.simulator.progress import progress
from fedtap.simulator.report.folder import FOLDERS, left_by_us


@dataclass(frozen=True)
class Share:
    """The settings that one process plays."""

    name: str
    """The scenario."""
    words: tuple[str, ...]
    """Its options, as on the command line."""
    numbers: tuple[int, ...]
    """The settings' places in the plan."""
    out: Path
    """The folder of this process alone."""
    data_root: Path
    device: str
    film: bool


def play_apart(
    name: str,
    words: Sequence[str],
    settings: int,
    processes: int,
    where: Path,
    data_root: Path,
    device: str,
    film: bool,
) -> None:
    """Deal so many settings out among the processes, and leave in `where` what a stopped run of all would.

    Raises:
        FedtapError: the first of theirs; what the others have finished is in `where`.
    """
    errors: list[FedtapError] = []
    with tempfile.TemporaryDirectory(prefix=f".{where.name}-", dir=where.parent) as apart:
        dealt = [tuple(range(first, settings, processes)) for first in range(min(processes, settings))]
        shares = [
            Share(name, tuple(words), mine, Path(apart) / str(place), data_root, device, film)
            for place, mine in enumerate(dealt)
        ]
        try:
            with ProcessPoolExecutor(len(shares), mp_context=get_context("spawn")) as pool:
                tasks = [pool.submit(_play_share, share) for share in shares]
                said = [task.result() for task in progress(as_completed(tasks), "process")]
            errors += [FedtapError(sentence) for sentence in said if sentence is not None]
        except BrokenProcessPool as error:
            errors.append(FedtapError(f"A process of --parallel was killed ({short(error, 100)}): lower its number."))
        finally:
            _put_together([share.out for share in shares], where)
    if errors:
        raise errors[0]


def _play_share(share: Share) -> str | None:
    """The sentence of what went wrong, if anything did: an exception need not survive the way between processes."""
    from fedtap.scenarios.command.main import play_some

    try:
        play_some(share.name, list(share.words), share.numbers, share.out, share.data_root, share.device, share.film)
    except FedtapError as error:
        return str(error)
    return None


def _put_together(parts: Sequence[Path], where: Path) -> None:
    """Move what the processes left into one folder, whose run.json does not call the run finished."""
    abouts = [(part, about) for part in parts if part.is_dir() and (about := left_by_us(part)) is not None]
    if not abouts:
        return
    where.mkdir(parents=True, exist_ok=True)
    done: dict[str, str] = {}
    rows: list[bytes] = []
    for part, about in abouts:
        done |= about.get("done") or {}
        if (part / "rows.jsonl").is_file():
            rows.append((part / "rows.jsonl").read_bytes())
        for name in (*FOLDERS, "auxiliary"):
            for file in sorted((part / name).glob("*")):
                (where / name).mkdir(exist_ok=True)
                if not (where / name / file.name).exists():
                    shutil.move(file, where / name / file.name)
    write_atomically(where / "rows.jsonl", b"".join(rows))
    whole = abouts[0][1] | {"done": done, "finished": False}
    write_atomically(where / "run.json", json.dumps(whole, indent=2).encode() + b"\n")
