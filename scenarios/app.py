"""The Flower app: what `flwr run .` starts on the simulation engine and on the deployment engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fedtap.clients.app import client_app
from fedtap.clients.cost import overhead
from fedtap.clients.training import one_thread
from fedtap.scenarios.command.options import written
from fedtap.scenarios.command.plan import Part, models_of, plan_of, planned, sorted_out
from fedtap.scenarios.gradients.game import Game
from fedtap.scenarios.gradients.game_report import play_games
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.models.registry import allow
from fedtap.simulator.report.folder import Row, place
from fedtap.simulator.run import described_run, device_named, run
from fedtap.simulator.study import Study, run_studies
from fedtap.simulator.wire.grid import LocalGrid

client = client_app(plan_of)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run config's scenario over Flower's grid, and leave the same files as `fedtap run`."""
    torch.set_num_threads(1)
    name = str(context.run_config.get("scenario"))
    if isinstance(plan_of(context.run_config)[0], Game):
        raise FedtapError(f"{name} plays thousands of clients in one process, not on a grid: fedtap run {name}.")
    play(context.run_config, lambda part: grid)


def in_process(scenario: str, options: Mapping[str, Any], run_config: UserConfig) -> list[Row]:
    """Play a scenario in this process, and return its rows.

    Args:
        options: the scenario's, by name; a list of values is swept.
        run_config: what is said of the run: `data-root`, `out`, `device`, `overwrite`.

    Raises:
        FedtapError: there is no such scenario or option, or it cannot be played.
    """
    config: UserConfig = {**run_config, "scenario": scenario, "options": written(options)}
    allow(model for model in models_of(planned(scenario, written(options))) if ":" in model)  # the caller's own

    def grid(part: Part) -> Grid:
        nodes = part.clients if isinstance(part, Study) else (part.clients or part.victims) + 1
        return LocalGrid(client, nodes, config)

    with one_thread():
        return play(config, grid)


def play(config: UserConfig, grid_for: Callable[[Part], Grid]) -> list[Row]:
    """Play what the run config asks for, each part over its grid.

    Raises:
        FedtapError: the run config asks for something that cannot be played.
    """
    parts = plan_of(config)
    said = str(config.get("overwrite") or "false").lower()
    if said not in ("true", "false"):
        raise FedtapError(f"The run config says overwrite={short(said)!r}, and it is true or false.")
    overwrite = said == "true"
    games = tuple(part for part in parts if isinstance(part, Game))
    alone = len(games) == len(parts)
    device = torch.device("cpu") if alone else device_named(str(config.get("device") or ""))
    folder = Path(str(config["out"])) if config.get("out") else None
    out = place(described_run(parts, device), folder, Path("runs") / parts[0].name, overwrite=overwrite)
    data_root = Path(str(config.get("data-root") or "data"))
    if alone:
        return play_games(games, out, overwrite)
    scenarios, studies = sorted_out(parts)
    if studies:
        return run_studies(studies, grid_for, out, device=device, data_root=data_root, overwrite=overwrite)
    return run(scenarios, grid_for, out, device=device, data_root=data_root, overwrite=overwrite, overhead=overhead)
