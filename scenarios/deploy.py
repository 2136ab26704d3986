"""Play a scenario on Flower's own engines, on this machine's loopback.

`python -m fedtap.scenarios.deploy NAME --nodes 5 --option value …` starts a SuperLink and five SuperNodes (the last one
is the compromised client; a scenario such as `attention` has none, and as many nodes as clients), submits the scenario
with `flwr run`, waits, and stops what it started. It submits an app of a pyproject.toml alone: the nodes have fedtap
installed. With `--engine simulation` the SuperLink plays all nodes itself, on Ray. On real hosts, start the same two
programs with TLS instead of --insecure; the README shows how.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from fedtap.scenarios.command.options import absolute, options_text, pairs
from fedtap.scenarios.command.plan import code_in, models_of, plan, scenario_named
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.registry import OWN_MODELS, plain_name
from fedtap.simulator.options import options_of
from fedtap.simulator.report.folder import left_by_us, place
from fedtap.simulator.run import described_run, device_named
from fedtap.simulator.scenario import Scenario

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the app runs in this environment, which has what it needs
}

APP = """\
[project]
name = "fedtap"
version = "{version}"

[tool.flwr.app]
publisher = "fedtap"

[tool.flwr.app.components]
serverapp = "fedtap.scenarios.app:server"
clientapp = "fedtap.scenarios.app:client"

[tool.flwr.app.config]
"""
"""The Flower app that is submitted: its components, which the installed package has, and after them its run config."""

Engine = Literal["deployment", "simulation"]


def flower(
    name: str,
    knobs: Mapping[str, str],
    out: Path,
    data_root: Path,
    nodes: int,
    engine: Engine,
    overwrite: bool = False,
) -> str:
    """Play scenario `name` with `flwr run` over `nodes` nodes; `out` then holds the run. Returns Flower's log.

    Args:
        overwrite: replace a run with other settings that `out` holds.

    Raises:
        FedtapError: a program did not start, or the run failed.
    """
    own = [*code_in(name, options_text(knobs)), *(model for model in models_of(plan(name, knobs)) if ":" in model)]
    options = options_text(absolute(options_of(scenario_named(name)), knobs))
    before = _finished(out)
    with tempfile.TemporaryDirectory(prefix="fedtap-") as home, contextlib.ExitStack() as stack:
        environment = (
            os.environ
            | QUIET
            | {
                "FLWR_HOME": home,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                # where a module:function of the user's own may lie
                "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                OWN_MODELS: ",".join(filter(None, (os.environ.get(OWN_MODELS), *map(plain_name, own)))),
            }
        )
        port = _free_port()
        (Path(home) / "config.toml").write_text(
            f'[superlink]\ndefault = "fedtap"\n\n[superlink.fedtap]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        superlink = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(port)]
        log = Path(home) / "superlink.log"
        stack.enter_context(_running(superlink + ["--simulation"] * (engine == "simulation"), environment, log))
        _wait_for(port, log)
        federation = []
        if engine == "simulation":
            federation = ["--federation-config", f"num-supernodes={nodes} client-resources-num-cpus=1"]
        else:
            for partition in range(nodes):
                supernode = [
                    "flower-supernode",
                    "--insecure",
                    "--superlink",
                    f"127.0.0.1:{port}",
                    "--port",
                    str(_free_port()),
                ]
                partition_of_it = ["--node-config", f"partition-id={partition} num-partitions={nodes}"]
                stack.enter_context(
                    _running(supernode + partition_of_it, environment, Path(home) / f"supernode-{partition}.log")
                )
        config = {"scenario": name, "options": options, "data-root": str(data_root.resolve())}
        config |= {"out": str(out.resolve()), "overwrite": str(overwrite).lower()}
        done = subprocess.run(
            ["flwr", "run", str(_app(Path(home) / "app", config)), "--stream", *federation],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        told = done.stdout + done.stderr
        if done.returncode or _finished(out) in (None, before):
            sentence = re.search(r"FedtapError: (.*)", told)
            why = sentence[1] if sentence else f"the end of what it said:\n{told[-3000:]}"
            raise FedtapError(f"`flwr run` did not finish the scenario: {why}")
        return told


def _app(folder: Path, config: Mapping[str, str]) -> Path:
    """A folder with the Flower app of this run config.

    Raises:
        FedtapError: an option has bytes in it that are no text.
    """
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items()]
    folder.mkdir()
    try:
        text = (APP.format(version=version("fedtap")) + "".join(lines)).encode()
    except UnicodeEncodeError as error:
        raise FedtapError(
            "A path or an option is no UTF-8, and Flower's run config takes no other: rename it."
        ) from error
    (folder / "pyproject.toml").write_bytes(text)
    return folder


def _finished(out: Path) -> int | None:
    """When the folder's run was finished, in ns; None if there is none."""
    about = left_by_us(out)
    return (out / "run.json").stat().st_mtime_ns if about is not None and about.get("finished") else None


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """A program in the background, with its log in a file; stopped, with what it started, on the way out."""
    with log.open("w") as said:
        process = subprocess.Popen(
            command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with contextlib.suppress(ProcessLookupError):  # a helper process may outlive its parent for a moment
                os.killpg(process.pid, 9)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, log: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise FedtapError(f"The SuperLink did not open port {port} in {seconds:g} s; it said:\n{log.read_text()[-2000:]}")


def check_node_count(setting: Scenario, nodes: int) -> None:
    """Refuse another number of nodes than a setting needs; any will do for an image scenario that names no --clients.

    Raises:
        FedtapError: with the number to give.
    """
    if nodes != setting.nodes and not setting.any_nodes:
        raise FedtapError(
            f"{setting.name} needs {setting.nodes} nodes here, and there are {nodes}: --nodes {setting.nodes}."
        )


def main(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A scenario: see `fedtap list`.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes: the clients, and the compromised one if there is one.")] = 5,
    engine: Annotated[str, typer.Option(help="deployment or simulation.")] = "deployment",
    out: Annotated[
        Path | None, typer.Option(help="Folder for what the run leaves; runs/deployed, or -2, -3, …, unless said.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run with other settings.")] = False,
    data_root: Annotated[Path, typer.Option(envvar="FEDTAP_DATA_ROOT", help="Folder that holds the data sets.")] = Path(
        "data"
    ),
) -> None:
    """Play a scenario on Flower's deployment or simulation engine."""
    knobs = pairs(context.args)
    plan(name, knobs)  # a mistake is told here, not from inside the engine
    knobs = absolute(options_of(scenario_named(name)), knobs)
    parts = plan(name, knobs)
    for part in parts:
        check_node_count(part, nodes)
    torch.set_num_threads(1)  # as the app does: the folder's run tells of it
    out = place(described_run(parts, device_named("")), out, Path("runs/deployed"), overwrite=overwrite)
    if engine not in ("deployment", "simulation"):
        raise FedtapError(f"There is no engine named {engine!r}: there are deployment, simulation.")
    flower(name, knobs, out, data_root, nodes, engine, overwrite)  # type: ignore[arg-type]
    print(f"{out / 'report.html'} shows the pictures, {out / 'rows.jsonl'} holds every figure.")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    try:
        app()
    except FedtapError as error:
        print(f"fedtap: {error}", file=sys.stderr)
        raise SystemExit(2) from None
