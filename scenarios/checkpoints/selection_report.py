"""What the page says of documents that were chosen: which of the two happened, the domain found or the documents."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedtap.simulator.report.charts import Panel, Series, chart
from fedtap.simulator.report.columns import Group, grouped, setting
from fedtap.simulator.scenario import Row

if TYPE_CHECKING:
    from fedtap.scenarios.checkpoints.selection import Selecting

FOUND, TOLD = 2.0, 0.6
"""Precision from which on a domain counts as found, in multiples of chance; and AUC from which on documents count as
told from others of their domain."""


def answers(rows: Group) -> list[str]:
    """Of the attack with the highest precision, and of the one with the highest AUC, what they found."""
    said = []
    if known := [row for row in rows if row.get("precision") is not None]:
        best = max(known, key=lambda row: row["precision"])
        mine = [row for row in known if row["attack"] == best["attack"]]
        precision, chance = (statistics.median(row[name] for row in mine) for name in ("precision", "chance"))
        found = precision >= min(FOUND * chance, (1 + chance) / 2)
        said.append(
            f"The domain {'was' if found else 'was not'} found: of the documents that {best['attack']} chose, "
            f"{precision:.0%} are of the client's domain, against {chance:.0%} by chance."
        )
        if shares := [row["recovered_fraction"] for row in mine if row.get("recovered_fraction") is not None]:
            said[-1] += (
                f" Retraining on them goes {statistics.median(shares):.0%} of the way from random to private documents."
            )
    if asked := [row for row in rows if row.get("membership_auc") is not None]:
        best = max(asked, key=lambda row: row["membership_auc"])
        mine = [row for row in asked if row["attack"] == best["attack"]]
        auc, true = (statistics.median(row[name] for row in mine) for name in ("membership_auc", "tpr_at_1"))
        said.append(
            f"The documents themselves {'were in part' if auc >= TOLD else 'were not'} told from others of their "
            f"domain: {best['attack']} has an AUC of {auc:.2f}, where 0.5 is chance, and finds {true:.0%} of them "
            f"where "
            "it is wrong about 1 % of the others."
        )
    return said


def charts(scenario: Selecting, rows: Sequence[Row]) -> Mapping[str, str]:
    """Precision and membership of each attack; against what is swept, where a number is."""
    swept = [name for name, _ in scenario.swept if name not in ("attack", "seed")]
    if not swept:
        return {}
    (name, *_) = swept
    panels = []
    for column, words, level in (
        ("precision", "share of chosen documents that are of the domain", "chance"),
        ("membership_auc", "AUC of membership", ""),
        ("recovered_fraction", "recovered fraction", ""),
    ):
        series = []
        ticks = list(dict.fromkeys(str(row[name]) for row in rows))
        for some in grouped(rows, [setting("attack")]):
            points = [(ticks.index(str(row[name])), row[column]) for row in some if row.get(column) is not None]
            means = {at: statistics.fmean(value for other, value in points if other == at) for at, _ in points}
            series.append(Series(some[0]["attack"], [*means], [*means.values()]))
        levels = {level: rows[0][level]} if level and rows[0].get(level) is not None else {}
        panels.append(Panel(name, words, series, levels=levels, ticknames=ticks))
    return {f"Against {name.replace('_', ' ')}": chart(panels, f"precision and membership against {name}")}
