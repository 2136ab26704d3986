"""What a run of games leaves: rows, the terminal's table, and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from rich.table import Table

from fedtap.scenarios.gradients.game import LEVEL, Game, played
from fedtap.simulator.files import write_atomically
from fedtap.simulator.progress import progress
from fedtap.simulator.report import page as report
from fedtap.simulator.report.folder import Folder, Row
from fedtap.simulator.report.privacy_report import games_chart
from fedtap.simulator.run import UNCOVERED, described_run

LEGEND = (
    f"in brackets: one-sided Clopper-Pearson limits, {LEVEL:g} over all rows; bound: 2302.07225; Rényi: 2201.04845; "
    "best: what the optimal attacker expects of these canaries"
)

THREAT = (
    "The attacker knows the model, the weights, the clip, the noise's size and all K canaries, each as likely as the "
    "others, and says which one the client holds: κ = 1/K. ε is that of one release, for a client (here with one "
    "example), under add/remove: a client that is not there sends noise alone. Its sensitivity is the clip. "
    f"ε speaks of the update alone. Beside it travels in the clear: {UNCOVERED}."
)


def play_games(games: Sequence[Game], out: Path, overwrite: bool = False) -> list[Row]:
    """Play each game; `out` holds run.json, rows.jsonl and report.html.

    Args:
        overwrite: replace a run with other settings that `out` holds.

    Raises:
        FedtapError: `out` holds something else, or cannot be written.
    """
    folder = Folder(out, described_run(games, torch.device("cpu")), overwrite=overwrite)
    for game in progress(games, "game"):
        folder.add([played(game, len(games))])
    write_atomically(out / "report.html", _page(games, folder).encode())
    folder.finish()
    return folder.rows


def table_of(rows: Sequence[Row]) -> Table:
    """The rows, for a terminal of 80 columns."""
    shown = Table(caption=LEGEND, box=None, padding=(0, 1, 0, 0))
    for name in ("canaries", "ε", "σ", "games", "success", "", "bound", "Rényi", "best"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*_cells(row), style="red" if row["success_low"] > row["bound"] else None)
    return shown


def _cells(row: Row) -> list[str]:
    chances = [f"{row[name]:.3f}" for name in ("bound", "bound_renyi", "expected")]
    limits = f"[{row['success_low']:.3f}–{row['success_high']:.3f}]".replace("[", "\\[")
    numbers = [f"{row['canaries']}", f"{row['epsilon']:g}", f"{row['sigma']:.3f}", f"{row['games']}"]
    return [*numbers, f"{row['success']:.3f}", limits, *chances]


def _page(games: Sequence[Game], folder: Folder) -> str:
    names = ("canaries", "ε", "σ", "games", "success", "limits", "bound", "Rényi bound", "best expects", "δ", "done")
    head = "".join(f"<th class='number'>{name}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(f"<td class='number'>{escape(cell.replace(chr(92), ''))}</td>" for cell in _cells(row))
        + f"<td class='number'>{row['delta']:g}</td><td>{escape(row['defence'])}</td></tr>"
        for row in folder.rows
    )
    about = report.About(
        scenario=games[0].name,
        question=games[0].question,
        threat=THREAT,
        settings={
            name: " or ".join(dict.fromkeys(str(getattr(game, name)) for game in games))
            for name in (field.name for field in dataclasses.fields(Game))
            if name in ("clip", "delta", "exchanges", "sabotage", "victims", "seed")
        },
        environment=folder.about["versions"] | {"device": folder.about["device"], "started": folder.about["started"]},
    )
    return report.page(
        about,
        [
            f"<h2>Success against ε</h2>{games_chart(folder.rows)}",
            f"<h2>Every ε</h2><div class='scroll'><table><thead><tr>{head}</tr></thead>",
            f"<tbody>{body}</tbody></table></div>",
            f"<p class='pale'>{escape(LEGEND)}.</p>",
            f"<h2>What the attacker knows, and what ε is about</h2><p>{escape(about.threat)}</p>",
        ],
    )
