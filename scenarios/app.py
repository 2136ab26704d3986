"""The Flower app: what `flwr run .` starts on the simulation engine and on the deployment engine."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtap.clients.app import client_app
from fedtap.scenarios.command.plan import plan_of
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.report.folder import place
from fedtap.simulator.run import described_run, device_named, run

client = client_app(plan_of)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run config's scenario over Flower's grid, and leave the same files as `fedtap run`."""
    torch.set_num_threads(1)
    config = context.run_config
    settings = plan_of(config)
    overwrite = str(config.get("overwrite") or "false").lower()
    if overwrite not in ("true", "false"):
        raise FedtapError(f"The run config says overwrite={short(overwrite)!r}, and it is true or false.")
    device = device_named(str(config.get("device") or ""))
    said = Path(str(config["out"])) if config.get("out") else None
    about = described_run(settings, device)
    out = place(about, said, Path("runs") / settings[0].name, overwrite=overwrite == "true")
    rows = run(
        settings,
        lambda setting: grid,
        out,
        device=device,
        data_root=Path(str(config.get("data-root") or "data")),
        overwrite=overwrite == "true",
    )
    for setting in settings:
        setting.verdict(rows)
