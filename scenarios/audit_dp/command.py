"""`fedtap audit-dp TARGET`: starts the process that holds a mechanism against its promise, and says what it found.

Nothing here imports torch or the target.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtap.scenarios.audit.process import ending, free_folder, run_in_process
from fedtap.simulator.errors import FedtapError

_REFUTED = 3
"""Exit code where a promise was refuted."""


def audit_dp_command(
    target: Annotated[
        str,
        typer.Argument(
            help="Folder of a Flower app, or MODULE:FUNCTION from an update (a dict of tensors) to what is sent; a "
            "client mod or a strategy that adds noise may be named too."
        ),
    ],
    epsilon: Annotated[float | None, typer.Option(help="Promised ε, of all rounds together.")] = None,
    delta: Annotated[float | None, typer.Option(help="Promised δ; 0 is pure differential privacy.")] = None,
    clip: Annotated[float | None, typer.Option(help="L2 norm to which updates are clipped.")] = None,
    sensitivity: Annotated[
        float | None, typer.Option(help="Distance of neighbours that the noise is scaled to, if it is not the clip's.")
    ] = None,
    unit: Annotated[str | None, typer.Option(help="Whom the promise is about: client or example.")] = None,
    adjacency: Annotated[
        str | None, typer.Option(help="What neighbours differ in: add_remove or replacement of one unit.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Releases about the same unit, which the promise covers.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Probability with which a unit is in a round, where that is Poisson sampling.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Probability with which an honest mechanism is refuted, at most.")
    ] = 1e-3,
    seconds: Annotated[float, typer.Option(help="Time for all of it.")] = 60.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for audit_dp.json and audit_dp.html; runs/audit-dp, or -2, -3, …, unless said."),
    ] = None,
) -> None:
    """Hold the noise of a mechanism against the differential privacy that it promises.

    Its code is run, many times, with updates of the auditor's. Exit code 0: not refuted; 3: refuted; 2: it
    could not be audited."""
    said: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "clip": clip, "sensitivity": sensitivity}
    said |= {"unit": unit, "adjacency": adjacency, "rounds": rounds, "rate": rate}
    if not 0 < alpha < 1:
        raise FedtapError(f"--alpha {alpha:g} is no probability: give one such as 1e-3.")
    if not 0 < seconds < math.inf:
        raise FedtapError(f"--seconds {seconds:g} is no time to audit in: give a number above 0.")
    where = free_folder(out, "audit-dp")
    document = _promise_audited(target, said, where, alpha, seconds)
    console = Console(emoji=False)
    for fault in document["refuted"]:
        at = f"{fault['observations']} observations, e-value {fault['e_value']:.3g}"
        console.print(f"{fault['fault']}: {fault['sentence']} ({at})", markup=False, highlight=False, soft_wrap=True)
    if document["error"]:
        raise FedtapError(document["error"])
    if not document["refuted"]:
        console.print(
            f"Not refuted by {document['observations']:,} observations: ε ≥ {document['epsilon_lower_bound']:.3g} is "
            f"shown, and {document['promised']['epsilon']:.4g} is promised.",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if document["composition"]:
        console.print(document["composition"]["sentence"], markup=False, highlight=False, soft_wrap=True)
    said_where = f"Page: {where / 'audit_dp.html'}   figures: {where / 'audit_dp.json'}"
    console.print(said_where, markup=False, highlight=False, soft_wrap=True)
    if document["refuted"]:
        raise typer.Exit(_REFUTED)


def _promise_audited(target: str, said: Mapping[str, Any], where: Path, alpha: float, seconds: float) -> dict[str, Any]:
    """What audit_dp.json holds once the process is over, which says why if it did not finish."""
    folder = Path(target)
    settings: dict[str, Any] = {
        "target": str(folder.resolve()) if folder.is_dir() else target,
        "out": str(where),
        "said": dict(said),
    }
    settings |= {"alpha": alpha, "seconds": seconds, "started": time.time()}
    for name in ("audit_dp.json", "audit_dp.html"):
        (where / name).unlink(missing_ok=True)
    here = folder if folder.is_dir() else Path.cwd()
    code = run_in_process("fedtap.scenarios.audit_dp", settings, here, where / "audit_dp.log", seconds)
    try:
        document: dict[str, Any] = json.loads((where / "audit_dp.json").read_bytes())
    except FileNotFoundError:
        document = _unwritten(settings)
    if not document["error"] and (code != 0 or not document["finished"]):
        document["error"] = _cut_off(code, seconds)
        _rewrite_document(where, document)
    return document


def _cut_off(code: int | None, seconds: float) -> str:
    """Why the process did not finish."""
    if code is None:
        return (
            f"The mechanism was not done after {seconds:g} seconds and was stopped, before it was called often enough "
            "to say anything: raise --seconds, or give it less to do."
        )
    return (
        f"The mechanism ended the process that it was called in ({ending(code)}), and audit_dp.log has what it said: "
        "see that it can be imported and called here."
    )


def _unwritten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a process that wrote none."""
    from fedtap.scenarios.audit_dp.audit import PromiseAudit, PromiseAuditSettings

    return PromiseAudit(PromiseAuditSettings.of(json.dumps(settings))).document()


def _rewrite_document(where: Path, document: Mapping[str, Any]) -> None:
    from fedtap.scenarios.audit_dp.audit import write_promise_audit

    write_promise_audit(where, document)
