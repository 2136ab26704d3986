"""Plays settings in this process: with sound clients or with a faulty one, to the end or until it is stopped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from fedtap.clients.app import client_app
from fedtap.scenarios.command.main import main
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.attack import Attack
from fedtap.simulator.run import run
from fedtap.simulator.scenario import Row, Scenario
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.roll import ASKED
from tests.support.faulty_clients import FAULTS, Reply

TIMES = ("seconds", "fit_seconds")
"""Columns that differ from run to run."""


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command line in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["fedtap", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


class Faulty(ClientApp):
    """Clients of these settings, of which client 1 spoils its replies."""

    def __init__(self, settings: Sequence[Scenario], fault: str) -> None:
        super().__init__()
        self._sound, self._fault = client_app(lambda config: settings), FAULTS[fault]

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self._sound(message, context)
        if message.metadata.message_type == ASKED or context.node_config["partition-id"] != 1:
            return reply
        return self._fault(Reply(message, reply))  # type: ignore[no-any-return]


def play(
    settings: Sequence[Any],
    out: Path,
    *,
    fault: str = "",
    nodes: int | None = None,
    stop_at: int | None = None,
    resume: bool = False,
    data_root: Path | None = None,
) -> list[Row]:
    """The rows of a run of these settings, whose data lie beside its folder unless another one is named.

    Args:
        fault: what client 1 does wrong.
        nodes: of the federation; as many as are needed, where none is said.
        stop_at: the setting before which somebody presses Ctrl-C.
    """
    root = data_root or out.parent
    begun: list[Scenario] = []

    def grid(setting: Scenario) -> LocalGrid:
        if len(begun) == stop_at:
            raise KeyboardInterrupt
        begun.append(setting)
        app = Faulty(settings, fault) if fault else client_app(lambda config: settings)
        return LocalGrid(app, nodes or setting.nodes, {"data-root": str(root)})

    return run(settings, grid, out, device=torch.device("cpu"), data_root=root, resume=resume)


def planned(name: str, options: Mapping[str, Any], out: Path, *, resume: bool = False) -> list[Row]:
    """The rows of what these options ask for, as `play` plays it."""
    return play(plan(name, {word: str(value) for word, value in options.items()}), out, resume=resume)


def reconstructions(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """File -> tensors, of what a run's attacks brought back."""
    return {file.name: load_file(file) for file in sorted((out / "reconstructions").iterdir())}


@contextlib.contextmanager
def no_attack_runs(kind: type[Attack[Any]]) -> Iterator[None]:
    """Attacks of this kind fail the test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kind, "reconstruct", lambda *_: pytest.fail("an attack is made again"))
        yield


def untimed(rows: Sequence[Row]) -> list[Row]:
    """The rows without what differs from run to run."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def check_resumed(settings: Sequence[Any], folder: Path) -> None:
    """A run that is stopped before its second setting, and gone on with, has the rows of one that was not."""
    whole = play(settings, folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        play(settings, folder / "stopped", stop_at=1)
    (first,) = (folder / "stopped/reconstructions").iterdir()
    before = first.stat().st_mtime_ns
    resumed = play(settings, folder / "stopped", resume=True)
    assert untimed(resumed) == untimed(whole)
    assert first.stat().st_mtime_ns == before  # it was not attacked again
    headings = [(folder / name / "report.html").read_text().count("<h2>") for name in ("whole", "stopped")]
    assert headings[0] == headings[1]


def check_truth(
    settings: Sequence[Any], folder: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, other: Any
) -> tuple[list[Row], list[Row]]:
    """The rows of a run, and of one whose scorer alone has other private data; what is kept is the same to the bit.

    Args:
        owner: the class whose method `name` gives the private data, and `other` other ones.
    """
    honest = play(settings, folder / "honest")
    true = type(settings[0]).score

    def deceived(setting: Any, trial: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            return true(setting, trial)

    monkeypatch.setattr(type(settings[0]), "score", deceived)
    rows = play(settings, folder / "deceived")
    kept = [{path.name: path.read_bytes() for path in (folder / which / "reconstructions").iterdir()}
            for which in ("honest", "deceived")]  # fmt: skip
    assert kept[0] == kept[1]
    assert kept[0]
    return honest, rows
