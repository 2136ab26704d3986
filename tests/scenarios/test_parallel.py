"""A sweep in several processes leaves the rows of one, and what was finished where a process fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtap.scenarios.command.main import main

TIMES = ("seconds", "fit_seconds", "overhead", "memory_mb")
SWEEP = (
    "local_steps",
    "--victims",
    "1",
    "--local-steps",
    "1,2,4",
    "--attack",
    "idlg(steps=3),linear",
    "--model",
    "mlp",
)


def played(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedtap", "run", *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def test_the_rows_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, more in (("one", ()), ("two", ("--parallel", "2"))):
        assert played(monkeypatch, *SWEEP, "--out", str(tmp_path / name), *more) == 0
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert json.loads((tmp_path / "two/run.json").read_text())["finished"] is True
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    for part in ("leaks", "reconstructions"):
        names = [sorted(path.name for path in (tmp_path / run / part).iterdir()) for run in ("one", "two")]
        assert names[0] == names[1]


def test_where_a_process_fails_the_others_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("local_steps", "--victims", "1", "--attack", "linear", "--model", "mlp,lenet", "--parallel", "2")
    assert played(monkeypatch, *words, "--out", str(tmp_path / "run")) == 2
    assert "linear needs a model whose first layer" in capsys.readouterr().err
    kept = rows(tmp_path / "run")
    assert {row["model"] for row in kept} == {"mlp"}
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
