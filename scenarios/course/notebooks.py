"""The units' folders as they are copied to a student, and their notebooks as they are run before a lesson.

A notebook is a Python file in jupytext's percent format (https://jupytext.readthedocs.io): `# %%` begins a cell and
`# %% [markdown]` a text. Jupyter opens it by jupytext, and so do most editors without it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fedtap.simulator.errors import FedtapError, short

UNITS_FOLDER = Path(__file__).parent / "units"
"""Folder with a folder for each unit, and one for the lab of 90 minutes."""

QUICK = "FEDTAP_COURSE_QUICK"
"""Environment variable by which notebooks take few steps, for a test of all cells."""

_TEACHER = "teacher.md"
_CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """One cell of a notebook."""

    line: int
    """In the file, from 1, of what comes first in it."""
    code: str
    """Python; empty of a text."""
    text: str
    """Markdown, without comment signs; empty of code."""


def cells_of(path: Path) -> list[Cell]:
    """The cells of a notebook in the percent format, without its header."""
    source = path.read_text(encoding="utf-8")
    marks = list(_CELL.finditer(source))
    cells = []
    for mark, end in zip(marks, [*(one.start() for one in marks[1:]), len(source)], strict=True):
        body = source[mark.end() : end].strip("\n")
        line = source.count("\n", 0, mark.end()) + 2
        if "[markdown]" in mark[1]:
            cells.append(Cell(line, "", re.sub(r"^# ?", "", body, flags=re.MULTILINE)))
        else:
            cells.append(Cell(line, body, ""))
    return cells


def unit_folders() -> list[Path]:
    """Folders of the units and of the lab, in order."""
    return sorted(folder for folder in UNITS_FOLDER.iterdir() if (folder / "notebook.py").is_file())


def copy_units(where: Path, teacher: bool) -> list[Path]:
    """Copy the units into a folder that is not there, or is empty; a teacher's notes only where they are asked for.

    Raises:
        FedtapError: the folder holds something, or cannot be written.
    """
    try:
        if where.exists() and (not where.is_dir() or any(where.iterdir())):
            raise FedtapError(f"{short(where, 120)} holds something already, which would be mixed up: name another.")
        left_out = shutil.ignore_patterns("__pycache__", *(() if teacher else (_TEACHER, "teachers.md")))
        shutil.copytree(UNITS_FOLDER, where, ignore=left_out, dirs_exist_ok=True)
    except (OSError, ValueError, shutil.Error) as error:
        raise FedtapError(f"{short(where, 120)} cannot be written ({short(error)}): name another folder.") from error
    return sorted(where.iterdir())


@dataclass(frozen=True)
class Timed:
    """How long a notebook took."""

    seconds: float
    """Of all cells."""
    slowest: float
    """Seconds of the slowest cell."""
    line: int
    """Line of that cell."""


def run_notebook(path: Path) -> Timed:
    """Run all cells of a notebook, one after the other, in an empty folder; what they print is dropped.

    Raises:
        FedtapError: a cell fails; with its line.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    times = []
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            for cell in cells_of(path):
                began = time.perf_counter()
                try:
                    code = compile("\n" * (cell.line - 1) + cell.code, str(path), "exec", dont_inherit=True)
                    exec(code, names)
                except Exception as error:  # a cell may raise anything
                    raise FedtapError(
                        f"The cell at line {cell.line} of {short(path, 80)} fails ({type(error).__name__}: "
                        f"{short(error, 100)}): copy the course anew, or install fedtap again."
                    ) from error
                times.append((time.perf_counter() - began, cell.line))
        finally:
            os.chdir(here)
    slowest, line = max(times)
    return Timed(sum(seconds for seconds, _ in times), slowest, line)


def versions() -> dict[str, str]:
    """What the course needs, as it is installed."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {name: version(name) for name in ("fedtap", "torch", "flwr", "numpy")}
