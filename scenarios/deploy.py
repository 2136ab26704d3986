"""Play a scenario on Flower's own engines, on this machine's loopback.

`python -m fedtap.scenarios.deploy NAME --nodes 5 --option value …` starts a SuperLink and five SuperNodes (the last one
is the compromised client; a scenario such as `attention` has none, and as many nodes as clients), submits the scenario
with `flwr run`, waits, and stops what it started. It submits an app of a pyproject.toml alone: the nodes have fedtap
installed. With `--secure` the SuperLink speaks TLS and knows its SuperNodes by their keys, made for this run alone.
With `--engine simulation` the SuperLink plays all nodes itself, on Ray. On real hosts, start the same programs by hand:
`docs/tls.md` has the commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from fedtap.scenarios.certificates import Certificates, make_certificates
from fedtap.scenarios.command.options import absolute, options_text, pairs
from fedtap.scenarios.command.plan import code_in, models_of, plan, scenario_named
from fedtap.scenarios.flower_programs import (
    QUIET,
    free_port,
    listens,
    superlink_command,
    supernode_command,
    write_connection,
)
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.models.registry import OWN_MODELS, plain_name
from fedtap.simulator.options import options_of
from fedtap.simulator.report.folder import left_by_us, place
from fedtap.simulator.run import described_run, device_named
from fedtap.simulator.scenario import Scenario

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

_START = 60.0
"""Seconds in which a program has to start."""

_AT_ONCE = 4
"""Keys that are registered at the same time, each by a program of its own."""


@dataclass(frozen=True)
class Deployment:
    """Flower's programs on this machine's loopback: a SuperLink, and the SuperNodes that were started beside it.

    Args:
        home: `FLWR_HOME`, an empty folder: it holds the logs, and `config.toml`, which names the SuperLink.
        environment: of every program.
        certificates: where SuperLink and SuperNodes use TLS and SuperNodes are authenticated; None without both.
        port: the SuperLink's.
    """

    home: Path
    environment: Mapping[str, str]
    certificates: Certificates | None = None
    port: int = field(default_factory=free_port)

    @contextlib.contextmanager
    def superlink(self, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        """The SuperLink, once it listens, with `more` on its command line; `flwr` finds it by `config.toml`.

        Raises:
            FedtapError: it does not listen.
        """
        write_connection(self.home, self.port, self.certificates)
        log, command = self.home / "superlink.log", superlink_command(self.port, self.certificates)
        with _running([*command, *more], self.environment, log) as process:
            _wait_for(lambda: listens(self.port), process, log, f"open port {self.port}")
            yield process

    def register(self, nodes: int) -> None:
        """Tell the SuperLink the public keys of the SuperNodes, which it turns away otherwise.

        Raises:
            FedtapError: it does not take one.
        """
        if self.certificates is None:
            return
        keys = [self.certificates.supernode_public(number) for number in range(nodes)]
        for begin in range(0, nodes, _AT_ONCE):
            started = [self._flwr("supernode", "register", str(key)) for key in keys[begin : begin + _AT_ONCE]]
            for process in started:
                told = process.communicate()[0]
                if process.returncode:
                    raise FedtapError(f"The SuperLink did not take a SuperNode's key: {short(told, 300)}")

    @contextlib.contextmanager
    def supernode(self, partition: int, nodes: int, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """The SuperNode of a partition, with `more` in its environment.

        It is connected when it is used: until then its program may still start.
        """
        command = supernode_command(self.port, partition, nodes, self.certificates)
        with _running(command, {**self.environment, **more}, self.log(partition)) as process:
            yield process

    def log(self, partition: int) -> Path:
        """What a SuperNode says."""
        return self.home / f"supernode-{partition}.log"

    def connected(self, partition: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until a SuperNode is connected.

        Raises:
            FedtapError: it ends, or takes too long.
        """
        log = self.log(partition)
        _wait_for(lambda: "SuperNode ID:" in log.read_text(errors="replace"), process, log, "reach the SuperLink")

    def run(self, app: Path, *more: str, superlink: subprocess.Popen[bytes]) -> str:
        """What `flwr run` says of an app, until the run has ended.

        Args:
            more: on its command line.
            superlink: without which it would wait for ever.

        Raises:
            FedtapError: `flwr run` says that it failed, or the SuperLink ended.
        """
        process = self._flwr("run", str(app), "--stream", *more)
        helpers: set[int] = set()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    told = process.communicate(timeout=1)[0]
                    break
                helpers |= _groups_of(superlink.pid)
                if superlink.poll() is not None:
                    _stop(helpers)  # the ServerApp outlives a SuperLink that is killed
                    raise FedtapError(
                        f"The SuperLink ended with exit code {superlink.returncode} before the run did: start it "
                        "again. What was observed until then is in the run's folder."
                    )
        finally:
            process.kill()
            process.communicate()
        if process.returncode:
            raise FedtapError(f"`flwr run` did not finish the scenario: {_why(told)}")
        return told

    def _flwr(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["flwr", *words],
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def flower(
    name: str,
    knobs: Mapping[str, str],
    out: Path,
    data_root: Path,
    nodes: int,
    engine: Engine,
    overwrite: bool = False,
    secure: bool = False,
    reply_timeout: float | None = None,
) -> str:
    """Play scenario `name` with `flwr run` over `nodes` nodes; `out` then holds the run. Returns Flower's log.

    Args:
        overwrite: replace a run with other settings that `out` holds.
        secure: with TLS and authenticated SuperNodes, on the deployment engine.
        reply_timeout: seconds in which clients have to reply; None means the app's own limit.

    Raises:
        FedtapError: a program did not start, or the run failed.
    """
    own = [*code_in(name, options_text(knobs)), *(model for model in models_of(plan(name, knobs)) if ":" in model)]
    options = options_text(absolute(options_of(scenario_named(name)), knobs))
    before = _finished(out)
    with tempfile.TemporaryDirectory(prefix="fedtap-") as folder, contextlib.ExitStack() as stack:
        home = Path(folder)
        certificates = make_certificates(home / "certificates", nodes) if secure else None
        deployment = Deployment(home, surroundings(home, own), certificates)
        more: list[str] = []
        if engine == "simulation":
            superlink = stack.enter_context(deployment.superlink("--simulation"))
            more = ["--federation-config", f"num-supernodes={nodes} client-resources-num-cpus=1"]
        else:
            superlink = stack.enter_context(deployment.superlink())
            deployment.register(nodes)
            started = [stack.enter_context(deployment.supernode(number, nodes)) for number in range(nodes)]
            for number, process in enumerate(started):
                deployment.connected(number, process)
        config = {"scenario": name, "options": options, "data-root": str(data_root.resolve())}
        config |= {"out": str(out.resolve()), "overwrite": str(overwrite).lower()}
        if reply_timeout is not None:
            config["reply-timeout"] = str(reply_timeout)
        told = deployment.run(app_in(home / "app", config), *more, superlink=superlink)
        if _finished(out) in (None, before):
            raise FedtapError(f"`flwr run` did not finish the scenario: {_why(told)}")
        return told


def surroundings(home: Path, own: Sequence[str] = ()) -> dict[str, str]:
    """The environment of Flower's programs.

    Args:
        home: `FLWR_HOME`.
        own: `module:function` of the user's own that nodes may import.
    """
    return (
        os.environ
        | QUIET
        | {
            "FLWR_HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # where a module:function of the user's own may lie
            "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            OWN_MODELS: ",".join(filter(None, (os.environ.get(OWN_MODELS), *map(plain_name, own)))),
        }
    )


def _why(told: str) -> str:
    """A sentence of ours in Flower's log, or else its end."""
    sentence = re.search(r"FedtapError: (.*)", told)
    return sentence[1] if sentence else f"the end of what it said:\n{told[-3000:]}"


def app_in(folder: Path, config: Mapping[str, str]) -> Path:
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
def _running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the background, with its log in a file; stopped, with what it started, on the way out."""
    with log.open("w") as said:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            helpers = {process.pid, *_groups_of(process.pid)}
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _stop(helpers)


def _groups_of(pid: int) -> set[int]:
    """The process groups of a program's children: Flower's SuperExec, which starts apps, has one of its own."""
    try:
        listed = subprocess.run(["ps", "-A", "-o", "ppid=,pgid="], capture_output=True, text=True, check=False).stdout
    except OSError:  # a container without ps
        return set()
    pairs_of_ids = (map(int, line.split()) for line in listed.splitlines())
    return {group for parent, group in pairs_of_ids if parent == pid} - {os.getpgrp()}


def _stop(groups: set[int]) -> None:
    """Kill what is left of these process groups."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def _wait_for(done: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, what: str) -> None:
    """Wait until a program has done something.

    Raises:
        FedtapError: it ends before, or takes longer than `_START`.
    """
    until = time.monotonic() + _START
    while time.monotonic() < until and process.poll() is None:
        if done():
            return
        time.sleep(0.1)
    program, said = Path(str(process.args[0])).name, log.read_text(errors="replace")[-2000:]  # type: ignore[index]
    ended = f"it ended with exit code {process.returncode}" if process.returncode is not None else f"{_START:g} s"
    raise FedtapError(f"{program} did not {what} ({ended}); it said:\n{said}")


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
    secure: Annotated[
        bool, typer.Option("--secure", help="TLS, and SuperNodes authenticated by keys made for this run.")
    ] = False,
    reply_timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds in which clients have to reply; 3600 unless said.")
    ] = None,
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
    flower(name, knobs, out, data_root, nodes, engine, overwrite, secure, reply_timeout)  # type: ignore[arg-type]
    print(f"{out / 'report.html'} shows the pictures, {out / 'rows.jsonl'} holds every figure.")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    try:
        app()
    except FedtapError as error:
        print(f"fedtap: {error}", file=sys.stderr)
        raise SystemExit(2) from None
