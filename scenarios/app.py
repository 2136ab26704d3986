"""The Flower app: what `flwr run .` starts on the simulation engine and on the deployment engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fedtap.clients.app import client_app
from fedtap.clients.training import one_thread
from fedtap.scenarios.command.options import options_text
from fedtap.scenarios.command.plan import code_in, models_of, plan_of, planned
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.models.registry import allow
from fedtap.simulator.report.folder import place
from fedtap.simulator.run import described_run, device_named, run
from fedtap.simulator.scenario import Row, Scenario
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.limits import REPLY_TIMEOUT, Limited

LONGEST_TIMEOUT = 604_800
"""Seconds in a week; a thread can be waited for no longer than some centuries."""

client = client_app(plan_of)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run config's scenario over Flower's grid, and leave the same files as `fedtap run`."""
    torch.set_num_threads(1)
    limited = Limited(grid, reply_timeout(context.run_config))
    _play(context.run_config, lambda setting: limited)


def reply_timeout(config: UserConfig) -> float | None:
    """Seconds that the run config allows for the replies to a message; None where it says nothing.

    Raises:
        FedtapError: it is no number above 0.
    """
    said = config.get("reply-timeout", "")
    if said == "":
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise FedtapError(
            f"The run config says reply-timeout={short(said)!r}, and it is a number of seconds above 0, up to "
            f"{LONGEST_TIMEOUT:,}: leave it out for {REPLY_TIMEOUT:g}."
        )
    return seconds


def in_process(scenario: str, options: Mapping[str, Any], run_config: UserConfig) -> list[Row]:
    """Play a scenario in this process, and return its rows.

    Args:
        options: the scenario's, by name; a list of values is swept.
        run_config: what is said of the run: `data-root`, `out`, `device`, `overwrite`.

    Raises:
        FedtapError: there is no such scenario or option, or it cannot be played.
    """
    config: UserConfig = {**run_config, "scenario": scenario, "options": options_text(options)}
    allow(code_in(scenario, options_text(options)))  # the caller's own
    allow(model for model in models_of(planned(scenario, options_text(options))) if ":" in model)
    with one_thread():
        return _play(config, lambda setting: LocalGrid(client, setting.nodes, config))


def _play(config: UserConfig, grid_for: Callable[[Scenario], Grid]) -> list[Row]:
    """Play what the run config asks for, each setting over its grid.

    Raises:
        FedtapError: the run config asks for something that cannot be played.
    """
    settings = plan_of(config)
    overwrite = str(config.get("overwrite") or "false").lower()
    if overwrite not in ("true", "false"):
        raise FedtapError(f"The run config says overwrite={short(overwrite)!r}, and it is true or false.")
    device = device_named(str(config.get("device") or ""))
    folder = Path(str(config["out"])) if config.get("out") else None
    usual = Path("runs") / settings[0].plain_name
    out = place(described_run(settings, device), folder, usual, overwrite=overwrite == "true")
    data_root = Path(str(config.get("data-root") or "data"))
    rows = run(settings, grid_for, out, device=device, data_root=data_root, overwrite=overwrite == "true")
    for setting in settings:
        setting.verdict(rows)
    return rows
