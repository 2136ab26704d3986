"""Reads an answers file and grades it: one exercise after the other, each by its own check."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtap.scenarios.course import course_unit
from fedtap.scenarios.course.exercise import Graded, Unit, grade_answer
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file, read_json, write_atomically


def empty_answers(unit: Unit, student: str = "") -> dict[str, Any]:
    """What an answers file holds before anything is answered: `form` says what each answer looks like."""
    return {
        "unit": unit.number,
        "student": student,
        "answers": {exercise.name: None for exercise in unit.exercises},
        "form": {exercise.name: exercise.form for exercise in unit.exercises},
    }


def write_answers(path: Path, unit: Unit, student: str, overwrite: bool) -> None:
    """Write an empty answers file.

    Raises:
        FedtapError: the file is there and holds answers, or something else.
    """
    if not overwrite and is_file(path) and path.stat().st_size and _answered(path):
        raise FedtapError(
            f"{short(path, 120)} holds answers already, and they would be lost: name another file by --out, or add "
            "--overwrite."
        )
    content = json.dumps(empty_answers(unit, student), indent=1, ensure_ascii=False)
    write_atomically(path, f"{content}\n".encode())


def _answered(path: Path) -> bool:
    """Whether a file holds more than an empty answers file."""
    try:
        answers = read_json(path).get("answers")
    except FedtapError:
        return True
    return not isinstance(answers, dict) or any(answer is not None for answer in answers.values())


def grade_file(number: int, path: Path) -> dict[str, Any]:
    """The unit's score, and each exercise's with a hint, of the answers in a file.

    Raises:
        FedtapError: there is no such unit, or the file holds no JSON object.
    """
    unit = course_unit(number)
    return graded(unit, read_json(path))


def graded(unit: Unit, document: dict[str, Any]) -> dict[str, Any]:
    """As `grade_file`, of what the file holds. The unit's score is the mean of its exercises'."""
    rows: list[dict[str, Any]] = [
        {"name": name, "score": round(one.score, 4), "hint": one.hint} for name, one in _each(unit, document).items()
    ]
    return {"unit": unit.number, "score": _mean([row["score"] for row in rows]), "exercises": rows}


def graded_class(number: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each answers file in a folder and below it, the best first: file, student, score, each exercise's
    score, what was measured where an exercise ranks a class by a number, and an error of a file that cannot be read.

    Raises:
        FedtapError: there is no such unit, or no file that ends in .json.
    """
    unit, files = course_unit(number), sorted(folder.rglob("*.json"))
    if not files:
        raise FedtapError(f"{short(folder, 120)} holds no file that ends in .json: name the folder of the answers.")
    rows = []
    for file in files:
        row: dict[str, Any] = {"file": str(file.relative_to(folder)), "student": "", "score": 0.0, "error": ""}
        try:
            document = read_json(file)
        except FedtapError as error:
            rows.append(row | {"error": str(error)})
            continue
        each = _each(unit, document)
        row |= {"student": short(document.get("student", "")), "error": _not_of(unit, document)}
        row["score"] = _mean([one.score for one in each.values()])
        row |= {name: round(one.score, 4) for name, one in each.items()}
        row |= {f"{name} measured": one.measured for name, one in each.items() if one.measured is not None}
        rows.append(row)
    measured = [f"{exercise.name} measured" for exercise in unit.exercises]
    return sorted(rows, key=lambda row: (-row["score"], *(row.get(name, math.inf) for name in measured)))


def _each(unit: Unit, document: dict[str, Any]) -> dict[str, Graded]:
    """What each exercise's answer is worth, by the exercise's name."""
    wrong = _not_of(unit, document)
    answers = document.get("answers")
    found: dict[str, Graded] = {}
    for exercise in unit.exercises:
        if wrong or not isinstance(answers, dict):
            found[exercise.name] = Graded(0.0, wrong)
        else:
            found[exercise.name] = grade_answer(exercise, answers.get(exercise.name), document["student"])
    return found


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def hand_in(number: int, student: str, answers: Mapping[str, Any], path: str | Path = "answers.json") -> dict[str, Any]:
    """Write the answers of a notebook to a file, tensors as lists, and grade them.

    Raises:
        FedtapError: there is no such unit, or the file cannot be written.
    """
    unit = course_unit(number)
    document = empty_answers(unit, student)
    document["answers"] |= {name: _plain(answer) for name, answer in answers.items()}
    write_atomically(Path(path), f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode())
    return graded(unit, document)


def points(number: int, student: str, answers: Mapping[str, Any], name: str) -> float:
    """Points of one exercise of a notebook: its minutes times the score.

    Raises:
        FedtapError: there is no such unit.
    """
    unit = course_unit(number)
    (exercise,) = (one for one in unit.exercises if one.name == name)
    with contextlib.redirect_stderr(io.StringIO()):  # nbgrader takes any line there for an error, and gives 0
        each = _each(unit, {"student": student, "answers": {name: _plain(answers.get(name))}})
    return round(exercise.minutes * each[name].score, 2)


def _plain(answer: Any) -> Any:
    """Lists and numbers in the place of tensors and arrays."""
    if isinstance(answer, dict):
        return {str(name): _plain(one) for name, one in answer.items()}
    if isinstance(answer, list | tuple):
        return [_plain(one) for one in answer]
    return answer.tolist() if hasattr(answer, "tolist") else answer


def _not_of(unit: Unit, document: dict[str, Any]) -> str:
    """Why nothing in the file can be graded; empty where it can."""
    student = document.get("student")
    if document.get("unit", unit.number) != unit.number or isinstance(document.get("unit"), bool):
        return f"These answers say that they are of unit {short(document['unit'], 20)}: grade them as that unit's."
    if not isinstance(document.get("answers"), dict):
        return "Answers stand in an object called answers: fedtap course answers writes a file of that form."
    if not isinstance(student, str) or not student.strip():
        return "No student is named, and the exercises differ between students: write your name after student."
    return ""
