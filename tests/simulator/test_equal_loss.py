"""Defences at equal accuracy loss: which strength is chosen, by what, and what the rows and the report say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.gradients.defences import Defences
from fedtap.simulator.defences.notation import described, strengths
from fedtap.simulator.federation.equal_loss import equal_loss, nearest, strengths_of, undefended
from fedtap.simulator.options import options_of
from fedtap.simulator.report import defences, images
from tests.scenarios.test_cli import run

SMALL = {"model": "mlp", "size": "16", "attack": "linear,grey", "victims": "1", "clients": "1"}
SMALL |= {"rounds": "1", "training_batch": "4"}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).map(sorted), st.floats(0, 1))
def test_bisection_finds_the_nearest_where_more_costs_more(losses: list[float], wanted: float) -> None:
    asked: list[int] = []

    def lost(number: int) -> float:
        asked.append(number)
        return losses[number]

    found = nearest(range(len(losses)), lost, wanted)
    assert abs(losses[found] - wanted) == min(abs(loss - wanted) for loss in losses)
    assert len(set(asked)) <= len(losses).bit_length()


@pytest.mark.parametrize("text", options_of(Defences)["defence"].values)
def test_every_defence_has_strengths_that_can_be_written(text: str) -> None:
    each = strengths(text)
    assert len(set(each)) == len(each) >= (1 if text in ("none", "sign()") else 7)
    for one in each:
        assert [part.name for part in described(one)] == [part.name for part in described(text)]
        assert described(one)[:-1] == described(text)[:-1]


def test_strengths_of_one_defence_belong_together() -> None:
    words = SMALL | {"accuracy_loss": "0.1", "defence": "none,clip(2.0)+noise(0.01),clip(1.0)+noise(0.01),noise(0.01)"}
    parts = plan("defences", words | {"seed": "0,1"})
    groups = {tuple(strengths_of(parts, part)) for part in parts if part.defence != "none"}
    assert len(groups) == 6
    for group in groups:
        assert len(group) == 12
        assert len({parts[number].seed for number in group}) == 1
        assert parts[undefended(parts, parts[group[0]])].seed == parts[group[0]].seed
        assert parts[undefended(parts, parts[group[0]])].defence == "none"


def test_what_has_no_strength_stands_alone() -> None:
    parts = plan("defences", SMALL | {"accuracy_loss": "0.1", "defence": "none,sign(),clip(1.0)+sign()"})
    assert [strengths_of(parts, part) for part in parts] == [[0], [1], [2]]


def test_a_run_attacks_the_strength_nearest_by_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = plan("defences", SMALL | {"accuracy_loss": "0.1", "defence": "none,laplace(0.1),prune(0.5)"})
    first = {part.defence.partition("(")[0]: number for number, part in reversed([*enumerate(parts)])}

    def lost(number: int, settings: object, observed: object, which: str) -> float:
        """Laplace loses 3 points a strength and pruning 6, on public images; on test images nothing tells."""
        name = parts[number].defence.partition("(")[0]
        return {"laplace": 0.03, "prune": 0.06}[name] * (number - first[name]) if which == "held_out" else 0.0

    monkeypatch.setattr("fedtap.simulator.federation.equal_loss._lost", lost)
    monkeypatch.setattr("fedtap.simulator.federation.equal_loss._cost", lambda *which: {})
    attacked = [number for number in range(len(parts)) if equal_loss(number, parts, {}) is not None]
    assert attacked == [0, first["laplace"] + 3, first["prune"] + 2]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small run leaves."""
    folder = tmp_path_factory.mktemp("equal")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    words += ["--defence", "none,laplace(0.1),clip(1.0)+noise(1.0)", "--accuracy-loss", "0.05"]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "defences", *words, "--out", str(folder)) == 0
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_one_strength_of_each_is_attacked_the_one_nearest_on_public_images(left: Path) -> None:
    found = rows(left)
    attacked = {row["defence"]: row for row in found if "attack" in row}
    tried = {row["defence"]: row for row in found if "attack" not in row}
    assert len(attacked) == 3
    plain = attacked["none"]
    assert plain["accuracy_lost"] == 0
    for family in ("laplace", "clip+noise"):
        mine = {
            text: abs(plain["held_out"] - row["held_out"] - 0.05)
            for text, row in (attacked | tried).items()
            if "+".join(part.name for part in described(text)) == family
        }
        assert 2 <= len(mine) <= 4
        assert len([text for text in mine if text in attacked]) == 1
        assert mine[next(text for text in mine if text in attacked)] == min(mine.values())
    for row in attacked.values():
        assert row["accuracy_lost"] == pytest.approx(plain["accuracy"] - row["accuracy"])
        assert (row["overhead"] is None) == (row["defence"] == "none")


def test_rows_tell_an_epsilon_where_one_is_known(left: Path) -> None:
    notes = {row["defence"].partition("(")[0]: row for row in rows(left) if "attack" in row}
    noisy = next(row for row in rows(left) if "noise" in row["defence"] and "attack" in row)
    assert noisy["epsilon"] > 0
    assert notes["laplace"]["epsilon"] is None
    assert "Laplace" in notes["laplace"]["epsilon_note"]
    assert "∞" in notes["none"]["epsilon_note"]
    assert not any("success" in row for row in rows(left))


def test_the_report_has_a_line_for_each_defence_and_marks_what_needs_the_truth(left: Path) -> None:
    found = rows(left)
    groups, _ = defences.by_defence(found)
    assert len(groups) == 3
    for group in groups:
        psnr = {who: middle for who, (middle, _) in defences.attackers(group).items()}
        assert psnr[defences.UPPER] >= psnr[defences.PLAIN]
    console = Console(width=80, record=True)
    console.print(defences.trade_table(found))
    shown = console.export_text()
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "needs the" in shown
    page = (left / "report.html").read_text()
    assert "What each defence leaves, and what it costs" in page
    assert "privacy against accuracy" in page
    assert [column.name for column in images.chosen([row for row in found if "attack" in row])] == ["defence"]
    assert defences.section([row for row in found if row["defence"] == "none"]) == {}


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"accuracy_loss": "0.05"}, "add --rounds"),
        ({"accuracy_loss": "0.05", "rounds": "1", "defence": "noise(0.1)"}, "add none"),
        ({"accuracy_loss": "0.05", "rounds": "1", "defence": "soteria(0.4)"}, "Nothing is left"),
        ({"accuracy_loss": "1.5", "rounds": "1"}, "--accuracy-loss"),
    ],
)
def test_a_mistake_gets_one_sentence(
    knobs: Mapping[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for knob, value in knobs.items() for word in (f"--{knob.replace('_', '-')}", value)]
    assert run(monkeypatch, "defences", *words, "--out", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
