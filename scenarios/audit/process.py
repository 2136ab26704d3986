"""A process of its own for code of a user's, which may hang, exit or leave processes behind.

Nothing here imports torch or the code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtap.scenarios.flower_programs import QUIET
from fedtap.simulator.errors import FedtapError, Stopped, short

GRACE = 60.0
"""Seconds that the process has after its time to end what it does and write what it found."""


def run_in_process(
    module: str, settings: Mapping[str, Any], folder: Path, log: Path, seconds: float, home: str = ""
) -> int | None:
    """`python -P -m MODULE SETTINGS` in `folder`; its exit code, None where it was ended since time was over.

    Args:
        log: file for what it prints.
        seconds: its time, after which it has GRACE.
        home: folder for what Flower's own engines leave, of which no process outlives this one; empty for none.

    Raises:
        Stopped: somebody pressed Ctrl-C; what was found by then is kept.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, json.dumps(settings)],
            cwd=folder,
            env={**os.environ, **QUIET, **({"FLWR_HOME": home} if home else {})},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with _told_to_end():
                return process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            return None
        except KeyboardInterrupt:
            raise Stopped(f"stopped: what was found is in {short(log.parent)}.") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the code may have left processes of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if home:
                _end_all(home)


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Inside, SIGTERM, by which a build is cancelled, does what Ctrl-C does: else the app would go on alone."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread say what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_all(home: str) -> None:
    """End what is left of Flower's engines, which start processes in sessions of their own: all have this FLWR_HOME.

    Only Linux tells the environment of a process; elsewhere they end by themselves once those are gone that started
    them.
    """
    mark = f"FLWR_HOME={home}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or it has just ended
            if mark in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def seconds_left(started: float, seconds: float) -> float:
    """Of the time that began at `started` (as time.time() tells it; 0 for now), what is left, in seconds."""
    return max(seconds - (time.time() - started if started else 0.0), 0.0)


@contextlib.contextmanager
def users_code(said: Callable[[str], str], *ours: type[Exception]) -> Iterator[None]:
    """Inside, a user's code is run, which may raise anything, and may call sys.exit.

    Args:
        said: from what it raised, in words, to the sentence that tells it.
        ours: what goes through as it is, beside Ctrl-C.

    Raises:
        FedtapError: it raised something else.
    """
    through: tuple[type[BaseException], ...] = (KeyboardInterrupt, *ours)
    try:
        yield
    except through:
        raise
    except BaseException as error:
        raise FedtapError(said(f"{type(error).__name__}: {short(error, 160)}")) from error


def ending(code: int) -> str:
    """How a process ended, in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def free_folder(out: Path | None, name: str) -> Path:
    """The folder that is named, or the next free one of runs/NAME, runs/NAME-2, …"""
    number, where = 1, (out or Path("runs") / name).resolve()
    while out is None and where.exists():
        number += 1
        where = Path(f"runs/{name}-{number}").resolve()
    return where
