"""What a run of games leaves: rows and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fedtap.scenarios.gradients.game import Game, played
from fedtap.simulator.progress import progress
from fedtap.simulator.report.folder import Folder, Row
from fedtap.simulator.report.images import page_of
from fedtap.simulator.report.page import Page, write
from fedtap.simulator.run import described_run

THREAT = (
    "The attacker knows the model, the weights, the clip, the noise's size and all K canaries, each as likely as the "
    "others, and says which one the client holds: κ = 1/K. ε is that of one release, for a client (here with one "
    "example), under add/remove: a client that is not there sends noise alone. Its sensitivity is the clip."
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
    page = Page(
        title=games[0].name,
        question=games[0].question,
        threat=THREAT,
        settings={
            name: " or ".join(dict.fromkeys(str(getattr(game, name)) for game in games))
            for name in ("clip", "delta", "exchanges", "sabotage", "victims", "seed")
        },
        environment=folder.about["versions"] | {"device": folder.about["device"], "started": folder.about["started"]},
    )
    write(out, *page_of(page, folder.rows))
    folder.finish()
    return folder.rows
