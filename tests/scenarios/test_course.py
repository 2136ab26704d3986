"""The course grades: model solutions score 1, empty answers 0, typical wrong ones their stated part."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn_by
from hypothesis import settings
from hypothesis import strategies as st

from fedtap.scenarios.command.main import main
from fedtap.scenarios.course import COURSE_UNITS, course_unit, given, grade
from fedtap.scenarios.course.conformance import broken_rules
from fedtap.scenarios.course.exercise import Graded, grade_answer, graded_with
from fedtap.scenarios.course.grade import (
    empty_answers,
    grade_file,
    graded,
    graded_class,
    hand_in,
    points,
    write_answers,
)
from fedtap.scenarios.course.notebooks import (
    QUICK,
    cells_of,
    copy_units,
    for_nbgrader,
    run_notebook,
    unit_folders,
)
from fedtap.simulator.defences.noise import Noise
from fedtap.simulator.defences.prune import Prune
from fedtap.simulator.errors import FedtapError
from tests.scenarios.course_solutions import SOLUTIONS, WRONG, ridge
from tests.support.top_k import TopK

STUDENT = "Ada Lovelace"
OTHER = "Bob"


def solved(number: int, student: str) -> dict[str, Any]:
    told = given(number, student)
    answers = {name: solve(told[name]) for name, solve in SOLUTIONS[number].items()}
    return json.loads(json.dumps({"unit": number, "student": student, "answers": answers}))


@pytest.mark.parametrize("number", COURSE_UNITS)
def test_a_model_solution_scores_1_and_another_students_does_not(number: int) -> None:
    document = solved(number, STUDENT)
    result = graded(course_unit(number), document)
    assert [row["score"] for row in result["exercises"]] == [1.0] * len(SOLUTIONS[number]), result
    assert result["unit"] == number
    assert result["score"] == 1
    copied = graded(course_unit(number), document | {"student": OTHER})
    assert copied["score"] < 0.7, copied


@pytest.mark.parametrize("number", COURSE_UNITS)
def test_an_empty_file_scores_0_with_a_hint_to_each_exercise(number: int, tmp_path: Path) -> None:
    write_answers(tmp_path / "answers.json", course_unit(number), STUDENT, overwrite=False)
    result = grade_file(number, tmp_path / "answers.json")
    assert result["score"] == 0
    assert [row["name"] for row in result["exercises"]] == list(SOLUTIONS[number])
    assert all(row["hint"].startswith("Not answered yet: ") for row in result["exercises"])


@pytest.mark.parametrize(
    ("number", "name", "what", "answer", "score"), WRONG, ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in WRONG]
)
def test_a_typical_wrong_answer_scores_its_part(number: int, name: str, what: str, answer: Any, score: float) -> None:
    (exercise,) = (one for one in course_unit(number).exercises if one.name == name)
    said = json.loads(json.dumps(answer(dict(exercise.given(STUDENT)))))
    result = grade_answer(exercise, said, STUDENT)
    assert result.score == pytest.approx(score, abs=1e-6), (what, result.hint)
    assert result.hint


@pytest.mark.parametrize(("score", "said"), [(1.0, "well done"), (0.99, "look again"), (0.0, "look again")])
def test_praise_goes_with_a_whole_score_alone(score: float, said: str) -> None:
    assert graded_with(score, "well done", "look again") == Graded(score, said)


def test_three_typical_wrong_answers_to_each_exercise_are_stated() -> None:
    stated = Counter(case[:2] for case in WRONG)
    assert stated == {(number, name): 3 for number, solutions in SOLUTIONS.items() for name in solutions}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=13) | st.dictionaries(st.text(max_size=9), inside, max_size=4),
    max_leaves=20,
)
EXERCISES = [(number, one) for number in COURSE_UNITS for one in course_unit(number).exercises]


@pytest.mark.parametrize(("number", "exercise"), EXERCISES, ids=lambda part: getattr(part, "name", str(part)))
def test_any_answer_is_graded(number: int, exercise: Any) -> None:
    @settings(max_examples=15, deadline=None)
    @drawn_by(JSON)
    def check(answer: Any) -> None:
        result = grade_answer(exercise, answer, STUDENT)
        assert 0 <= result.score < 1
        assert result.hint

    check()
    solution = {"predicted": "x", "measured": float("nan"), "records": [1], "A": 3, "sent": 3, "mechanism": {}}
    assert grade_answer(exercise, solution, STUDENT).score == 0
    assert grade_answer(exercise, [0] * 100_000, STUDENT).score == 0


@pytest.mark.parametrize(
    ("document", "hint"),
    [
        ({}, "object called answers"),
        ({"answers": []}, "object called answers"),
        ({"answers": {}}, "No student"),
        ({"answers": {}, "student": 3}, "No student"),
        ({"unit": 2, "student": "Ada", "answers": {}}, "of unit 2"),
        ({"unit": [1], "student": "Ada", "answers": {}}, "of unit"),
        ({"unit": 1, "student": "Ada", "answers": {}, "more": 1}, "Not answered"),
    ],
)
def test_a_file_of_another_form_scores_0(document: dict[str, Any], hint: str) -> None:
    result = graded(course_unit(1), document)
    assert result["score"] == 0
    assert all(hint in row["hint"] for row in result["exercises"])


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"{", b"\xff\xfe{}", b"[" * 5000, b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_bytes(content)
    with pytest.raises(FedtapError, match=r"answers\.json"):
        grade_file(1, tmp_path / "answers.json")


def said_by(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    monkeypatch.setattr("sys.argv", ["fedtap", *words])
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    return code, out.getvalue(), err.getvalue()


def check_graded(number: int, said: tuple[int, str, str]) -> None:
    """Exit code 0 and one JSON object, or 2 and one line of error."""
    code, out, err = said
    if code == 2:
        assert (out, err.count("\n")) == ("", 1)
        return
    assert (code, err, out.count("\n")) == (0, "", 1)
    result = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert result.keys() == {"unit", "score", "exercises"}
    assert result["unit"] == number
    assert 0 <= result["score"] <= 1
    assert [row["name"] for row in result["exercises"]] == list(SOLUTIONS[number])
    for row in result["exercises"]:
        assert row.keys() == {"name", "score", "hint"}
        assert 0 <= row["score"] <= 1
        assert isinstance(row["hint"], str)
        assert row["hint"]


@pytest.mark.parametrize("number", COURSE_UNITS)
def test_whatever_an_answers_file_holds_one_object_is_printed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.json"
    answers = st.fixed_dictionaries({}, optional=dict.fromkeys((*SOLUTIONS[number], "more"), JSON))
    fields = {"unit": st.just(number) | JSON, "student": st.just(STUDENT) | JSON, "answers": answers | JSON}
    documents = st.fixed_dictionaries({}, optional=fields | {"form": JSON})

    @settings(max_examples=25, deadline=None)
    @drawn_by((documents | JSON).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        check_graded(number, said_by(monkeypatch, "grade", str(number), str(path)))

    check()


@pytest.mark.parametrize("number", COURSE_UNITS)
def test_lists_of_a_wrong_shape_or_without_end_score_less_than_1(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.json"
    wrong: list[Any] = [
        [0] * 50_000,
        [[[[[1]]]]],
        [[1, 2], [3]],
        [[]],
        float("nan"),
        -1e308,
        1e-320,
        True,
        "x" * 50_000,
    ]
    wrong += [[value] * 12 for value in (float("inf"), None, "a b", {}, [0.5])]
    wrong += [dict.fromkeys("ABCDE", value) for value in ([], {}, float("nan"))]
    for answer in wrong:
        document = {"unit": number, "student": STUDENT, "answers": dict.fromkeys(SOLUTIONS[number], answer)}
        path.write_text(json.dumps(document))
        said = said_by(monkeypatch, "grade", str(number), str(path))
        assert said[0] == 0, (answer, said)
        check_graded(number, said)
        assert json.loads(said[1])["score"] < 0.5


def test_a_byte_order_mark_changes_nothing_and_a_folder_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.json"
    content = json.dumps(solved(2, STUDENT)).encode()
    path.write_bytes(b"\xef\xbb\xbf" + content)  # as some editors save it
    code, out, err = said_by(monkeypatch, "grade", "2", str(path))
    assert (code, json.loads(out)["score"], err) == (0, 1, "")
    path.write_bytes(content.decode().encode("utf-16"))
    for unit, answers, word in (("2", path, "JSON"), ("2", tmp_path, "no file"), ("lab", path, "no unit 'lab'")):
        code, out, err = said_by(monkeypatch, "grade", unit, str(answers))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert word in err


def test_what_is_given_differs_between_students_and_not_between_spellings() -> None:
    one, other, same = (given(1, name)["pixels"]["weight_gradient"] for name in ("Ada", "Eve", " aDA "))
    assert (one != other).any()
    assert (one == same).all()
    with pytest.raises(FedtapError, match="no student"):
        given(1, " ")
    with pytest.raises(FedtapError, match="units 1 to 6"):
        given(7, "Ada")


def test_answers_are_not_overwritten(tmp_path: Path) -> None:
    path, unit = tmp_path / "answers.json", course_unit(1)
    write_answers(path, unit, "", overwrite=False)
    write_answers(path, course_unit(3), "", overwrite=False)  # nothing is lost
    document = empty_answers(unit) | {"answers": {"pixels": [1]}}
    path.write_text(json.dumps(document))
    with pytest.raises(FedtapError, match="--overwrite"):
        write_answers(path, unit, "", overwrite=False)
    write_answers(path, unit, "", overwrite=True)
    assert json.loads(path.read_text()) == empty_answers(unit)


def test_a_notebook_is_cut_into_cells(tmp_path: Path) -> None:
    path = tmp_path / "notebook.py"
    path.write_text(
        "# ---\n# header\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\na = 1\n\n# %%\nprint(a)\n"
    )
    title, first, second = cells_of(path)
    assert (title.text, title.code) == ("# Title\n\nText", "")
    assert (first.code, first.line, second.code, second.line) == ("a = 1", 11, "print(a)", 14)
    assert run_notebook(path).line in (6, 11, 14)
    path.write_text("# %%\na = 1\n\n# %%\n\n1 / 0\n")
    with pytest.raises(FedtapError, match=r"cell at line 5 .* fails .ZeroDivisionError: division by zero"):
        run_notebook(path)


@pytest.mark.parametrize("folder", unit_folders(), ids=lambda folder: folder.name)
def test_a_notebook_runs_and_solves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(QUICK, "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    handed_in: list[dict[str, Any]] = []
    once = grade.hand_in

    def kept(*given: Any) -> dict[str, Any]:
        result = once(*given)
        handed_in.extend(result["exercises"])
        return result

    monkeypatch.setattr(grade, "hand_in", kept)
    timed = run_notebook(folder / "notebook.py")
    assert 0 < timed.slowest <= timed.seconds
    assert capsys.readouterr().out == ""
    texts = " ".join(cell.text for cell in cells_of(folder / "notebook.py"))
    assert 80 < len(texts.split()) < 700
    if folder.name[0].isdigit():
        assert {row["score"] for row in handed_in} == {0.0}, "a notebook as it is given out earns nothing"
        number = int(folder.name[0])
        assert f"given({number}, STUDENT)" in (folder / "notebook.py").read_text()
        assert all(f'answers["{name}"]' in (folder / "notebook.py").read_text() for name in SOLUTIONS[number])


def test_every_unit_has_a_notebook_slides_and_a_note() -> None:
    numbered = [folder for folder in unit_folders() if folder.name[0].isdigit()]
    assert [folder.name for folder in numbered] == [f"{number}_{name}" for number, name in COURSE_UNITS.items()]
    for folder in numbered:
        assert (folder / "slides.md").read_text().startswith("---\nmarp: true\n")
        note = (folder / "teacher.md").read_text()
        assert all(f"**{part}" in note for part in ("Goals.", "Minutes.", "Misconceptions.", "Answers"))


def test_the_course_is_copied_and_never_into_a_folder_with_something_in_it(tmp_path: Path) -> None:
    copy_units(tmp_path / "course", teacher=False)
    assert not [*(tmp_path / "course").rglob("teacher*")]
    assert len([*(tmp_path / "course").glob("*/notebook.py")]) == 7
    copy_units(tmp_path / "staff", teacher=True)
    assert (tmp_path / "staff/teachers.md").is_file()
    with pytest.raises(FedtapError, match="holds something already"):
        copy_units(tmp_path / "course", teacher=False)


def test_answers_with_tensors_are_handed_in(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    answer = SOLUTIONS[1]["pixels"](given(1, STUDENT)["pixels"])
    result = hand_in(1, STUDENT, {"pixels": torch.tensor(answer), "labels": None}, path)
    assert [row["score"] for row in result["exercises"]] == [1, 0, 0, 0]
    assert grade_file(1, path) == result


@pytest.mark.parametrize("number", COURSE_UNITS)
def test_nbgrader_gives_points_in_cells_that_students_cannot_change(number: int) -> None:
    (folder,) = (one for one in unit_folders() if one.name.startswith(f"{number}_"))
    cells = for_nbgrader(folder / "notebook.py", course_unit(number))["cells"]
    marks = [cell["metadata"]["nbgrader"] for cell in cells if cell["metadata"]]
    exercises = course_unit(number).exercises
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert len({one["grade_id"] for one in marks}) == len(marks)
    assert [one["points"] for one in marks if one["grade"]] == [one.minutes for one in exercises]
    assert all(one["locked"] is one["grade"] is not one["solution"] for one in marks)
    assert sum(one["solution"] for one in marks) == len(exercises)
    answered = [cell["source"] for cell in cells if cell["metadata"].get("nbgrader", {}).get("solution")]
    assert all("\n### BEGIN SOLUTION\n### END SOLUTION" in source for source in answered)  # else nbgrader clears all
    told = given(number, STUDENT)
    for exercise in exercises:
        (cell,) = (cell for cell in cells if cell["metadata"] and f'"{exercise.name}")  # of' in cell["source"])
        answers = {exercise.name: SOLUTIONS[number][exercise.name](told[exercise.name])}
        names = {"STUDENT": STUDENT, "points": points}
        call = cell["source"].splitlines()[-1]
        assert eval(call, names | {"answers": answers}) == exercise.minutes
        assert eval(call, names | {"answers": {exercise.name: None}}) == 0


def test_a_class_is_ranked_by_score_and_then_by_held_out_error(tmp_path: Path) -> None:
    for name, answer in (("Ada", "ridge"), ("Bob", "beat_ridge"), ("=Eve", "none")):
        told = given(5, name)["beat_ridge"]
        answers = (
            {"beat_ridge": {"ridge": ridge, "beat_ridge": SOLUTIONS[5]["beat_ridge"]}[answer](told)}
            if (answer != "none")
            else {}
        )
        (tmp_path / f"{name}.json").write_text(json.dumps({"unit": 5, "student": name, "answers": answers}))
    (tmp_path / "broken.json").write_bytes(b"\xff")
    rows = graded_class(5, tmp_path)
    assert [row["file"] for row in rows] == ["Bob.json", "Ada.json", "=Eve.json", "broken.json"]
    assert rows[0]["beat_ridge measured"] < rows[1]["beat_ridge measured"]
    assert "cannot be read" in rows[3]["error"]
    with pytest.raises(FedtapError, match="holds no file"):
        graded_class(5, tmp_path / "empty")


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: str) -> tuple[int, str, str]:
        return said_by(monkeypatch, *words)

    monkeypatch.chdir(tmp_path)
    assert said("course", "answers", "3", "--student", STUDENT)[0] == 0
    code, out, err = said("grade", "3", "answers.json")
    assert (code, err) == (0, "")
    assert json.loads(out)["score"] == 0
    code, out, err = said("grade", "3", "gone.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, err = said("grade", "9", "answers.json")
    assert (code, out, err) == (2, "", "fedtap: There is no unit '9': the course has units 1 to 6.\n")
    code, out, err = said("course", "class", "3", ".")
    assert (code, err) == (0, "")
    assert out.startswith("file,student,score,error,attacker,sigma,broken,accuracy\nanswers.json,Ada Lovelace,0.0,")
    assert said("course", "new", "made", "--student", STUDENT)[0] == 0
    (made,) = Path("made").glob("2_*/answers.json")
    assert json.loads(made.read_text())["student"] == STUDENT
    assert not [*Path("made").rglob("*.ipynb")]
    assert said("course", "new", "graded", "--nbgrader")[0] == 0
    assert len([*Path("graded").glob("*/notebook.ipynb")]) == 6
    monkeypatch.setenv(QUICK, "1")
    code, out, err = said("course", "check", "--unit", "6")
    assert code == 0, err
    assert "free disk" in out
    assert "slowest cell" in out
    assert "lab_90" not in out
    code, out, err = said("course", "check", "--unit", "lab")
    assert code == 0, err
    assert re.findall(r"^(\w+): .* slowest cell", out, re.MULTILINE) == ["lab_90_minutes"]
    assert said("course", "check", "--unit", "laboratory")[0] == 2


def test_defences_of_fedtap_keep_the_contract() -> None:
    assert [broken_rules(one) for one in (Noise(0.1), Prune(0.5), TopK(3))] == [[], [], []]


def test_a_defence_that_breaks_the_contract_is_told_how() -> None:
    class Longer(TopK):
        """No source."""

        def stacked(self, gradients: Any, draws: Any) -> Any:
            for tensor in gradients.values():
                tensor *= 2
            return {name: tensor + tensor[:1] + torch.rand(()) for name, tensor in gradients.items()}

    said = " ".join(broken_rules(Longer(3)))
    for word in ("no source", "that it is handed", "something else", "its neighbours", "at most, and sends"):
        assert word in said

    class Renamed(TopK):
        """https://arxiv.org/abs/1704.05021"""

        def stacked(self, gradients: Any, draws: Any) -> Any:
            return {"other": gradients["bias"]}

    assert broken_rules(Renamed(3)) == ["What it sends has other names or shapes than the gradient: keep both."]
    assert "no UpdateDefence" in broken_rules("text")[0]  # type: ignore[arg-type]
