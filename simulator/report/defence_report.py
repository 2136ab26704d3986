"""Defences side by side, for people: what each leaves to see, to whom, and what it costs in accuracy and in time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from rich.markup import escape as plain
from rich.table import Table

from fedtap.simulator.report.curves import Trade, trade_svg
from fedtap.simulator.report.outcomes import Outcome, outcome, psnrs

Row: TypeAlias = Mapping[str, Any]

PLAIN, AWARE, UPPER = "plain", "adaptive", "best by score"
"""Who attacks. An attacker has no score to choose by: the last is an upper bound, which needs the truth."""

LEGEND = (
    "plain, aware: share of images that came back [95 %, Clopper-Pearson] and median PSNR over images, dB, of attacks "
    "that do not, and do, know the whole defence, of several the one with the higher median; best by score: of each "
    "victim the attack that came nearest, an upper bound that needs the truth, which no attacker has; n: victims; "
    "time: of a client's exchange, over that without a defence; ε: of the updates in the attacked exchanges"
)

WHERE = ("dataset", "model", "batch", "local_steps", "threat_model", "rounds", "accuracy_loss")
"""What may be swept beside the defence."""


@dataclass(frozen=True)
class Entry:
    """One defence on one set of victims. PSNR in dB."""

    first: Row
    victims: int
    psnr: Mapping[str, float]
    """Who attacks -> median over images."""
    back: Mapping[str, Outcome]
    """Who attacks -> what came back."""
    blind: float

    @property
    def epsilon(self) -> str:
        """In words; nothing where none is known."""
        if self.first.get("epsilon") is None:
            return "∞" if "∞" in str(self.first.get("epsilon_note")) else "–"
        return f"{self.first['epsilon']:,.3g}" if self.first["epsilon"] < 1e3 else f"{self.first['epsilon']:,.0f}"


def told(rows: Sequence[Row]) -> bool:
    """Whether the rows are about what defences cost."""
    attacked = [row for row in rows if "attack" in row and "adaptive" in row]
    return not any("success" in row for row in rows) and len({row["defence"] for row in attacked}) > 1


def entries(rows: Sequence[Row]) -> list[Entry]:
    """One for each defence and setting, in the rows' order; those whose attacks all failed are left out."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.get("psnr_blind") is not None:
            groups.setdefault(tuple(str(row.get(name)) for name in ("defence", *WHERE)), []).append(row)
    return [_entry(some) for some in groups.values()]


def _entry(rows: Sequence[Row]) -> Entry:
    psnr: dict[str, float] = {}
    back: dict[str, Outcome] = {}
    best: dict[tuple[Any, ...], Row] = {}
    attacks: dict[str, list[Row]] = {}
    for row in rows:  # no number: as good as blind
        row = row if row["psnr"] is not None else {**row, "psnr": row["psnr_blind"], "psnr_images": None}
        attacks.setdefault(row["attack"], []).append(row)
        victim = (row["client"], row["round"], row["seed"])
        top = max(row.get("upper_bound_psnr") or row["psnr"], row["psnr"])
        if victim not in best or top > best[victim]["upper_bound_psnr"]:
            best[victim] = {**row, "upper_bound_psnr": top}
    for some in attacks.values():
        who, middle = AWARE if some[0]["adaptive"] else PLAIN, statistics.median(psnrs(some))
        if who not in psnr or middle > psnr[who]:
            psnr[who], back[who] = middle, outcome(some)
    psnr[UPPER] = statistics.median(row["upper_bound_psnr"] for row in best.values())
    back[UPPER] = outcome(list(best.values()))
    return Entry(rows[0], len(best), psnr, back, statistics.median(psnrs(rows, "psnr_blind")))


def _columns(found: Sequence[Entry]) -> list[str]:
    """The defence, what else varies, what is known of its price, and who attacks."""
    varying = [name for name in WHERE if len({str(entry.first.get(name)) for entry in found}) > 1]
    who = [name for name in (PLAIN, AWARE, UPPER) if any(name in entry.psnr for entry in found)]
    priced = [name for name in PRICES if any(entry.first.get(name) is not None for entry in found)]
    return ["defence", *varying, "n", *who, "blind", "ε", *priced]


PRICES = {"overhead": "time", "accuracy": "accuracy", "accuracy_lost": "lost"}


def _cell(entry: Entry, column: str) -> str:
    value = entry.first.get(column)
    match column:
        case "ε":
            return entry.epsilon
        case "n":
            return str(entry.victims)
        case "blind":
            return f"{entry.blind:.1f}"
        case "overhead":
            return "–" if value is None else f"{value:.1f}"
        case "accuracy" | "accuracy_lost":
            return "–" if value is None else f"{value:.0%}"
        case _ if column in (PLAIN, AWARE, UPPER):
            return f"{entry.back[column]}\n{entry.psnr[column]:.1f} dB" if column in entry.psnr else "–"
    return str(value)


def table(rows: Sequence[Row]) -> Table:
    """A line for each defence, for a terminal of 80 columns."""
    found = entries(rows)
    shown = Table(caption=plain(LEGEND), box=None, padding=(0, 1, 0, 0))
    for name in _columns(found):
        shown.add_column(PRICES.get(name, name), justify="left" if name == "defence" else "right", overflow="fold")
    for entry in found:
        shown.add_row(*(plain(_cell(entry, name)) for name in _columns(found)))
    return shown


def section(rows: Sequence[Row]) -> str:
    """Chart, where models were trained, and table for the page; nothing where there is but one defence."""
    if not told(rows) or not (found := entries(rows)):
        return ""
    columns = _columns(found)
    head = "".join(f"<th class='{_kind(name)}'>{escape(PRICES.get(name, name))}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td class='{_kind(name)}'>{escape(_cell(entry, name)).replace(chr(10), '<br>')}</td>" for name in columns
        )
        + "</tr>"
        for entry in found
    )
    return (
        "<h2>What each defence leaves, and what it costs</h2>"
        + _chart(found)
        + f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        + f"<p class='pale'>{escape(LEGEND)}.{escape(_chosen(rows))}</p>"
    )


def _kind(column: str) -> str:
    return "" if column == "defence" else "number"


def _chosen(rows: Sequence[Row]) -> str:
    """How strengths were chosen, where they were."""
    attacked = {row["defence"] for row in rows if "attack" in row and "held_out" in row}
    tried = {row["defence"] for row in rows if "attack" not in row and "held_out" in row}
    if not tried:
        return ""
    return (
        " Each defence has the strength at which it comes nearest to the loss agreed on, on public images; accuracy, "
        f"and what is lost of it, are on test images. {len(tried | attacked)} models were trained, {len(attacked)} of "
        "them attacked."
    )


def _chart(found: Sequence[Entry]) -> str:
    trades: dict[str, list[Trade]] = {}
    for entry in found:
        if entry.first.get("accuracy") is None:
            continue
        label = entry.first["defence"] + (f", ε = {entry.epsilon}" if entry.first.get("epsilon") is not None else "")
        for who, psnr in entry.psnr.items():
            trade = Trade(label, entry.first["accuracy"], psnr - entry.blind, entry.back[who].share or 0.0)
            trades.setdefault(who, []).append(trade)
    return f"<div class='chart'>{trade_svg(trades, 'came back (share of images)')}</div>" if trades else ""
