"""The units' folders as they are copied to a student, and their notebooks as they are run before a lesson.

A notebook is a Python file in jupytext's percent format (https://jupytext.readthedocs.io): `# %%` begins a cell and
`# %% [markdown]` a text. Jupyter opens it by jupytext, and so do most editors without it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtap.scenarios.course.exercise import Unit
from fedtap.simulator.errors import FedtapError, short

UNITS_FOLDER = Path(__file__).parent / "units"
"""Folder with a folder for each unit, and one for the lab of 90 minutes."""

QUICK = "FEDTAP_COURSE_QUICK"
"""Environment variable by which notebooks take few steps, for a test of all cells."""

_TEACHER = "teacher.md"
_SOLUTION = "\n### BEGIN SOLUTION\n### END SOLUTION"
"""Of a cell to answer in, nbgrader clears what is between these lines; without them, all of it."""
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


def for_nbgrader(path: Path, unit: Unit) -> dict[str, Any]:
    """A unit's notebook as nbgrader takes an assignment (nbformat 4.5): cells where answers are written may be changed,
    and a locked cell for each exercise gives its points, in part if need be.

    Metadata by https://nbgrader.readthedocs.io/en/stable/contributor_guide/metadata.html, schema 3.
    """
    made = []
    cells = cells_of(path)
    last = max(number for number, cell in enumerate(cells) if cell.text)  # "Hand in" comes after all exercises
    for number, cell in enumerate(cells):
        if number == last:
            made += [_graded_cell(unit, one.name, one.minutes) for one in unit.exercises]
        answers = [one.name for one in unit.exercises if f'answers["{one.name}"] = ' in cell.code]
        marks = {"nbgrader": _marks(f"answer-{answers[0]}", solution=True)} if answers else {}
        made.append(_cell(f"cell-{number}", (cell.code or cell.text) + _SOLUTION * bool(answers), marks))
        if not cell.code:
            made[-1] |= {"cell_type": "markdown"}
            del made[-1]["outputs"], made[-1]["execution_count"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": made}


def _graded_cell(unit: Unit, name: str, minutes: int) -> dict[str, Any]:
    """A locked cell whose value is the exercise's points, which nbgrader reads."""
    code = (
        "from fedtap.scenarios.course.grade import points\n\n"
        f'points({unit.number}, STUDENT, answers, "{name}")  # of {minutes}'
    )
    return _cell(f"points-{name}", code, {"nbgrader": _marks(f"points-{name}", minutes)})


def _cell(name: str, source: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """A code cell that has not been run."""
    name = name.replace("_", "-")
    made = {"cell_type": "code", "id": name, "metadata": metadata or {}, "source": source}
    return made | {"outputs": [], "execution_count": None}


def _marks(name: str, points: int = 0, solution: bool = False) -> dict[str, Any]:
    """What nbgrader keeps of a cell, which is either one to answer in or one that is graded."""
    marks: dict[str, Any] = {"schema_version": 3, "grade_id": name, "task": False, "cell_type": "code"}
    marks |= {"solution": solution, "grade": not solution, "locked": not solution}
    return marks if solution else marks | {"points": points}


def write_for_nbgrader(folder: Path, unit: Unit) -> Path:
    """Write a unit's assignment beside its notebook, and return where it is."""
    path = folder / "notebook.ipynb"
    made = json.dumps(for_nbgrader(folder / "notebook.py", unit), indent=1, ensure_ascii=False)
    path.write_text(f"{made}\n", encoding="utf-8")
    return path


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
