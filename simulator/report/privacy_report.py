"""Privacy and its price, for people: what attacks got at each ε, what theory allows, and what the model lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from rich.markup import escape as plain
from rich.table import Table

from fedtap.simulator.report.curves import Success, Trade, success_svg, trade_svg
from fedtap.simulator.report.outcomes import MEASURE, median, outcome, psnrs

Row: TypeAlias = Mapping[str, Any]

LEGEND = (
    "success: share of the n images that came back, with its Clopper-Pearson 95 % interval, or of games won, with "
    "limits that are wrong in one honest run of 10,000; PSNR: median over images, in brackets a blind guess's; ε: of "
    "the attacked exchanges; bound: only where a prior is known, as of canaries"
)


@dataclass(frozen=True)
class Entry:
    """What one attack got at one ε: of its victims, or of games."""

    first: Row
    label: str
    psnr: float | None
    """Median over images, in dB."""
    blind: float | None
    tries: int
    """Images, or games."""

    @property
    def epsilon(self) -> str:
        """In words."""
        return _short(self.first["epsilon"]) if self.first["epsilon"] is not None else "∞"


def told(rows: Sequence[Row]) -> bool:
    """Whether the rows hold what attacks got against what a defence guarantees."""
    return any("success" in row for row in rows)


def entries(rows: Sequence[Row]) -> list[Entry]:
    """One for each attack at each defence, and one for each game; in the rows' order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for row in rows if "success" in row):
        groups.setdefault(tuple(str(row.get(name)) for name in (*WHOSE, *KNOBS)), []).append(row)
    found = []
    for some in groups.values():
        first = some[0]
        game = "canaries" in first
        psnr, blind = (median(psnrs(some, name)) for name in ("psnr", "psnr_blind"))
        label = f"{first['canaries']} canaries, best attacker" if game else str(first["attack"])
        found.append(Entry(first, label, psnr, blind, first["games"] if game else outcome(some).images))
    return found


WHOSE = ("scenario", "attack", "dataset", "canaries", "epsilon", "releases", "success_db")
"""With the knobs: what an entry's rows share."""


KNOBS = ("model", "batch", "local_steps", "repeats", "mechanism", "clip", "defence")
HEAD = ("ε", "σ", "attack", "n", "success", "", "PSNR dB", "bound", "accuracy")


def _knobs(found: Sequence[Entry]) -> list[str]:
    """What differs among the victims' rows; the defence only where ε does not tell it."""
    attacked = [entry for entry in found if "canaries" not in entry.first]
    names = [name for name in KNOBS if len({str(entry.first.get(name)) for entry in attacked}) > 1]
    told = {(entry.epsilon, entry.first["defence"]) for entry in attacked}
    return names if len(told) > len({epsilon for epsilon, _ in told}) else [name for name in names if name != "defence"]


def _cells(entry: Entry) -> list[str]:
    row = entry.first
    psnr = "–" if entry.psnr is None else f"{entry.psnr:.1f} ({_fixed(entry.blind, 1)})"
    limits = "" if row["success"] is None else f"{row['success_low']:.2f}–{row['success_high']:.2f}"
    numbers = [_fixed(row["success"], 2), limits, psnr, _fixed(row["bound"], 3), _fixed(row["accuracy"], 2)]
    return [entry.epsilon, _short(row["sigma"]), entry.label, str(entry.tries), *numbers]


def table(rows: Sequence[Row]) -> Table:
    """The entries, for a terminal of 80 columns."""
    failed = dict.fromkeys(f"{row['attack']} failed: {row['error']}" for row in rows if row.get("error"))
    shown = Table(caption=plain("\n".join([LEGEND, *list(failed)[:3]])), box=None, padding=(0, 1, 0, 0))
    found = entries(rows)
    knobs = _knobs(found)
    for name in (*knobs, *HEAD):
        if name in ("attack", "defence"):
            shown.add_column(name, overflow="fold")
        else:
            shown.add_column(name, justify="right", no_wrap=True)
    for entry in found:
        shown.add_row(*(plain(str(entry.first.get(name, ""))) for name in knobs), *map(plain, _cells(entry)))
    return shown


def section(rows: Sequence[Row]) -> str:
    """Charts and table for the page; nothing where no row tells an ε."""
    if not told(rows):
        return ""
    found = entries(rows)
    first = next((entry.first for entry in found if entry.psnr is not None), found[0].first)
    knobs = [name for name in _knobs(found) if name != "defence"]  # which has a column anyway
    head = "".join(f"<th class='number'>{name}</th>" for name in knobs)
    head += "".join(f"<th class='{'' if name == 'attack' else 'number'}'>{name}</th>" for name in HEAD)
    head += "<th class='number'>ε of all exchanges</th><th>ε is for</th><th>defence</th>"
    body = "".join(f"<tr>{_line(entry, knobs)}</tr>" for entry in found)
    return (
        "<h2>Privacy and its price</h2>"
        + _charts(found)
        + f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        + f"<p class='pale'>{escape(LEGEND)}. δ = {first['delta']:g}. A success is {_success(first)}. "
        "The images' bound is empty, since nobody knows with what probability they "
        "could be guessed blindly; what stopped this attack may not stop another, while no attacker passes the bound. "
        f"{escape(_beside(found))}</p>"
    )


def _success(row: Row) -> str:
    """What counts as one, for images."""
    return f"a PSNR of at least {row['success_db']:g} dB" if row.get("success_db") else f"a {MEASURE} image"


def _beside(found: Sequence[Entry]) -> str:
    """What of an exchange ε does not speak of."""
    said = dict.fromkeys(str(entry.first["not_covered"]) for entry in found if "not_covered" in entry.first)
    return f"ε speaks of the update alone. Beside it travels in the clear: {' or '.join(said)}." if said else ""


def _line(entry: Entry, knobs: Sequence[str]) -> str:
    row, cells = entry.first, _cells(entry)
    words = "".join(f"<td class='number'>{escape(str(entry.first.get(name, '')))}</td>" for name in knobs)
    words += "".join(
        f"<td class='{'attack' if name == 'attack' else 'number'}'>{escape(cell)}</td>"
        for name, cell in zip(HEAD, cells, strict=True)
    )
    ever = "–" if "releases" not in row else _short(row["epsilon_all"]) if row["epsilon_all"] is not None else "∞"
    ever += f" ({row['releases']})" if "releases" in row else ""
    whom = "an example" if row["protects"] == "example" else "a client"
    far = "no clip" if row["sensitivity"] is None else f"sensitivity {_short(row['sensitivity'])}"
    return (
        words + f"<td class='number'>{ever}</td><td>{whom}, {escape(row['adjacency'])}, {far}</td>"
        f"<td>{escape(row['defence'])}</td>"
    )


def _charts(found: Sequence[Entry]) -> str:
    trades: dict[str, list[Trade]] = {}
    for entry in found:
        row = entry.first
        if entry.psnr is not None and entry.blind is not None and row["accuracy"] is not None:
            trade = Trade(f"ε = {entry.epsilon}", row["accuracy"], entry.psnr - entry.blind, row["success"])
            trades.setdefault(entry.label, []).append(trade)
    shown = f"<div class='chart'>{trade_svg(trades, 'success (share of images)')}</div>" if trades else ""
    return shown + games_chart([entry.first for entry in found])


def games_chart(rows: Sequence[Row]) -> str:
    """How often canaries were told apart, and the bound, against ε; nothing where no row has a bound."""
    games: dict[str, list[Success]] = {}
    for row in (row for row in rows if row["bound"] is not None):
        numbers = (row[name] for name in ("epsilon", "success", "success_low", "success_high", "bound"))
        games.setdefault(f"{row['canaries']} canaries, best attacker", []).append(Success(*numbers))
    return f"<div class='chart' style='max-width: 720px'>{success_svg(games)}</div>" if games else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= value < 1e7 else f"{value:.3g}"


def _fixed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
