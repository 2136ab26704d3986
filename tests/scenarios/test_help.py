"""Help of the commands: on one screen of 45 lines and 80 columns, with what every option and argument means."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import typer

from fedtap.scenarios.command.main import cli, main

ALL = typer.main.get_command(cli)


def helped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["fedtap", *words])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return capsys.readouterr().out


def commands(group: Any, *names: str) -> list[tuple[str, ...]]:
    inner = [one for name, command in getattr(group, "commands", {}).items() for one in commands(command, *names, name)]
    return [names, *inner]


@pytest.mark.parametrize("words", commands(ALL), ids=" ".join)
def test_the_help_of_a_command_goes_on_one_screen_under_either_name(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = helped(monkeypatch, capsys, *words, "--help")
    lines = [line for line in said.splitlines() if "[default: None]" not in line]  # older versions of typer write these
    assert len(lines) <= 45
    assert helped(monkeypatch, capsys, *words, "-h") == said


def test_attack_names_every_option_and_tells_of_the_rest_where_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [one for one in ALL.commands["attack"].params if one.param_type_name == "option"]  # type: ignore[attr-defined]
    short, whole = (helped(monkeypatch, capsys, "attack", word) for word in ("--help", "--help-all"))
    assert all(option.opts[0] in re.findall(r"--[a-z-]+", short) for option in options)
    assert "Nesterov" in whole
    assert "Nesterov" not in short
    assert all(option.help[:20] in " ".join(whole.split()) for option in options)


@pytest.mark.parametrize(
    ("words", "said"),
    [("show", "The folder of a run"), ("attack", "A saved leak"), ("bench compare", "A bench's .json.")],
)
def test_arguments_are_told_of(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in helped(monkeypatch, capsys, *words.split(), "--help")
