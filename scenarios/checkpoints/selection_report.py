"""What the page says of documents that were chosen: which of the two happened, the domain found or the documents."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fedtap.simulator.report.charts import GREY, Panel, Series, chart
from fedtap.simulator.report.columns import AnyRow, Column, Group, grouped, label, listing, setting
from fedtap.simulator.scenario import Row

FOUND, TOLD_APART = 2.0, 0.6
"""Precision from which on a domain counts as found, in multiples of chance; and AUC from which on documents count as
told from others of their domain."""

EXAMPLES = {
    "chosen": "chosen by {}",
    "private": "private documents of the client",
    "random": "random documents of the corpus",
}
"""Lists of documents that a row quotes -> what they are."""


def sentences(rows: Group, swept: Sequence[str]) -> list[str]:
    """Whether the domain was found and whether documents were told apart, for each value of what is swept."""
    said = []
    for some in grouped(rows, map(setting, swept)):
        where = label(some, map(setting, swept))
        said += [f"{where}: {each}" if where else each for each in (domain(some), membership(some)) if each]
    return said


def domain(rows: Group) -> str:
    """Of the attack with the highest precision, what it found; nothing where none was scored."""
    known = [row for row in rows if row.get("precision") is not None]
    if not known:
        return ""
    mine = _of_best(known, "precision", "recovered_fraction")
    precision, chance = (_median(mine, name) for name in ("precision", "chance"))
    if chance == 1:
        return "Every document of the corpus is of a client's domain, so that there is no domain to find."
    found = chance < precision >= min(FOUND * chance, (1 + chance) / 2)
    said = (
        f"The domain {'was' if found else 'was not'} found: of the documents that {mine[0]['attack']} chose, "
        f"{precision:.0%} are of the client's domain, against {chance:.0%} by chance."
    )
    if any(row.get("recovered_fraction") is not None for row in mine):
        share = _median(mine, "recovered_fraction")
        said += f" Retraining on them goes {share:.0%} of the way from random to private documents."
    return said


def membership(rows: Group) -> str:
    """Of the attack with the highest AUC, whether it told documents apart; nothing where none was asked."""
    asked = [row for row in rows if row.get("membership_auc") is not None]
    if not asked:
        return ""
    mine = _of_best(asked, "membership_auc")
    auc, apart = _median(mine, "membership_auc"), "were not"
    if auc >= TOLD_APART:
        apart = "were in part"
    said = (
        f"The documents themselves {apart} told from others of their domain: {mine[0]['attack']} has an AUC of "
        f"{auc:.2f}, where 0.5 is chance"
    )
    if any(row.get("tpr_at_1") is not None for row in mine):
        said += f", and finds {_median(mine, 'tpr_at_1'):.0%} of them where it is wrong about 1 % of the others"
    return f"{said}."


def examples(rows: Group) -> str:
    """The first documents that each attack chose of the first victim in the first setting, private and random ones."""
    first = rows[0]
    quoted: dict[str, list[str]] = {}
    for row in rows:
        if row["client"] == first["client"] and row.get("chosen"):
            quoted.setdefault(EXAMPLES["chosen"].format(row["attack"]), row["chosen"])
    quoted |= {EXAMPLES[name]: first[name] for name in ("private", "random") if first.get(name)}
    table = [[{"of": name, "documents": "\n".join(texts)}] for name, texts in quoted.items()]
    return listing(table, [Column("of", heading="documents"), Column("documents", heading="the first of them")])


def course(rows: Sequence[Row], name: str) -> str:
    """Precision, membership and recovered fraction of each attack against what is swept."""
    ticks = list(dict.fromkeys(str(row[name]) for row in rows))
    panels = []
    for column, words in (
        ("precision", "share of chosen documents of the domain"),
        ("membership_auc", "AUC of membership"),
        ("recovered_fraction", "recovered fraction"),
    ):
        series = []
        for some in grouped(rows, [setting("attack")]):
            series.append(Series(some[0]["attack"], *_means(some, name, column, ticks)))
        if column == "precision":
            series.append(Series("chance", *_means(rows, name, "chance", ticks), "dotted", color=GREY))
        panels.append(Panel(name.replace("_", " "), words, series, ticknames=ticks))
    return chart(panels, f"precision, membership and recovered fraction against {name}")


def _means(rows: Group, name: str, column: str, ticks: Sequence[str]) -> tuple[list[float], list[float]]:
    """Places of the swept option's values, and the means of a column there."""
    points = [(ticks.index(str(row[name])), row[column]) for row in rows if row.get(column) is not None]
    means = {float(at): statistics.fmean(value for other, value in points if other == at) for at, _ in sorted(points)}
    return [*means], [*means.values()]


def charts(rows: Sequence[Row], swept: Sequence[str]) -> Mapping[str, str]:
    """What was chosen, and how that changes with what is swept."""
    against = {f"Against {name.replace('_', ' ')}": course(rows, name) for name in swept[:1]}
    return against | {"What was chosen": examples(rows)}


def _of_best(rows: Group, *columns: str) -> list[AnyRow]:
    """All rows of the attack that is best by the median of these columns, the first one first."""
    groups = grouped(rows, [setting("attack")])
    return max(groups, key=lambda some: [_median(some, name) for name in columns])


def _median(rows: Group, name: str) -> float:
    """0 where none has a value."""
    return float(statistics.median([row[name] for row in rows if row.get(name) is not None] or [0.0]))
