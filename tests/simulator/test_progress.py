"""Where there is no terminal, long loops say in lines how far they are, and only if a program asks for it."""

from __future__ import annotations

import pytest

from fedtap.simulator import progress as module
from fedtap.simulator.progress import in_lines, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which each look at it moves on by a second."""
    now = [0.0]

    def looked() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(module.time, "monotonic", looked)
    monkeypatch.setattr(module, "_lines", module._Lines())
    return now


def test_lines_say_how_many_are_done_and_how_long_the_rest_takes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    in_lines()
    assert list(progress(40, "iDLG")) == list(range(40))
    # one second a step: the first line comes 15 s after the program began
    assert capsys.readouterr().err.splitlines() == [
        "iDLG: 14 of 40, about 26 s left",
        "iDLG: 29 of 40, about 11 s left",
    ]


def test_a_loop_of_unknown_length_says_how_many_are_done(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    in_lines()
    assert sum(progress(iter(range(20)), "pairs")) == 190
    assert capsys.readouterr().err == "pairs: 14\n"


def test_nothing_is_said_unless_asked_for(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(progress(100, "iDLG"))) == 100
    assert capsys.readouterr().err == ""


def test_nested_loops_do_not_repeat_each_other(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    in_lines()
    for _ in progress(3, "setting"):
        for _ in progress(20, "iDLG"):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == clock[0] // 15
    assert all(line.startswith(("iDLG", "setting")) for line in lines)
