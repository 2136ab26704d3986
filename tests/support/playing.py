"""Scenarios played in this process, as the command line does, for the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from fedtap.clients.app import client_app
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.attack import Attack
from fedtap.simulator.run import run
from fedtap.simulator.scenario import Row, Scenario
from fedtap.simulator.wire.grid import LocalGrid


def played(
    settings: Sequence[Scenario], out: Path, data_root: Path, app: ClientApp | None = None, resume: bool = False
) -> list[Row]:
    """The rows of these settings; `out` holds the run.

    Args:
        app: what the nodes run in place of the settings' own clients.
    """

    def grid(setting: Scenario) -> LocalGrid:
        return LocalGrid(app or client_app(lambda config: settings), setting.nodes, {"data-root": str(data_root)})

    return run(settings, grid, out, device=torch.device("cpu"), data_root=data_root, resume=resume)


def planned(name: str, options: Mapping[str, Any], out: Path, data_root: Path, resume: bool = False) -> list[Row]:
    """The rows of what these options ask for."""
    return played(plan(name, {word: str(value) for word, value in options.items()}), out, data_root, resume=resume)


def reconstructions(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """File -> tensors, of what a run's attacks brought back."""
    return {file.name: load_file(file) for file in sorted((out / "guesses").iterdir())}


@contextlib.contextmanager
def no_attack_runs(kind: type[Attack[Any]]) -> Iterator[None]:
    """Attacks of this kind fail the test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kind, "reconstruct", lambda *_: pytest.fail("an attack is made again"))
        yield
