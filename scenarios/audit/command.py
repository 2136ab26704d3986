"""`fedtap audit PATH`: starts the process that audits an app, ends it when time is over, and says what it found.

Nothing here imports torch or the app.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtap.scenarios.audit.process import ending, free_folder, run_in_process
from fedtap.simulator.errors import FedtapError, short

_FAIL_ON = {"recognisable": ("recognisable", "identical", "raw data"), "identical": ("identical", "raw data")}
"""What `--fail-on` takes, and the levels of risk that it is met by."""

MET = 3
"""Exit code where `--fail-on` is met."""

_ENGINES = ("simulation", "deployment")
"""What `--engine` takes: Flower's own engines."""


def audit_command(
    path: Annotated[Path, typer.Argument(help="Folder of a Flower app, with its pyproject.toml.")],
    nodes: Annotated[int, typer.Option(min=1, help="Clients to play.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to play, at most; the app may end before.")] = 2,
    changed: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the app's run config; may be given again.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of images, .npz or .csv in place of what the app would fetch."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for all of it.")] = 10.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for audit.json, report.html, junit.xml; runs/audit, or -2, -3, …, unless said."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an audit in that folder.")] = False,
    fail_on: Annotated[str, typer.Option(help="Exit with 3 where inputs come back: recognisable or identical.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attacks' starting points.")] = 0,
    engine: Annotated[
        str, typer.Option(help="simulation or deployment: judge on Flower's own engine, and attack nothing.")
    ] = "",
) -> None:
    """Play a Flower app as it is, see what its clients do, and attack what they send.

    The app's code is run, in its own folder. Exit code 0: done; 3: --fail-on is met; 2: it could not be audited, and
    what was found is kept."""
    if fail_on not in ("", *_FAIL_ON):
        raise FedtapError(f"--fail-on {short(fail_on)} is none of {', '.join(_FAIL_ON)}: give one of them.")
    if engine not in ("", *_ENGINES):
        raise FedtapError(
            f"--engine {short(engine)} is none of {', '.join(_ENGINES)}: give one of them, or leave it out to play the "
            "app in one process."
        )
    if engine and fail_on:
        raise FedtapError(
            "--fail-on asks what attacks rebuild, and none is run on an engine of Flower's: leave out --engine or "
            "--fail-on."
        )
    where = _folder(out, overwrite)
    document = _audited(path, where, nodes, rounds, changed or (), data, minutes, seed, engine)
    console = Console(emoji=False)
    console.print(document["risk"]["sentence"], markup=False, highlight=False)
    said = f"Page: {where / 'report.html'}   figures: {where / 'audit.json'}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    if document["error"]:
        raise FedtapError(document["error"])
    if fail_on and document["risk"]["level"] in _FAIL_ON[fail_on]:
        raise typer.Exit(MET)


def assert_no_leak(
    app: str | Path,
    out: str | Path,
    *,
    fail_on: str = "recognisable",
    nodes: int = 2,
    rounds: int = 2,
    changed: Sequence[str] = (),
    data: str | Path | None = None,
    minutes: float = 5.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Audit an app in a test of its own: `assert_no_leak("my_app", tmp_path / "audit")`.

    Args:
        app: folder of the app.
        out: folder for audit.json, report.html and junit.xml; empty, or not there.
        fail_on: `recognisable` or `identical`; raw data fail either.
        changed: `key=value` of the app's run config.
        data: what stands in for the data that the app would fetch.

    Returns:
        What audit.json holds.

    Raises:
        AssertionError: inputs come back, or raw data are sent.
        FedtapError: the app cannot be audited.
    """
    where = _folder(Path(out), overwrite=False)
    document = _audited(Path(app), where, nodes, rounds, changed, Path(data) if data else None, minutes, seed)
    if document["error"]:
        raise FedtapError(document["error"])
    if document["risk"]["level"] in _FAIL_ON[fail_on]:
        raise AssertionError(f"{document['risk']['sentence']} See {where / 'report.html'}.")
    return document


def _audited(
    path: Path,
    where: Path,
    nodes: int,
    rounds: int,
    changed: Sequence[str],
    data: Path | None,
    minutes: float,
    seed: int,
    engine: str = "",
) -> dict[str, Any]:
    """What audit.json holds once the process is over, which says why if it did not finish."""
    settings = {"path": str(path.resolve()), "out": str(where), "nodes": nodes, "rounds": rounds, "seed": seed}
    settings |= {"overrides": list(changed), "minutes": minutes, "started": time.time(), "engine": engine}
    settings |= {"data": str(data.resolve())} if data else {}
    with tempfile.TemporaryDirectory(prefix="fedtap-", ignore_cleanup_errors=True) as home:
        code = _played({**settings, "home": home}, where, minutes)
    document = _document(where, settings)
    if not document["error"] and (code != 0 or not document["finished"]):
        document["error"] = _ended(code, minutes)
        _rewrite(where, document)
    return document


def _folder(out: Path | None, overwrite: bool) -> Path:
    """Where the audit goes: the folder that is named, or the next free one.

    Raises:
        FedtapError: the folder holds something else, or another audit.
    """
    where = free_folder(out, "audit")
    if where.exists() and (not where.is_dir() or any(where.iterdir())):
        ours = (where / "audit.json").is_file()
        if not (ours and overwrite):
            remedy = "give --overwrite to replace it, or another --out" if ours else "give another --out"
            raise FedtapError(f"{short(where)} holds {'an audit' if ours else 'something else'} already: {remedy}.")
    for name in ("audit.json", "report.html", "junit.xml"):
        (where / name).unlink(missing_ok=True)
    shutil.rmtree(where / "exchanges", ignore_errors=True)
    return where


def _played(settings: Mapping[str, Any], where: Path, minutes: float) -> int | None:
    """Run the process; its exit code, None where it was ended since time was over.

    Raises:
        FedtapError: the path is no folder.
        Stopped: somebody pressed Ctrl-C; what was found by then is kept.
    """
    folder = Path(settings["path"])
    if not folder.is_dir():
        raise FedtapError(f"{short(folder)} is no folder: name the folder of a Flower app, with its pyproject.toml.")
    return run_in_process("fedtap.scenarios.audit", settings, folder, where / "app.log", 60 * minutes, settings["home"])


def _ended(code: int | None, minutes: float) -> str:
    """Why the process did not finish."""
    if code is None:
        return (
            f"The app was not done after {minutes:g} minutes and was stopped; what was found by then is kept: raise "
            "--minutes, or give it less to do by --rounds or --set."
        )
    return (
        f"The app ended the process that it was played in ({ending(code)}), and app.log has what it said: see that "
        "`flwr run` plays the app here."
    )


def _document(where: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """audit.json; one in which nothing was found yet, where the process wrote none."""
    try:
        document: dict[str, Any] = json.loads((where / "audit.json").read_bytes())
    except FileNotFoundError:
        from fedtap.scenarios.audit.audit import Audit, AuditSettings

        document = Audit(AuditSettings.of(json.dumps(settings))).document()
    return document


def _rewrite(where: Path, document: Mapping[str, Any]) -> None:
    """The files of a process that could not write its last ones."""
    from fedtap.scenarios.audit.audit import write_audit

    write_audit(where, document)
