"""Kill runs at many moments, go on, and compare: `python -m tests.support.kill_moments --moments 100`.

Each moment starts a small run in a process of its own, kills it (SIGKILL) after a random part of its time or at one of
its writes, and then resumes it, or runs it again. It passes if rows and saved tensors are those of a run that
nobody disturbed, timings aside. Processes are forked from this one, which has imported everything: an import would
otherwise be most of a run; it has played each run once, so that its data are open. Prints `N of 100`, and exits 1 if N
is less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fedtap.scenarios.command.main import main
from fedtap.simulator.files import TEMPORARY

SMALL = ("--model", "mlp", "--size", "16", "--victims", "2")
RUNS: dict[str, tuple[str, ...]] = {
    "demo": ("run", "first_leak", *SMALL, "--attack", "linear,idlg(steps=20)"),
    "sweep": ("run", "batch_size", *SMALL, "--batch", "1,2", "--attack", "linear,dlg(steps=5)"),
    "pairs": (
        "run",
        "git",
        *SMALL,
        "--threat-model",
        "eavesdropper",
        "--pairs",
        "24",
        "--attack",
        "ridge,training_mean",
    ),
    "attention": ("run", "attention", "--victims", "2", "--heads", "1,2", "--n", "3", "--d", "4"),
}
"""By name, a command line."""

TIMINGS = ("seconds", "fit_seconds", "overhead")


def start(words: tuple[str, ...], out: Path, *more: str) -> int:
    """The process id of a child that runs this command, with what it says in a file beside `out`."""
    child = os.fork()
    if child:
        return child
    try:
        said = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.argv = ["fedtap", *words, "--out", str(out), *more]
        main()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        os._exit(1)


def here(words: tuple[str, ...], out: Path) -> None:
    """Run this command in this process, in silence."""
    sys.argv = ["fedtap", *words, "--out", str(out)]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(SystemExit):
        main()


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] == child


def code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(out: Path) -> frozenset[tuple[str, int]]:
    """The folder's files, and which version of them."""
    seen = set()
    for where, _, files in os.walk(out):
        for file in files:
            with contextlib.suppress(OSError):
                seen.add((file, (Path(where) / file).stat().st_ino))
    return frozenset(seen)


def writes_of(child: int, out: Path, most: int | None = None) -> int:
    """Wait until the child has ended, or changed its folder so many times: how often it did."""
    before, count = state(out), 0
    while not ended(child):
        if (now := state(out)) != before:
            before, count = now, count + 1
            if count == most:
                kill(child)
                return count
        time.sleep(0.002)
    return count


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def left(out: Path) -> dict[str, Any]:
    """What a run left, timings aside."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    tensors = {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.safetensors"))}
    return {
        "rows": [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows],
        "tensors": tensors,
        "page": (out / "report.html").is_file(),
        "finished": json.loads((out / "run.json").read_text())["finished"],
        "temporaries": [file.name for file in out.rglob("*") if TEMPORARY.fullmatch(file.name)],
    }


def moment(name: str, out: Path, draw: random.Random, seconds: float, writes: int) -> str:
    """Start, kill, go on; when it was killed and how it went on, in words."""
    child = start(RUNS[name], out)
    if draw.random() < 0.5:
        most = draw.randint(1, writes)
        writes_of(child, out, most)
        said = f"write {most} of {writes}"
    else:
        share = draw.random()
        time.sleep(share * seconds)
        if not ended(child):
            kill(child)
        said = f"{share:.0%} of its time"
    again = draw.random() < 0.25
    if result := code(start(RUNS[name], out, *([] if again else ["--resume"]))):
        raise AssertionError(f"exit code {result}: {out.with_suffix('.log').read_text()[-500:]}")
    return f"{name}, killed at {said}, {'run again' if again else 'resumed'}"


def all_moments(moments: int, seed: int) -> int:
    """How many pass."""
    draw, passed = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="fedtap-") as folder:
        whole: dict[str, tuple[dict[str, Any], float, int]] = {}
        for name, words in RUNS.items():
            here(words, Path(folder) / f"{name}_here")
            out, began = Path(folder) / name, time.monotonic()
            writes = writes_of(start(words, out), out)
            whole[name] = left(out), time.monotonic() - began, writes
            print(f"{name}: {whole[name][1]:.1f} s, {writes} writes seen", flush=True)
        kinds: Counter[str] = Counter()
        for number in range(moments):
            name = list(RUNS)[number % len(RUNS)]
            expected, seconds, writes = whole[name]
            out = Path(folder) / f"moment_{number}"
            try:
                said = moment(name, out, draw, seconds, writes)
                found = left(out)
                differs = [what for what in expected if found[what] != expected[what]]
                if differs:
                    raise AssertionError(f"{said}: other {', '.join(differs)}")
                passed += 1
                kinds[name] += 1
            except (AssertionError, OSError) as error:
                print(f"moment {number}: {error}", flush=True)
    print(", ".join(f"{name} {count}" for name, count in kinds.items()))
    return passed


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--moments", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    good = all_moments(given.moments, given.seed)
    print(f"{good} of {given.moments}")
    raise SystemExit(good < given.moments)
