"""What a study leaves for people: the terminal's table, and a page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.markup import escape as plain
from rich.table import Table

from simulator import report
from simulator.output import Folder, Row

if TYPE_CHECKING:
    from simulator.study import Study

FOUND = (
    "what was found is in guesses/; objective: the attack's own, lower is better; sum w: private examples that the "
    "points stand for; seconds: for each victim"
)

MOST_ROWS = 60
"""Rows of the terminal's table, at most; the page has them all."""


def table(study: Study, rows: Sequence[Row]) -> Table:
    """The rows, for a terminal."""
    return _shown(_columns(study, rows), study.legend, rows)


def _shown(columns: Sequence[str], legend: str, rows: Sequence[Row]) -> Table:
    left = len(rows) - MOST_ROWS
    legend += f"; {left} more rows on the page" if left > 0 else ""
    shown = Table(caption=plain(legend), box=None, padding=(0, 1, 0, 0))
    for name in columns:
        shown.add_column(plain(name.replace("_", " ")), justify="right" if _numbers(rows, name) else "left")
    for row in rows[:MOST_ROWS]:
        shown.add_row(*(plain(said(row.get(name))) for name in columns))
    return shown


def found(rows: Sequence[Row]) -> Table:
    """What attacks made of a saved leak that holds no images, for a terminal."""
    return _shown(_found_columns(rows), FOUND, rows)


def saved(about: report.About, rows: Sequence[Row]) -> str:
    """Likewise, as a page."""
    threat = f"<h2>Who listens, and what they know</h2><p>{escape(about.threat)}</p>"
    return report.page(about, [*_listed(_found_columns(rows), FOUND, rows), threat])


def _found_columns(rows: Sequence[Row]) -> list[str]:
    return [name for name in rows[0] if name not in ("model", "settings", "unit", "ids")]


def said(value: Any) -> str:
    """A value as tables write it: four digits, yes or no, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(
    folder: Folder, parts: Sequence[Study], charts: Mapping[str, str], pictures: Sequence[report.Picture]
) -> None:
    """`report.html`, and `strip.png` where there are pictures, of the rows that the folder has so far."""
    if pictures:
        folder.write("strip.png", report.strip(pictures))
    folder.write("report.html", _page(folder, parts, charts, pictures).encode())


def _page(folder: Folder, parts: Sequence[Study], charts: Mapping[str, str], pictures: Sequence[report.Picture]) -> str:
    study, rows = parts[0], folder.rows
    settings = {
        field.name.replace("_", " "): " or ".join(dict.fromkeys(str(getattr(part, field.name)) for part in parts))
        for field in dataclasses.fields(study)
        if field.name not in ("name", "question", "swept")
    }
    about = report.About(
        scenario=study.name,
        question=study.question,
        threat=study.threat,
        settings=settings,
        environment=folder.about["versions"] | {"device": folder.about["device"], "started": folder.about["started"]},
    )
    return report.page(
        about,
        [
            report.gallery(pictures),
            *(f"<h2>{escape(heading)}</h2><div class='chart'>{chart}</div>" for heading, chart in charts.items()),
            *_listed(_columns(study, rows), study.legend, rows),
            f"<h2>Who listens, and what they know</h2><p>{escape(study.threat)}</p>",
        ],
    )


def _listed(columns: Sequence[str], legend: str, rows: Sequence[Row]) -> list[str]:
    """All rows, as a page's elements."""
    kinds = {name: " class='number'" if _numbers(rows, name) else "" for name in columns}
    head = "".join(f"<th{kinds[name]}>{escape(name.replace('_', ' '))}</th>" for name in columns)
    cells = [[f"<td{kinds[name]}>{escape(said(row.get(name)))}</td>" for name in columns] for row in rows]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return [
        f"<h2>Rows</h2><div class='scroll'><table><thead><tr>{head}</tr></thead>",
        f"<tbody>{body}</tbody></table></div>",
        f"<p class='pale'>{escape(legend)}.</p>",
    ]


def _columns(study: Study, rows: Sequence[Row]) -> list[str]:
    """What is swept, then the study's columns: those that any row has."""
    names = dict.fromkeys((*(knob for knob, _ in study.swept), *study.columns))
    return [name for name in names if any(row.get(name) is not None for row in rows)]


def _numbers(rows: Sequence[Row], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return all(isinstance(value, int | float) and (isinstance(value, bool) or math.isfinite(value)) for value in values)
