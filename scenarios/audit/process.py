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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtap.simulator.errors import Stopped, short

GRACE = 60.0
"""Seconds that the process has after its time to end what it does and write what it found."""

_ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""So that Flower sends nothing and asks nothing."""


def run_in_process(module: str, settings: Mapping[str, Any], folder: Path, log: Path, seconds: float) -> int | None:
    """`python -P -m MODULE SETTINGS` in `folder`; its exit code, None where it was ended since time was over.

    Args:
        log: file for what it prints.
        seconds: its time, after which it has GRACE.

    Raises:
        Stopped: somebody pressed Ctrl-C; what was found by then is kept.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, json.dumps(settings)],
            cwd=folder,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            return None
        except KeyboardInterrupt:
            raise Stopped(f"stopped: what was found is in {short(log.parent)}.") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the code may have left processes of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


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
