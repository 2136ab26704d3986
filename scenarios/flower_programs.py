"""Flower's programs on this machine's loopback: the words that start each, and where `flwr` finds the SuperLink."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtap.scenarios.certificates import Certificates

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the app runs in this environment, which has what it needs
}
"""So that Flower and Ray send nothing, ask nothing and install nothing."""


def superlink_command(port: int, certificates: Certificates | None = None) -> list[str]:
    """How a SuperLink is started.

    Args:
        certificates: where it speaks TLS and knows its SuperNodes by their keys; None without both.
    """
    command = ["flower-superlink", "--disable-runtime-dependency-installation", "--port", str(port)]
    if certificates is None:
        return [*command, "--insecure"]
    command += ["--ssl-certfile", str(certificates.server), "--ssl-keyfile", str(certificates.server_key)]
    return [*command, "--ssl-ca-certfile", str(certificates.authority), "--enable-supernode-auth"]


def supernode_command(port: int, partition: int, nodes: int, certificates: Certificates | None = None) -> list[str]:
    """How the SuperNode of a partition is started.

    Args:
        port: the SuperLink's.
    """
    command = ["flower-supernode", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
    command += ["--node-config", f"partition-id={partition} num-partitions={nodes}"]
    if certificates is None:
        return [*command, "--insecure"]
    command += ["--root-certificates", str(certificates.authority)]
    return [*command, "--auth-supernode-private-key", str(certificates.supernode(partition))]


def write_connection(home: Path, port: int, certificates: Certificates | None = None) -> None:
    """Tell `flwr` where the SuperLink is.

    Args:
        home: `FLWR_HOME`.
        port: the SuperLink's.
    """
    trust = "insecure = true"
    if certificates is not None:
        trust = f"root-certificates = {json.dumps(str(certificates.authority))}"
    address = f'address = "127.0.0.1:{port}"'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "fedtap"\n\n[superlink.fedtap]\n{address}\n{trust}\n')


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether a program listens on this port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
