"""`fedtap list`: one kind, and one name in full."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from fedtap.attackers import ATTACKS
from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.command.catalogue import LISTS, field_docs, reads
from fedtap.scenarios.command.main import main
from fedtap.simulator.data import DATASETS
from fedtap.simulator.defences import DEFENCES
from fedtap.simulator.models import MODELS


def listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors, each on one line."""
    monkeypatch.setattr(sys, "argv", ["fedtap", "list", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), " ".join(shown.out.split()), shown.err


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_one_kind_holds_no_other(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = listed(monkeypatch, capsys, kind)
    names = {"scenarios": SCENARIOS, "attacks": ATTACKS, "defences": DEFENCES, "datasets": DATASETS, "models": MODELS}
    assert code == 0
    assert all(name in shown for name in names[kind])
    heads = {
        "scenarios": "first_leak Does",
        "attacks": "idlg iDLG:",
        "defences": "dp_sgd(",
        "datasets": "cifar10 CIFAR",
        "models": "resnet20 ResNet",
    }
    assert [one for one, head in heads.items() if head in shown] == [kind]


def test_a_question_over_two_lines_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, shown, _ = listed(monkeypatch, capsys, "scenarios")
    assert shown.count("?") >= len(SCENARIOS)
    assert "and at what price?" in shown


def test_an_attack_is_told_in_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, shown, _ = listed(monkeypatch, capsys, "idlg")
    for said in ("arxiv.org/abs/2001.02610", "Departs", "Reads: GradientLeak", "steps 2400 Evaluations", "history 80"):
        assert said in shown
    assert "trained on auxiliary pairs" not in shown
    _, shown, _ = listed(monkeypatch, capsys, "restarts")
    assert "attack (needed) The attack that is restarted." in shown


def test_what_is_trained_first_is_said_to_be() -> None:
    assert "trained on auxiliary pairs first" in reads(ATTACKS["coarse_git"])[0]
    assert reads(ATTACKS["posterior_mmd"])[1] == "Gives back: PseudoData."


def test_every_hyper_parameter_and_argument_is_told_with_its_meaning() -> None:
    for name, kind in ATTACKS.items():
        fields = {field.name for field in dataclasses.fields(kind) if field.repr}  # type: ignore[arg-type]
        assert fields <= {field for field, said in field_docs(kind).items() if said}, name
    for name, defence in DEFENCES.items():
        assert {argument.name for argument in defence.arguments()} <= field_docs(defence).keys(), name


def test_a_name_of_two_kinds_is_told_as_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, shown, _ = listed(monkeypatch, capsys, "noise")
    assert "noise: a defence" in shown
    assert "--sigma NUMBER" in shown
    assert listed(monkeypatch, capsys, "resnet20")[1].startswith("resnet20: a model of images, --model resnet20")


@pytest.mark.parametrize(("name", "near"), [("idgl", "idlg"), ("attack", "attacks"), ("photo", "photos")])
def test_an_unknown_name_ends_in_one_sentence(
    name: str, near: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, error = listed(monkeypatch, capsys, name)
    assert (code, shown, error.count("\n")) == (2, "", 1)
    assert f"did you mean {near}?" in error
