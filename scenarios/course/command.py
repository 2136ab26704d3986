"""`fedtap course new DIR`, `fedtap course answers UNIT`, `fedtap course check`, and `fedtap grade UNIT ANSWERS`."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedtap.scenarios.course import COURSE_UNITS
from fedtap.simulator.errors import FedtapError, short

course_cli = typer.Typer(no_args_is_help=True, help="A course in six units that checks its own answers.")

Number = Annotated[str, typer.Argument(metavar="UNIT", help=f"Number of the unit, 1 to {len(COURSE_UNITS)}.")]
Student = Annotated[str, typer.Option(help="Your name: the exercises differ between students.")]


def grade_command(
    unit: Number, answers: Annotated[Path, typer.Argument(help="Answers file, JSON: see fedtap course answers.")]
) -> None:
    """Grade an answers file: one JSON object with the unit's score and each exercise's, with a hint. Exit code 0
    whatever the score; 2: the file cannot be read."""
    number = _number(unit)
    _one_thread()
    from fedtap.scenarios.course.grade import grade_file

    print(json.dumps(grade_file(number, answers), ensure_ascii=False))


@course_cli.command("answers")
def answers_command(
    unit: Number,
    out: Annotated[Path, typer.Option(help="Where to write it.")] = Path("answers.json"),
    student: Student = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that holds answers.")] = False,
) -> None:
    """Write an empty answers file, which says what each answer looks like."""
    number = _number(unit)
    from fedtap.scenarios.course import course_unit
    from fedtap.scenarios.course.grade import write_answers

    write_answers(out, course_unit(number), student, overwrite)
    typer.echo(f"{out}: write your name after student, and your answers in the place of null.")


@course_cli.command("new")
def new_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    student: Student = "",
    teacher: Annotated[bool, typer.Option("--teacher", help="With the teacher's notes.")] = False,
    nbgrader: Annotated[
        bool, typer.Option("--nbgrader", help="With assignments for nbgrader, notebook.ipynb.")
    ] = False,
) -> None:
    """Copy the course into a folder: a notebook, slides and an empty answers file for each unit."""
    from fedtap.scenarios.course import course_unit
    from fedtap.scenarios.course.grade import write_answers
    from fedtap.scenarios.course.notebooks import copy_units, write_for_nbgrader

    for place in copy_units(folder, teacher):
        if place.name[0].isdigit():
            unit = course_unit(int(place.name[0]))
            write_answers(place / "answers.json", unit, student, overwrite=False)
            if nbgrader:
                write_for_nbgrader(place, unit)
        typer.echo(place)


@course_cli.command("class")
def class_command(
    unit: Number, folder: Annotated[Path, typer.Argument(help="Folder with the answers files of a class.")]
) -> None:
    """Grade a class: a table in CSV, the best first, with each exercise's score; for unit 5 a leaderboard by held-out
    error. Learning platforms read such tables."""
    number = _number(unit)
    _one_thread()
    from fedtap.scenarios.course.grade import graded_class

    rows = graded_class(number, folder)
    columns = dict.fromkeys(name for row in rows for name in row)
    table = csv.DictWriter(sys.stdout, [*columns], lineterminator="\n")
    table.writeheader()
    table.writerows({name: _no_formula(value) for name, value in row.items()} for row in rows)


def _no_formula(value: object) -> object:
    """A text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


@course_cli.command("slider")
def slider_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of one attack that sweeps numbers.")],
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("slider.html"),
    source: Annotated[str, typer.Option(help="Whose pictures they are, and by which licence they are shown.")] = "",
) -> None:
    """Write a page with a slider for each number that a run swept: original, reconstruction, PSNR and blind guess."""
    from fedtap.scenarios.course.slider import slider_page
    from fedtap.simulator.files import write_atomically

    write_atomically(out, slider_page(run, source).html.encode())
    typer.echo(out)


@course_cli.command("check")
def check_command(
    unit: Annotated[list[str] | None, typer.Option(help="Of this unit, or lab, alone; may be given again.")] = None,
) -> None:
    """The day before: versions, free disk, and how long each notebook takes here, with its slowest cell. Exit code 0:
    all is well; 2: a cell fails or takes over a minute, or the disk is full."""
    chosen = [one if one == _LAB else str(_number(one)) for one in unit or (*map(str, COURSE_UNITS), _LAB)]
    _one_thread()
    from fedtap.scenarios.course.notebooks import run_notebook, unit_folders, versions

    typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
    free = shutil.disk_usage(Path.cwd()).free
    typer.echo(f"free disk: {free / 1e9:.1f} GB")
    slow = []
    for folder in unit_folders():
        if folder.name.partition("_")[0] not in chosen:
            continue
        timed = run_notebook(folder / "notebook.py")
        typer.echo(f"{folder.name}: {timed.seconds:.1f} s, slowest cell {timed.slowest:.1f} s (line {timed.line})")
        if timed.slowest > _SLOWEST:
            slow.append(folder.name)
    if slow:
        raise FedtapError(
            f"A cell of {', '.join(slow)} takes over {_SLOWEST} s here, and a class would wait: end other programs, or "
            "take another computer."
        )
    if free < _DISK:
        raise FedtapError(f"{free / 1e9:.1f} GB of disk are free, and a class needs {_DISK / 1e9:g}: make room.")


_LAB = "lab"
"""What the folder of the lab of 90 minutes begins with, as those of units begin with their numbers."""
_SLOWEST, _DISK = 60, 1e9
"""Seconds of a cell, at most; bytes of disk, at least."""


def _number(text: str) -> int:
    """The number of a unit.

    Raises:
        FedtapError: there is none of this number.
    """
    if text not in map(str, COURSE_UNITS):
        raise FedtapError(f"There is no unit {short(text)!r}: the course has units 1 to {len(COURSE_UNITS)}.")
    return int(text)


def _one_thread() -> None:
    """As the other commands: on small tensors a second thread costs more than it brings."""
    import os

    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
