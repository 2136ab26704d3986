"""Results of many runs: an entry is checked, kept once, and stands on the page with its command and its hash."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.command.options import pairs
from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.command.results import entry, hash_of, replayed_by
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import options_of
from fedtap.simulator.report.saved_run import read_run
from fedtap.simulator.run import command_of
from tests.support.played import command

WORDS = ("first_leak", "--victims", "2", "--attack", "linear,idlg(steps=3)", "--model", "mlp")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "run", *WORDS, "--out", str(folder)) == 0
    return folder


def test_a_run_is_kept_once_and_stands_on_the_page(
    played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, page = tmp_path / "kept", tmp_path / "results.html"
    for _ in range(2):
        assert command(monkeypatch, "results", "add", str(played), "--to", str(kept)) == 0
    assert "It is there already" in capsys.readouterr().out
    (folder,) = kept.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["rows.jsonl", "run.json"]
    assert folder.name == f"first_leak-{hash_of(read_run(played))}"
    assert command(monkeypatch, "results", "build", str(kept), str(played), "--out", str(page)) == 0
    text = page.read_text()
    assert text.count(hash_of(read_run(played))) >= 4 + 1  # in each row, and beside the command
    assert "fedtap run first_leak" in text
    assert "rows.csv" not in text


def test_the_command_gives_the_rows_again(played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(replayed_by(read_run(played)))
    assert words[:3] == ["fedtap", "run", "first_leak"]
    assert command(monkeypatch, *words[1:], "--out", str(tmp_path / "again")) == 0
    assert hash_of(read_run(tmp_path / "again")) == hash_of(read_run(played))


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_command_of_every_scenario_plans_the_same_settings(name: str) -> None:
    options = options_of(SCENARIOS[name])
    tried: list[dict[str, str]] = [{}, {"seed": "3"}]
    tried += [{"victims": "2", "batch": "1,2"}] if {"victims", "batch"} <= options.keys() else []
    tried += [{"sigma": "0,1e-3"}] if "sigma" in options else []
    for given in tried:
        try:
            settings = plan(name, given)
        except FedtapError:  # a scenario that takes no such values
            continue
        words = shlex.split(command_of(settings))
        assert words[:3] == ["fedtap", "run", name]
        again = plan(name, pairs(words[3:]))
        assert [setting.told() for setting in again] == [setting.told() for setting in settings]
        assert given or len(words) == 3


def _edited(played: Path, to: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    about = json.loads((played / "run.json").read_text())
    rows = [json.loads(line) for line in (played / "rows.jsonl").read_text().splitlines()]
    change(about, rows[0])
    to.mkdir()
    (to / "run.json").write_text(json.dumps(about))
    (to / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about, row: about.update(finished=False), "is not finished"),
        (lambda about, row: row.update(model=None), "has no model in words"),
        (lambda about, row: row.update(psnr="high"), "as its psnr"),
        (lambda about, row: row.update(recognisable=3), "as its recognisable"),
        (lambda about, row: about.pop("versions"), "is damaged"),
    ],
    ids=["unfinished", "no model", "text for a score", "a share over 1", "no versions"],
)
def test_a_strangers_entry_is_refused_in_a_sentence(
    played: Path, tmp_path: Path, change: Callable[[Any, Any], None], said: str
) -> None:
    with pytest.raises(FedtapError, match=said):
        entry(_edited(played, tmp_path / "entry", change))


def test_what_is_written_in_an_entry_becomes_no_markup(
    played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "<script>alert(1)</script>"
    made = _edited(played, tmp_path / "entry", lambda about, row: row.update(model=evil, defence=evil))
    page = tmp_path / "results.html"
    assert command(monkeypatch, "results", "build", str(made), "--out", str(page)) == 0
    assert evil not in page.read_text()
    assert page.read_text().count("<script") == 1


def test_where_there_is_no_entry_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "results", "build", str(tmp_path)) == 2
    assert "There is no run in" in capsys.readouterr().err
