"""`fedtap results add RUN` and `build`: many people's runs in one table, each cell with its command and its hash.

An entry is a run's folder with nothing but `run.json` and `rows.jsonl`, named after its scenario and the hash of its
rows. Nothing in it is executed: what it says of models and attacks is text.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.report.columns import Column
from fedtap.simulator.report.saved_run import SavedRun, read_run, runs_below

results_cli = typer.Typer(no_args_is_help=True, help="Runs of many people in one table, with command and hash of each.")

RESULTS = Path("results")
"""Where entries are, unless said."""

_LEFT_OUT = (
    *("dots", "mse", "genie_mse", "ssim", "lpips", "bound", "bound_renyi", "expected", "objective", "unexplained"),
    *("seconds", "epsilon_all", "protects", "labels", "adaptive_note", "doubts", "error"),
)
"""Columns that the page of the run itself has: with those of many runs no screen would show them all."""


@results_cli.command("add")
def results_add_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run on images.")],
    to: Annotated[Path, typer.Option(help="The folder of the entries.")] = RESULTS,
) -> None:
    """Check a run and keep its rows among the results; nothing else of it is copied."""
    from fedtap.simulator.files import write_atomically

    checked = entry(run)
    kept = to / f"{checked.name}-{hash_of(checked)}"
    if kept.exists():
        typer.echo(f"It is there already: {kept}")
        return
    about = {name: value for name, value in checked.about.items() if name != "done"}
    rows = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in checked.rows)
    write_atomically(kept / "rows.jsonl", rows)
    write_atomically(kept / "run.json", json.dumps(about, indent=2, allow_nan=False).encode() + b"\n")
    typer.echo(f"Kept: {kept}   {replayed_by(checked)}")


@results_cli.command("build")
def results_build_command(
    folders: Annotated[list[Path] | None, typer.Argument(help="Entries, or folders that hold some.")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("results.html"),
) -> None:
    """One page of all entries: attacks, defences, models and data sets, each line with its run."""
    from fedtap.simulator.files import write_atomically
    from fedtap.simulator.report.images import page_of
    from fedtap.simulator.report.page import Page, html

    entries: dict[str, SavedRun] = {}
    for folder in folders or [RESULTS]:
        for found in runs_below(folder):
            if isinstance(found, FedtapError):
                raise found
            entries.setdefault(hash_of(entry(found.path)), found)
    if not entries:
        where = ", ".join(short(folder) for folder in folders or [RESULTS])
        raise FedtapError(f"There is no run in {where}: keep some there, fedtap results add RUN.")
    rows = [{"run": f"{run.name} {name}"} | row for name, run in entries.items() for row in run.rows]
    page, shown = page_of(
        Page(
            title="Results",
            question="What do attacks bring back, under which defence, of which model?\n\nEach line is of one run: the "
            "hash is that of its rows, and among the settings below stands the command that gives them.",
            threat="The column says who observes, where runs differ in it.",
            settings={f"{run.name} {name}": replayed_by(run) for name, run in entries.items()},
            environment={
                name: f"fedtap {run.about['versions']['fedtap']}, {run.about.get('device')}"
                for name, run in entries.items()
            },
        ),
        rows,
    )
    columns = [replace(one, over="hidden") if one.name in _LEFT_OUT else one for one in page.columns]
    whole = replace(page, charts={}, columns=[Column("run", over="same"), *columns], answers=())
    write_atomically(out, html(whole, shown).encode())
    typer.echo(f"Page: {out}   {len(entries)} runs, {len(rows)} rows")


def entry(path: Path) -> SavedRun:
    """The run of this folder, if it can be among the results.

    Raises:
        FedtapError: it is not finished or damaged, has nothing of images, or a row is no result's.
    """
    run = read_run(path)
    attacked = [row for row in run.rows if row.get("attack")]
    if not any(row.get("levels") for row in attacked):
        raise FedtapError(
            f"The run in {short(path)} has no attack on images that was scored, which is what the results are of: add "
            "a run of an image scenario."
        )
    for number, row in enumerate(attacked, 1):
        for name in ("attack", "defence", "dataset", "model", "threat_model"):
            if type(row.get(name)) is not str:
                raise FedtapError(
                    f"Row {number} of {short(path)} has no {name} in words, without which nobody knows what its "
                    "figures are of: play it with this version of fedtap."
                )
        for name, low, high in (("psnr", -100.0, 200.0), ("recognisable", 0.0, 1.0), ("mse", 0.0, 1e6)):
            value = row.get(name)
            if value is not None and (type(value) not in (int, float) or not low <= value <= high):
                raise FedtapError(f"Row {number} of {short(path)} has {short(value)} as its {name}: that is no score.")
    return run


def hash_of(run: SavedRun) -> str:
    """A name for the rows of a run, whatever their times are."""
    timeless = [{name: value for name, value in row.items() if "seconds" not in name} for row in run.rows]
    content = json.dumps(timeless, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=5).hexdigest()


def replayed_by(run: SavedRun) -> str:
    """The command line that gives these rows, as run.json has it; runs of earlier versions have none."""
    said = run.about.get("command")
    return said if isinstance(said, str) else f"fedtap run {run.name}, with the settings in its run.json"
