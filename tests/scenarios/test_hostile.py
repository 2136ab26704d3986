"""The command line where the machine is against it: one sentence, its exit code, no traceback."""

from __future__ import annotations

import ast
import io
import json
import os
import sys
from pathlib import Path

import pytest

from fedtap.attackers import ATTACKS
from fedtap.scenarios.command import entry
from fedtap.scenarios.command import main as command
from fedtap.scenarios.command.entry import _hook
from fedtap.scenarios.command.plan import plan_of
from fedtap.simulator.errors import FedtapError
from tests.scenarios.test_cli import rows, run

QUICK = ["--victims", "1", "--attack", "linear", "--model", "mlp", "--size", "16"]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("fedtap: ")
    assert said.count("\n") == 1
    assert len(said) < 300
    return said


def test_a_second_run_with_other_settings_takes_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "runs/first_leak", tmp_path / "runs/first_leak-2"
    assert run(monkeypatch, "run", "first_leak", *QUICK) == 0
    before = rows(first)
    assert run(monkeypatch, "run", "first_leak", *QUICK) == 0  # make demo, again
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--seed", "1") == 0
    assert f"Page: {second.relative_to(tmp_path)}/report.html" in capsys.readouterr().out
    assert [[row["seed"] for row in rows(out)] for out in (first, second)] == [[0], [1]]
    assert {**rows(first)[0], "seconds": 0} == {**before[0], "seconds": 0}
    assert sorted(path.name for path in first.parent.iterdir()) == ["first_leak", "first_leak-2"]
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--seed", "1", "--resume") == 0
    assert run(monkeypatch, "run", "first_leak", *QUICK, "--seed", "2", "--resume") == 2
    assert "cannot be resumed" in told(capsys)

    for flags, said in (([], "add --overwrite"), (["--resume", "--overwrite"], "leave out one of them")):
        assert run(monkeypatch, "run", "first_leak", *QUICK, "--seed", "2", "--out", str(first), *flags) == 2
        assert said in told(capsys)
    assert rows(first)[0]["seed"] == 0
    other = ["--seed", "2", "--weights-seed", "5"]
    assert run(monkeypatch, "run", "first_leak", *QUICK, *other, "--out", str(first), "--overwrite") == 0
    assert rows(first)[0]["seed"] == 2

    leaks = [str(out / "leaks/part_0.safetensors") for out in (first, second)]
    for leak, number in zip((*leaks, leaks[0]), ("", "-2", ""), strict=True):
        assert run(monkeypatch, "attack", leak, "--attack", "linear") == 0
        assert f"Page: runs/attack{number}/report.html" in capsys.readouterr().out
    assert run(monkeypatch, "attack", leaks[1], "--attack", "linear", "--out", "runs/attack") == 2
    assert "differs in leak" in told(capsys)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("attention", ("--victims", "1", "--heads", "1", "--n", "3", "--d", "4")),
        ("canary", ("--trials", "50", "--exchanges", "0", "--epsilon", "1", "--canaries", "2")),
    ],
)
def test_studies_and_games_take_another_folder_too(
    name: str,
    knobs: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in ("0", "0", "1"):
        assert run(monkeypatch, "run", name, *knobs, "--seed", seed) == 0
    found = {path.name: json.loads((path / "run.json").read_text())["seed"] for path in (tmp_path / "runs").iterdir()}
    assert found == {name: 0, f"{name}-2": 1}
    capsys.readouterr()
    assert run(monkeypatch, "run", name, *knobs, "--seed", "2", "--out", f"runs/{name}") == 2
    assert "add --overwrite" in told(capsys)
    assert run(monkeypatch, "run", name, *knobs, "--seed", "2", "--overwrite") == 0
    assert json.loads((tmp_path / "runs" / name / "run.json").read_text())["seed"] == 2


def test_overwrite_of_the_run_config_is_no_knob() -> None:
    assert plan_of({"scenario": "first_leak", "overwrite": "true"}) == plan_of({"scenario": "first_leak"})


def test_a_run_of_other_versions_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "first_leak", *QUICK, "--out", str(tmp_path)]
    assert run(monkeypatch, *words) == 0
    about = json.loads((tmp_path / "run.json").read_text())
    about["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert run(monkeypatch, *words, "--resume") == 2
    assert "differs in versions, so it cannot be resumed" in told(capsys)
    assert run(monkeypatch, *words) == 2
    assert "differs in versions, which this one would replace" in told(capsys)


def test_ctrl_c_ends_a_run_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(*_: object) -> object:
        raise KeyboardInterrupt

    words = ["run", "first_leak", *QUICK, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(ATTACKS["linear"], "reconstruct", stops)
        assert run(patch, *words) == 130
    assert "--resume goes on" in told(capsys)
    with monkeypatch.context() as patch:
        patch.setattr(command, "plan", stops)
        assert run(patch, *words) == 130
    assert "stopped before" in told(capsys)
    assert run(monkeypatch, *words, "--resume") == 0


def test_ctrl_c_ends_the_imports_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _hook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert end.value.code == 130
    assert "stopped" in told(capsys)
    body = ast.parse(Path(entry.__file__).read_text()).body
    imported = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported == ["from __future__ import annotations", "import sys", "from types import TracebackType"]


def test_an_ascii_locale_gets_what_it_can_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert run(monkeypatch, "run", "noise", "--sigma", "0.1", *QUICK, "--out", str(tmp_path)) == 0
    assert run(monkeypatch, "list") == 0
    shown.flush()
    assert b"?" in shown.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_full_disk_behind_standard_output_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(monkeypatch, "list") == 2
    assert "No space left" in told(capsys)


def test_a_reader_that_leaves_is_no_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.console, "quiet", False)  # rich's console falls silent for good, and others test on
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(monkeypatch, "list") == 1
    assert not capsys.readouterr().err


def test_closed_streams_are_no_obstacle_and_no_file_takes_their_place() -> None:
    kept = os.dup(2)
    os.close(2)
    try:
        command._usable_streams()
        assert os.fstat(2).st_rdev == Path(os.devnull).stat().st_rdev
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert run(patch, "list") == 0
        assert run(patch, "lst") == 2


def test_docstrings_that_python_threw_away_are_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fedtap.scenarios.gradients.first_leak

    monkeypatch.setattr(fedtap.scenarios.gradients.first_leak, "__doc__", None)
    assert run(monkeypatch, "run", "first_leak", *QUICK) == 2
    assert "unset PYTHONOPTIMIZE" in told(capsys)


def test_a_folder_that_was_removed_under_ones_feet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    assert run(monkeypatch, "list") == 2
    assert "current folder has been removed" in told(capsys)


def test_a_sentence_is_short_and_a_mistake_of_ours_stays_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(error: Exception) -> None:
        def catalogue(*_: object) -> None:
            raise error

        monkeypatch.setattr(command, "_catalogue", catalogue)

    fails(FedtapError("long " * 1000 + "\n: end."))
    assert run(monkeypatch, "list") == 2
    assert told(capsys).endswith(": end.\n")
    fails(PermissionError(13, "Permission denied", "/data/" + "x" * 400))
    assert run(monkeypatch, "list") == 2
    assert "Permission denied" in told(capsys)
    for error in (FileNotFoundError(2, "No such file"), KeyError("x"), AssertionError()):
        fails(error)
        monkeypatch.setattr(sys, "argv", ["fedtap", "list"])
        with pytest.raises(type(error)):
            command.main()
