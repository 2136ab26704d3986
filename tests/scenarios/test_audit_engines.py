"""An app audited on Flower's own engines: as in one process, and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedtap.scenarios.audit import attacks, engines
from fedtap.scenarios.audit.engines import NO_ATTACK_ON_ENGINES, EnginePlay, FoundOnEngine
from fedtap.scenarios.audit.process import _end_all, _told_to_end
from fedtap.scenarios.audit.wrapped import Wrapping
from fedtap.simulator.errors import FedtapError
from tests.scenarios.test_audit import APPS, audited, coarse_pictures
from tests.scenarios.test_cli import run as fedtap

SEEN = ("verdict", "reason", "client", "round", "model", "steps", "batch_sizes", "optimiser", "learning_rate")
SEEN += ("momentum", "loss", "input_range", "replay_error")


def marked(home: str) -> list[str]:
    """Processes that have this FLWR_HOME."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"FLWR_HOME={home}".encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


@pytest.fixture(autouse=True)
def one_quick_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process."""
    monkeypatch.setattr(attacks, "_PANEL", ("exact_batch",))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The beginning of every FLWR_HOME in a test. Sockets' paths must be short, so it is no part of tmp_path."""
    with tempfile.TemporaryDirectory(prefix="fedtap-tests-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


def on_engine(engine: str, name: str, out: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """audit.json of an app that two clients play for one round."""
    command = ["audit", str(APPS / name), "--engine", engine, "--rounds", "1", "--minutes", "8", "--out", str(out)]
    assert fedtap(monkeypatch, *command, *words) == 0, (out / "app.log").read_text()[-3000:]
    document: dict[str, Any] = json.loads((out / "audit.json").read_text())
    return document


def seen(document: dict[str, Any]) -> list[list[Any]]:
    """What is told of each exchange, by round and client: a strategy asks clients in any order."""
    exchanges = sorted(document["exchanges"], key=lambda one: (one["round"], one["client"]))
    return [[one[name] for name in SEEN] for one in exchanges]


@pytest.mark.parametrize("engine", ["simulation", pytest.param("deployment", marks=pytest.mark.slow)])
def test_an_engine_tells_what_one_process_tells_and_leaves_nothing_running(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: str
) -> None:
    settings = "examples=64", "lr=0.02"
    here = audited("quickstart", tmp_path / "here", *settings, rounds=1)
    words = [word for setting in settings for word in ("--set", setting)]
    there = on_engine(engine, "quickstart", tmp_path / "there", monkeypatch, *words)
    assert len(here["exchanges"]) == len(there["exchanges"]) == 2
    assert seen(there) == seen(here)
    assert here["exchanges"][0]["steps"] == 2
    assert {key: there["app"][key] for key in ("messages", "failures", "run_config", "files")} == {
        key: here["app"][key] for key in ("messages", "failures", "run_config", "files")
    }
    assert NO_ATTACK_ON_ENGINES in there["not_tested"]
    assert there["finished"]
    assert f"--engine {engine}" in there["repeat"]
    assert not marked(temporary)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulation", "deployment"])
def test_local_data_stand_in_on_an_engine_too(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: str
) -> None:
    data = coarse_pictures(tmp_path / "local.npz", size=32)
    here = audited("vision_legacy", tmp_path / "here", rounds=1, data=data)
    there = on_engine(engine, "vision_legacy", tmp_path / "there", monkeypatch, "--data", str(data))
    assert seen(there) == seen(here)
    assert "the app's own data, CIFAR10: local data stood in for them" in there["not_tested"]
    assert not marked(temporary)


def test_an_engine_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedtap(monkeypatch, "audit", str(APPS / "quickstart"), "--engine", "cloud") == 2
    assert "--engine cloud is none of simulation, deployment" in " ".join(capsys.readouterr().err.split())
    words = "--engine", "simulation", "--fail-on", "identical"
    assert fedtap(monkeypatch, "audit", str(APPS / "quickstart"), *words) == 2
    assert "--fail-on asks what attacks rebuild, and none is run" in " ".join(capsys.readouterr().err.split())


# Without processes of Flower's.


def play_of(tmp_path: Path, path: Path = APPS / "quickstart", seconds: float = 60.0) -> EnginePlay:
    """A play of an app that sees into `seen`."""
    about = Wrapping("quickstart:client", "quickstart:server", str(tmp_path / "seen"), None, 2, 1, 0.0)
    return EnginePlay("simulation", path, tmp_path / "home", about, (), time.monotonic() + seconds)


def test_the_copy_names_other_components_and_the_app_is_untouched(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    toml = (APPS / "quickstart/pyproject.toml").read_text()
    toml = toml.replace('publisher = "tests"', 'publisher = "tests"\nfab-include = ["/quickstart.py"]')
    (app / "pyproject.toml").write_text(toml)
    (app / "quickstart.py").write_text("client = server = None\n")
    (app / "photo.png").write_bytes(b"0" * 100)
    copied = play_of(tmp_path, app).copied()
    assert {file.name for file in copied.iterdir()} == {"pyproject.toml", "quickstart.py", "fedtap_audited.py"}
    about = tomllib.loads((copied / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert about["components"] == {"serverapp": "fedtap_audited:server", "clientapp": "fedtap_audited:client"}
    assert about["fab-include"] == ["/quickstart.py", "/fedtap_audited.py"]
    assert about["config"]["lr"] == 0.01
    assert (app / "pyproject.toml").read_text() == toml
    assert len(list(app.iterdir())) == 3
    made: dict[str, Any] = {"__file__": str(copied / "fedtap_audited.py")}
    exec((copied / "fedtap_audited.py").read_text(), made)
    assert made["client"]._wrapping == play_of(tmp_path).wrapping


LEFT = """
import json, sys, time
from pathlib import Path
seen = Path(sys.argv[1]); seen.mkdir()
def leave(name, **told):
    (seen / name).write_text(json.dumps(told))
for client, low in ((1, -1.0), (0, -2.0)):
    leave(f"exchange_{client}.json", message=f"m{client}", exchange={"client": client}, asked=["one", f"{client}"],
        shape=[1, 2, 2], ranges=[[[1, 2, 2], [low], [0.5 - low]]])
"""
ENDED = 'leave("server.json", round={"m0": 1, "m1": 1}, messages={"train": 2}, asked=["two"], late=True, ended=True)'


@pytest.mark.parametrize(
    ("last", "seconds", "said"),
    [
        (ENDED, 60.0, None),
        ('leave("server.json", round={"m0": 1}, error="The server ended.")', 60.0, "^The server ended.$"),
        ("sys.exit(5)", 60.0, r"`flwr run` ended before the app did \(exit code 5\)"),
        ("time.sleep(60)", 1.5, "The app was not done in time and was stopped"),
    ],
    ids=["ended", "error", "exit", "time"],
)
def test_what_processes_leave_is_kept_however_they_end(
    last: str, seconds: float, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = [sys.executable, "-c", LEFT + last, str(tmp_path / "seen")]
    monkeypatch.setattr(EnginePlay, "_started", lambda play, stack: program)
    monkeypatch.setattr(engines, "_LOOK", 0.1)
    found, heard = FoundOnEngine(tmp_path / "seen"), []
    play = play_of(tmp_path, seconds=seconds)
    if said is None:
        play.play(found, lambda: heard.append(len(found.exchanges)))
    else:
        with pytest.raises(FedtapError, match=said):
            play.play(found, lambda: heard.append(len(found.exchanges)))
    assert heard[-1] == 2
    assert [one["exchange"]["client"] for one in found.exchanges] == ([1, 0] if "error" in last else [0, 1])
    (known,) = found.ranges.values()
    assert (known.low.item(), known.high.item()) == (-2.0, 2.5)
    if said is None:
        assert [one["exchange"]["round"] for one in found.exchanges] == [1, 1]
        assert (found.late, found.messages, found.asked) == (True, {"train": 2}, ["two", "one", "0", "1"])


def test_a_superlink_that_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = EnginePlay._program
    monkeypatch.setattr(EnginePlay, "_program", lambda play, *words: program(play, sys.executable, "-c", "exit(9)"))
    with pytest.raises(FedtapError, match="ended with exit code 9 before the app did"):
        play_of(tmp_path).play(FoundOnEngine(tmp_path / "seen"), lambda: None)


def test_a_program_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = EnginePlay._program
    monkeypatch.setattr(EnginePlay, "_program", lambda play, *words: program(play, "flower-none", *words))
    with pytest.raises(FedtapError, match="flower-none cannot be started"):
        play_of(tmp_path).play(FoundOnEngine(tmp_path / "seen"), lambda: None)


def test_processes_of_an_audit_are_ended_wherever_they_run_and_no_others(tmp_path: Path) -> None:
    def sleeper(home: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"], env={**os.environ, "FLWR_HOME": home}, start_new_session=True)

    ours, other = sleeper(f"{tmp_path}/a"), sleeper(f"{tmp_path}/ab")
    try:
        _end_all(f"{tmp_path}/a")
        assert ours.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def test_a_build_that_is_cancelled_ends_as_by_a_key() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _told_to_end():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
