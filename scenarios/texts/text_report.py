"""What the page shows of texts that were read off gradients: a table of them, and where an attack stops."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape

from jaxtyping import Int
from torch import Tensor

from fedtap.simulator import scores
from fedtap.simulator.data.texts import WordPieces
from fedtap.simulator.defences.noise import Noise
from fedtap.simulator.defences.notation import described
from fedtap.simulator.report.charts import Panel, Series, chart, unzipped
from fedtap.simulator.report.columns import Column, Html, listing
from fedtap.simulator.scenario import Row

_SHOWN = 4
"""Victims, and texts of each, that the page shows."""


def text_charts(rows: Sequence[Row]) -> dict[str, str]:
    """Exact tokens where the batch fills more and more of the model's width, and under more and more noise."""
    read = [row for row in rows if row.get("exact_tokens") is not None]
    filled = _series("filled", [row for row in read if row["defence"] == "none"])
    alike = [row | {"sigma": _sigma(row["defence"])} for row in read]
    noisy = _series("sigma", [row for row in alike if row["sigma"] is not None])
    made = {}
    if filled:
        made["Where it stops"] = _share("tokens in the batch for each dimension of the model", filled, limit=1.0)
    if noisy:
        made["Under noise"] = _share("standard deviation of the noise on an entry", noisy)
    return made


def _share(across: str, points: Mapping[str, Sequence[tuple[float, float]]], limit: float | None = None) -> str:
    """The share of tokens that are right against a setting: each victim a dot, and their mean as a line.

    Args:
        limit: a value of the setting that is marked.
    """
    series = []
    for label, some in points.items():
        means = {at: statistics.fmean(share for value, share in some if value == at) for at, _ in sorted(some)}
        series.append(Series(label, [*means], [*means.values()], "smooth"))
        series.append(Series("", *unzipped(some), "pale", like=label))
    ticks = [value for some in points.values() for value, _ in some]
    panel = Panel(across, "share of tokens that are right", series, share=True, ticks=ticks, mark=limit)
    return chart([panel], f"share of right tokens against {across}")


def _series(option: str, rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Model -> (value, exact tokens) of each row; empty where there is but one value."""
    if len({row[option] for row in rows}) < 2:
        return {}
    return {
        model: [(row[option], row["exact_tokens"]) for row in rows if row["model"] == model]
        for model in dict.fromkeys(row["model"] for row in rows)
    }


def _sigma(defence: str) -> float | None:
    """Of Gaussian noise and nothing else; 0 where there is no defence."""
    parts = described(defence)
    if not parts:
        return 0.0
    return parts[0].sigma if len(parts) == 1 and isinstance(parts[0], Noise) else None


def text_table(
    vocabulary: WordPieces,
    clients: Sequence[int],
    truths: Sequence[Tensor],
    found: Int[Tensor, "victims batch tokens"],
) -> str:
    """Some victims' texts beside what was read; wrong tokens are marked."""
    rows = []
    for client, truth, ids in zip(clients, truths[:_SHOWN], found, strict=False):
        matched = ids[scores.match_texts(ids, truth)]
        for text, read in list(zip(truth.tolist(), matched.tolist(), strict=True))[:_SHOWN]:
            pieces = [
                (escape(vocabulary.pieces[token]), token == right) for token, right in zip(read, text, strict=True)
            ]
            marked = " ".join(piece if right else f"<mark>{piece}</mark>" for piece, right in pieces)
            rows.append([{"client": client, "text": vocabulary.decode(text), "read": Html(marked)}])
    heading = "read off its gradient, by tokens"
    return listing(rows, [Column("client"), Column("text"), Column("read", heading=heading)])
