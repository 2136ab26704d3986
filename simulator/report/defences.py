"""Sections about defences: what is left to attacks at each ε, and what each defence leaves and costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

from fedtap.simulator.report.charts import Panel, Series, chart
from fedtap.simulator.report.columns import AnyRow, Column, Group, grouped, legend, listing, setting, terminal
from fedtap.simulator.report.outcomes import Outcome, median, outcome, psnrs

PLAIN, ADAPTIVE, UPPER = "plain", "adaptive", "best by score"
WHO = {
    PLAIN: "attacks that do not know the whole defence: share of images that came back [95 %, Clopper-Pearson], and "
    "median PSNR over images of the attack where that is highest",
    ADAPTIVE: "attacks that know it",
    UPPER: "of each victim the attack that came nearest, an upper bound that needs the truth, which no attacker has",
}

WHERE = ("dataset", "model", "batch", "local_steps", "threat_model", "rounds", "accuracy_loss")
"""What may be swept beside the defence."""

Trade = tuple[str, float, float, float]
"""A defence's name, the model's accuracy, PSNR over the blind guess in dB, and the share of images that came back."""


def epsilon_shown(rows: Group) -> str | None:
    """These rows' ε in words: ∞ where no noise makes it finite; None where none is known."""
    value, note = rows[0].get("epsilon"), str(rows[0].get("epsilon_note"))
    return rounded(value) if value is not None else "∞" if "∞" in note else None


def rounded(value: float | None) -> str:
    """Three digits, or all before the point; ∞ of nothing."""
    return "∞" if value is None else f"{value:,.0f}" if 1e3 <= value < 1e7 else f"{value:.3g}"


def attacker(rows: Group) -> str:
    """Who made these rows."""
    first = rows[0]
    return f"best attacker, {first['canaries']} canaries" if "canaries" in first else str(first.get("attack"))


def price(rows: Group) -> dict[str, str]:
    """Heading -> what attacks got against what the model lost, and games against their bound; nothing without an ε."""
    told = [row for row in rows if "success" in row]
    if not told:
        return {}
    points: dict[str, list[Trade]] = {}
    for some in grouped(
        [row for row in told if row["accuracy"] is not None], [*map(setting, ("attack", "epsilon", "defence", *WHERE))]
    ):
        psnr, blind = (median(psnrs(some, name)) for name in ("psnr", "psnr_blind"))
        if psnr is not None and blind is not None:
            point = (f"ε = {epsilon_shown(some)}", some[0]["accuracy"], psnr - blind, some[0]["success"])
            points.setdefault(attacker(some), []).append(point)
    covered = " or ".join(dict.fromkeys(str(row["not_covered"]) for row in told if "not_covered" in row))
    said = (
        f"δ = {told[0]['delta']:g}. No attacker passes the bound. "
        + "The images' bound is empty, since nobody knows with what probability they could be guessed blindly; what "
        "stopped this attack may not stop another. "
        * any("attack" in row for row in told)
        + f"ε speaks of the update alone. Beside it travels in the clear: {covered}." * bool(covered)
    )
    drawn = trade_chart(points, "success (share of images)") + games_chart(told)
    return {"Privacy and its price" if points else "Success against ε": f"{drawn}<p class='pale'>{escape(said)}</p>"}


def trade_chart(points: Mapping[str, Sequence[Trade]], share: str) -> str:
    """Of each attacker, PSNR over the blind guess and success against accuracy; nothing where there are no points.

    Args:
        share: what success is a share of.
    """
    series: list[list[Series]] = [[], []]
    for label, some in points.items():
        names, accuracy, *heights = zip(*some, strict=True)
        for panel, height in zip(series, heights, strict=True):
            panel.append(Series(label, accuracy, height, "dots", names=names))
    across, up = "test accuracy of the trained model", "PSNR over a blind guess, dB (median)"
    panels = [Panel(across, up, series[0], levels={"blind guess": 0}), Panel(across, share, series[1], share=True)]
    return chart(panels, "privacy against accuracy", height=3.8) if points else ""


def games_chart(rows: Group) -> str:
    """How often canaries were told apart, and the bound, against ε; nothing where no row has a bound."""
    series = []
    for some in grouped([row for row in rows if row["bound"] is not None], [setting("canaries")]):
        some, label = sorted(some, key=lambda row: float(row["epsilon"])), attacker(some)
        names = ("epsilon", "success", "success_low", "success_high", "bound")
        at, won, low, high, bound = ([row[name] for row in some] for name in names)
        series.append(Series(label, at, won, "bars", low, high))
        series.append(Series(f"{label}: bound", at, bound, "dashed", like=label))
    ticks = [epsilon for one in series for epsilon in one.x]
    return chart([Panel("ε", "share of trials won", series, ticks=ticks)], "success against ε") if series else ""


def attackers(rows: Group) -> dict[str, tuple[float, Outcome]]:
    """Who attacks (WHO) -> median PSNR over images in dB, and what came back."""
    found: dict[str, tuple[float, Outcome]] = {}
    best: dict[tuple[Any, ...], AnyRow] = {}
    for some in grouped(rows, [setting("attack")]):  # where an attack gave no number, it is as good as blind
        some = [
            row if row["psnr"] is not None else {**row, "psnr": row["psnr_blind"], "psnr_images": None} for row in some
        ]
        for row in some:
            victim = row["client"], row["round"], row["seed"]
            top = max(row.get("upper_bound_psnr") or row["psnr"], row["psnr"])
            if victim not in best or top > best[victim]["upper_bound_psnr"]:
                best[victim] = {**row, "upper_bound_psnr": top}
        who, middle = ADAPTIVE if some[0]["adaptive"] else PLAIN, statistics.median(psnrs(some))
        if who not in found or middle > found[who][0]:
            found[who] = middle, outcome(some)
    middle = statistics.median(row["upper_bound_psnr"] for row in best.values())
    return found | {UPPER: (middle, outcome(list(best.values())))}


def _got(who: str) -> Column:
    def cell(rows: Group) -> str | None:
        found = attackers(rows).get(who)
        return None if found is None else f"{found[1]}\n{found[0]:.1f} dB"

    return Column(who, WHO[who], over="group", of=cell)


def _blind(rows: Group) -> float | None:
    return median(psnrs(rows, "psnr_blind"))


BLIND = Column("psnr_blind", "PSNR of a blind guess, dB", "blind", ".1f", of=_blind)

_COLUMNS = (
    Column("n", "victims", of=lambda rows: len({(row["client"], row["round"], row["seed"]) for row in rows})),
    *map(_got, WHO),
    BLIND,
    Column("epsilon", "of the updates in the attacked exchanges", "ε", of=epsilon_shown),
    Column("overhead", "of a client's exchange, over that without a defence", "time", ".1f"),
    Column("accuracy", "of the trained model", "", ".0%"),
    Column("accuracy_lost", "accuracy that the defence costs", "lost", ".0%"),
)


def by_defence(rows: Group) -> tuple[list[list[AnyRow]], list[Column]]:
    """The rows of each defence and setting, and the columns; no rows unless they are about what defences cost."""
    scored = [row for row in rows if row.get("psnr_blind") is not None and "adaptive" in row]
    if any("success" in row for row in rows) or len({row["defence"] for row in scored}) < 2:
        return [], []
    varying = [name for name in WHERE if len({str(row.get(name)) for row in scored}) > 1]
    return grouped(scored, [*map(setting, ("defence", *WHERE))]), [*map(setting, ("defence", *varying)), *_COLUMNS]


def trade_table(rows: Group) -> Table | None:
    """A line for each defence, for a terminal; None where they are not what is asked."""
    groups, columns = by_defence(rows)
    return terminal(groups, columns) if groups else None


def section(rows: Group) -> dict[str, str]:
    """Heading -> chart, where models were trained, and table; nothing where there is but one defence."""
    groups, columns = by_defence(rows)
    if not groups:
        return {}
    points: dict[str, list[Trade]] = {}
    for some in groups:
        first, blind, epsilon = some[0], statistics.median(psnrs(some, "psnr_blind")), epsilon_shown(some)
        label = first["defence"] + (f", ε = {epsilon}" if first.get("epsilon") is not None else "")
        for who, (psnr, back) in attackers(some).items() if first.get("accuracy") is not None else ():
            points.setdefault(who, []).append((label, first["accuracy"], psnr - blind, back.share or 0.0))
    trained = {row["defence"] for row in rows if "held_out" in row}
    attacked = {row["defence"] for row in rows if "held_out" in row and "attack" in row}
    chosen = (
        "Each defence has the strength at which it comes nearest to the loss agreed on, on public images; accuracy and "
        f"what is lost of it are on test images. {len(trained)} models were trained, {len(attacked)} of them attacked."
    )
    said = f"{legend(columns, groups)}. {chosen if trained > attacked else ''}"
    drawn = trade_chart(points, "came back (share of images)") + listing(groups, columns)
    return {"What each defence leaves, and what it costs": f"{drawn}<p class='pale'>{escape(said)}</p>"}
