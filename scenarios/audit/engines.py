"""An app played by Flower's own engines on this machine, with fedtap in front of its components.

The app is copied as far as `flwr run` bundles it, and the copy names components of an added module instead of its own.
A SuperLink, on the deployment engine a SuperNode for each client too, and `flwr run` are started in the folder of the
app, so that its data are found where they are; whatever happens, those processes are ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from flwr.cli.utils import collect_files, filter_paths_for_publish
from torch import Tensor

from fedtap.scenarios.audit.app import quoted_override
from fedtap.scenarios.audit.attacks import InputRange, Ranges
from fedtap.scenarios.audit.wrapped import SERVER_FILE, Wrapping
from fedtap.scenarios.flower_programs import free_port, listens, superlink_command, supernode_command, write_connection
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import write_atomically

NO_ATTACK_ON_ENGINES = (
    "attacks: on Flower's own engines exchanges are judged where they are made and not attacked; leave out --engine to "
    "have them attacked"
)
"""What is to be said of an audit on one of them."""

_MODULE = "fedtap_audited"
"""Name of the module that is added to the copy."""

_SOURCE = '''"""Added to this copy of the app by `fedtap audit`: its own components, observed."""

from pathlib import Path

from fedtap.scenarios.audit.wrapped import ObservedClient, observed_server

WRAPPING = {wrapping!r}
client = ObservedClient(Path(__file__).parent, WRAPPING)
server = observed_server(Path(__file__).parent, WRAPPING)
'''

_LOOK = 0.5
"""Seconds between two looks at what the processes have left."""

_START, _STOP = 60.0, 10.0
"""Seconds in which a SuperLink has to start, and in which a process that is asked to end has to."""


@dataclass(frozen=True)
class EnginePlay:
    """How an app is played."""

    engine: str
    """`simulation`, or else deployment."""
    path: Path
    """Folder of the app, from which its processes are started."""
    home: Path
    """Folder for Flower's own files and the copy: FLWR_HOME."""
    wrapping: Wrapping
    """What they are told."""
    overrides: tuple[str, ...] = ()
    """`key=value` for the app's run config."""
    until: float = 0.0
    """Value of time.monotonic() at which everything is ended."""
    _programs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def play(self, found: FoundOnEngine, hear: Callable[[], None]) -> None:
        """Play the app to its end; `hear` is called each time that `found` has been brought up to date.

        Raises:
            FedtapError: a process ended too early, the app's server raised, or time was over.
        """
        try:
            with contextlib.ExitStack() as stack:
                playing = stack.enter_context(self._program(*self._started(stack)))
                while playing.poll() is None and not found.over:
                    time.sleep(_LOOK)
                    found.look()
                    hear()
                    if not found.over:
                        self._check()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    playing.wait(_STOP)
        finally:
            found.look()
            hear()
        if found.error:
            raise FedtapError(found.error)
        if not found.ended:
            raise FedtapError(
                f"`flwr run` ended before the app did (exit code {playing.returncode}), and app.log has what Flower "
                "said: see that `flwr run` plays the app here, or leave out --engine."
            )

    def _started(self, stack: contextlib.ExitStack) -> list[str]:
        """Start the federation; the command that submits the app to it.

        Raises:
            FedtapError: a program does not start.
        """
        run = ["flwr", "run", str(self.copied()), "--stream"]
        run += ["--run-config", " ".join(map(quoted_override, self.overrides))] if self.overrides else []
        port, nodes = free_port(), self.wrapping.nodes
        write_connection(self.home, port)
        simulated = self.engine == "simulation"
        superlink = [*superlink_command(port), *["--simulation"] * simulated]
        self._programs.append(stack.enter_context(self._program(*superlink)))
        self._wait_for(port)
        if simulated:
            return [*run, "--federation-config", f"num-supernodes={nodes} client-resources-num-cpus=1"]
        for partition in range(nodes):
            supernode = supernode_command(port, partition, nodes)
            self._programs.append(stack.enter_context(self._program(*supernode)))
        return run

    def copied(self) -> Path:
        """A folder with the app as far as Flower takes it along, naming other components.

        Raises:
            FedtapError: Flower would not take it.
        """
        copied = self.home / "app"
        try:
            files = filter_paths_for_publish(collect_files(self.path.resolve()))
        except ValueError as error:  # a path too deep
            raise FedtapError(
                f"Flower cannot bundle the app ({short(error, 200)}): change that, or leave out --engine."
            ) from error
        for name, file in files.items():
            write_atomically(copied / name, file if isinstance(file, bytes) else file.read_bytes())
        about = tomllib.loads((self.path / "pyproject.toml").read_text())
        app = about["tool"]["flwr"]["app"]
        app["components"] |= {"serverapp": f"{_MODULE}:server", "clientapp": f"{_MODULE}:client"}
        if "fab-include" in app:
            app["fab-include"].append(f"/{_MODULE}.py")
        write_atomically(copied / "pyproject.toml", tomli_w.dumps(about).encode())
        write_atomically(copied / f"{_MODULE}.py", _SOURCE.format(wrapping=self.wrapping.text()).encode())
        return copied

    @contextlib.contextmanager
    def _program(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A program in the background, of this process's group and with its output; ended on the way out.

        Raises:
            FedtapError: there is no such program.
        """
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "FLWR_HOME": str(self.home), "PATH": path}
        try:
            process = subprocess.Popen(command, cwd=self.path, env=environment, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise FedtapError(
                f"{command[0]} cannot be started ({short(error, 100)}): pip install 'flwr[simulation]', or leave out "
                "--engine."
            ) from error
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_for(self, port: int) -> None:
        """Until the SuperLink listens.

        Raises:
            FedtapError: it does not.
        """
        until = time.monotonic() + _START
        while time.monotonic() < until:
            if listens(port):
                return
            self._check()
            time.sleep(0.1)
        raise FedtapError(f"Flower's SuperLink did not start in {_START:g} s: app.log has what it said.")

    def _check(self) -> None:
        """Whether there is time, and all programs are there.

        Raises:
            FedtapError: not so.
        """
        if time.monotonic() > self.until:
            raise FedtapError(
                "The app was not done in time and was stopped; what was found by then is kept: raise --minutes, or "
                "give it less to do by --rounds or --set."
            )
        for program in self._programs:
            if program.poll() is not None:
                name = Path(str(program.args[0])).name  # type: ignore[index]
                raise FedtapError(
                    f"{name} ended with exit code {program.returncode} before the app did, and app.log has what it "
                    "said: see that `flwr run` plays the app here, or leave out --engine."
                )


@dataclass
class FoundOnEngine:
    """What the app's processes have left until now."""

    folder: Path
    """Where they leave it."""
    exchanges: list[dict[str, Any]] = field(default_factory=list)
    """As clients' processes wrote them, each with its round (0 where the server's has not told of it), in order."""
    ranges: Ranges = field(default_factory=dict)
    """Of all inputs that were seen."""
    _server: Mapping[str, Any] = field(default_factory=dict)
    _read: set[Path] = field(default_factory=set)

    @property
    def over(self) -> bool:
        """Whether the app's server has ended."""
        return self.ended or self.error is not None

    @property
    def ended(self) -> bool:
        """Whether the app came to its end."""
        return bool(self._server.get("ended"))

    @property
    def error(self) -> str | None:
        """Why it did not."""
        return self._server.get("error")

    @property
    def late(self) -> bool:
        """Whether it was ended for want of time."""
        return bool(self._server.get("late"))

    @property
    def messages(self) -> Counter[str]:
        """Kind of message -> replies."""
        return Counter(self._server.get("messages", {}))

    @property
    def failures(self) -> Counter[str]:
        """Sentence of an error that clients replied with -> how often."""
        return Counter(self._server.get("failures", {}))

    @property
    def asked(self) -> list[str]:
        """What the app asked for and got local data for."""
        every = [*self._server.get("asked", []), *(told for one in self.exchanges for told in one["asked"])]
        return list(dict.fromkeys(every))

    def look(self) -> None:
        """Read what is new."""
        with contextlib.suppress(FileNotFoundError):
            self._server = json.loads((self.folder / SERVER_FILE).read_bytes())
        for file in set(self.folder.glob("exchange_*.json")) - self._read:
            told = json.loads(file.read_bytes())
            self._read.add(file)
            self.exchanges.append(told)
            for shape, low, high in told["ranges"]:
                self._widen(tuple(shape), torch.tensor(low), torch.tensor(high))
        for told in self.exchanges:
            told["exchange"]["round"] = self._server.get("round", {}).get(told["message"], 0)
        self.exchanges.sort(key=lambda told: (told["exchange"]["round"], told["exchange"]["client"]))

    def _widen(self, shape: tuple[int, ...], low: Tensor, high: Tensor) -> None:
        known = self.ranges.setdefault(shape, InputRange(low, high, torch.zeros(()), 0))
        known.low, known.high = torch.minimum(known.low, low), torch.maximum(known.high, high)
