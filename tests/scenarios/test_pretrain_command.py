"""`fedtap pretrain diffusion` as a user meets it: what it hands on, and one sentence for each mistake."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedtap.scenarios.command.main import main
from fedtap.simulator.models import diffusion_pretraining as module
from fedtap.simulator.models.diffusion_pretraining import Pretraining


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedtap", "pretrain", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Pretraining]]:
    """Where and what is pretrained; nothing is."""
    calls: list[tuple[Path, Pretraining]] = []
    monkeypatch.setattr(module, "pretrain", lambda out, setting, data_root, **_: calls.append((out, setting)))
    return calls


def test_the_defaults_are_those_of_a_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[Path, Pretraining]]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(monkeypatch, "diffusion") == 0
    assert run(monkeypatch, "diffusion", "--size", "64") == 0
    assert asked == [
        (tmp_path / "fedtap" / "diffusion-32", Pretraining()),
        (tmp_path / "fedtap" / "diffusion-64", Pretraining(size=64)),
    ]


def test_datasets_are_named_with_commas_or_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[Path, Pretraining]]
) -> None:
    (tmp_path / "a,b").mkdir()
    words = ["--dataset", "photos, cifar10", "--dataset", str(tmp_path / "a,b"), "--out", str(tmp_path)]
    assert run(monkeypatch, "diffusion", *words) == 0
    assert asked == [(tmp_path, Pretraining(("photos", "cifar10", str(tmp_path / "a,b"))))]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("language",), "There is no model to pretrain named 'language'"),
        (("diffusion", "--size", "30"), "--size that 4 divides"),
        (("diffusion", "--dataset", ","), "on no images"),
        (("diffusion", "--device", "abacus"), "'abacus' is no device on which fedtap computes"),
    ],
)
def test_each_mistake_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_ctrl_c_says_that_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "pretrain", stopped)
    assert run(monkeypatch, "diffusion", "--out", str(tmp_path), "--overwrite") == 130
    assert "the same command without --overwrite goes on" in capsys.readouterr().err
