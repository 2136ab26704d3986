"""What a study leaves for people: the terminal's table, and a page."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.markup import escape as plain
from rich.table import Table

from fedtap.simulator.report import page as report
from fedtap.simulator.report.folder import Folder, Row
from fedtap.simulator.wire.soundness import CAUSES, EXPLAINED

if TYPE_CHECKING:
    from typing import Any as Study

FOUND = (
    "what was found is in guesses/, images also in pictures/; objective: the attack's own, lower is better; sum w: "
    "private examples that the points stand for; seconds: for each victim; unexplained: the share of the gradient that "
    f"a guess does not cause: over {EXPLAINED:g} it is {CAUSES}"
)

WIDTH, MOST_ROWS = 80, 60
"""Of the terminal's table, at most; the page has all columns and rows."""

LONGEST = 14
"""Letters of a cell from which on it is folded."""

FOLDED = 60
"""Letters of a cell from which on the page folds it."""

FEW = 8
"""Rows that need no summary."""

REPEATS = "rows"
"""The summary's column of how many rows are behind one of its own."""


def table(study: Study, rows: Sequence[Row]) -> Table:
    """The rows for a terminal of WIDTH columns; their medians, where clients and seeds repeat each other."""
    if medians := summary(study, rows):
        names = [name for name in _columns(study, medians) if _numbers(medians, name) or _differs(medians, name)]
        return _shown(names, f"medians over so many rows, of yes and no the share; {study.legend}", medians)
    return _shown(_columns(study, rows), study.legend, rows)


def _differs(rows: Sequence[Row], name: str) -> bool:
    """Whether it is not the same in all rows, as it is among the page's settings then."""
    return len({said(row.get(name)) for row in rows}) > 1


def _shown(columns: Sequence[str], legend: str, rows: Sequence[Row]) -> Table:
    """As many columns as there is room for."""
    drawn = Table(box=None, padding=(0, 1, 0, 0))
    kept, room = [], WIDTH
    for name in columns:
        cells, numbers = [said(row.get(name)) for row in rows], _numbers(rows, name)
        wide = max(map(len, (*name.split("_"), *cells)))
        folded = not numbers and wide > LONGEST
        room -= (LONGEST if folded else wide) + 1
        if room < 0:
            break
        kept.append(name)
        shares = any(cell.endswith("%") for cell in cells)
        heading = plain(name.replace("_", "\n"))
        justify: Any = "right" if numbers or shares else "left"
        drawn.add_column(heading, justify=justify, no_wrap=not folded, overflow="fold", min_width=min(wide, LONGEST))
    for row in rows[:MOST_ROWS]:
        drawn.add_row(*(plain(said(row.get(name))) for name in kept))
    if len(rows) > MOST_ROWS or room < 0:
        legend += "; the page has all rows and columns"
    drawn.caption = plain(legend)
    return drawn


def summary(study: Study, rows: Sequence[Row]) -> list[Row]:
    """Medians over clients and seeds, for each setting and each thing told in words; empty where none repeat."""
    names, settings = _columns(study, rows), {*study.settings, *dict(study.swept)}
    words = [name for name in names if name in settings or not _numbers(rows, name)]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(said(row.get(name)) for name in words), []).append(row)
    if len(rows) <= FEW or 2 * len(groups) > len(rows):
        return []
    numbers = [name for name in names if name not in words and name != "client"]
    return [
        {name: group[0].get(name) for name in words}
        | {REPEATS: len(group)}
        | {name: _median([row[name] for row in group if row.get(name) is not None]) for name in numbers}
        for group in groups.values()
    ]


def _median(values: Sequence[Any]) -> Any:
    if values and all(isinstance(value, bool) for value in values):
        return f"{sum(values) / len(values):.0%}"
    return statistics.median(values) if values else None


def found(rows: Sequence[Row]) -> Table:
    """What attacks made of saved leaks, of which there is no truth, for a terminal."""
    failed = dict.fromkeys(f"{row['attack'] or row['leak']}: {row['error']}" for row in rows if row.get("error"))
    return _shown([name for name in _found_columns(rows) if name != "error"], "\n".join([FOUND, *failed]), rows)


def saved(about: report.About, rows: Sequence[Row], pictures: Sequence[report.Picture]) -> str:
    """The same as a page."""
    threat = f"<h2>Who listens, and what they know</h2><p>{escape(about.threat)}</p>"
    return report.page(about, [report.gallery(pictures), *_listed(_found_columns(rows), FOUND, rows), threat])


def _found_columns(rows: Sequence[Row]) -> list[str]:
    """Those that apply to what was found; an error stands last."""
    names = dict.fromkeys(name for row in rows for name in row)
    told = [name for name in names if name not in ("model", "settings", "unit", "ids", "error")]
    return told + ["error"] * ("error" in names)


def said(value: Any) -> str:
    """A value as tables write it: four digits, or two and a power of ten; yes or no; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if 1e-2 <= abs(value) < 1e4 else f"{value:.1e}" if value else "0"
    return str(value)


def write(
    folder: Folder,
    parts: Sequence[Study],
    charts: Mapping[str, str],
    pictures: Sequence[report.Picture],
    *,
    finished: bool,
) -> None:
    """`report.html`, and `strip.png` where there are pictures, of the rows that the folder has so far."""
    if pictures:
        folder.write("strip.png", report.strip(pictures))
    folder.write("report.html", _page(folder, parts, charts, pictures, finished).encode())


def _page(
    folder: Folder,
    parts: Sequence[Study],
    charts: Mapping[str, str],
    pictures: Sequence[report.Picture],
    finished: bool,
) -> str:
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
        finished=finished,
    )
    medians = summary(study, rows)
    together = f"<h2>Medians</h2>{listing(_columns(study, medians), medians)}" if medians else ""
    return report.page(
        about,
        [
            report.gallery(pictures),
            *(f"<h2>{escape(heading)}</h2><div class='chart'>{chart}</div>" for heading, chart in charts.items()),
            together,
            *_listed(_columns(study, rows), study.legend, rows),
            f"<h2>Who listens, and what they know</h2><p>{escape(study.threat)}</p>",
        ],
    )


def _listed(columns: Sequence[str], legend: str, rows: Sequence[Row]) -> list[str]:
    """All rows, as a page's elements."""
    return [f"<h2>Rows</h2>{listing(columns, rows)}", f"<p class='pale'>{escape(legend)}.</p>"]


def listing(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """These columns of the rows, as a page's table; long words fold."""
    kinds = {name: _class(rows, name) for name in columns}
    head = "".join(f"<th{kinds[name]}>{escape(name.replace('_', ' '))}</th>" for name in columns)
    cells = [[f"<td{kinds[name]}>{escape(said(row.get(name)))}</td>" for name in columns] for row in rows]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _class(rows: Sequence[Row], name: str) -> str:
    if _numbers(rows, name):
        return " class='number'"
    return " class='error'" if max((len(said(row.get(name))) for row in rows), default=0) > FOLDED else ""


def _columns(study: Study, rows: Sequence[Row]) -> list[str]:
    """What is swept, then the study's columns: those that any row has."""
    names = dict.fromkeys((*(knob for knob, _ in study.swept), REPEATS, *study.columns))
    return [name for name in names if any(row.get(name) is not None for row in rows)]


def _numbers(rows: Sequence[Row], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return all(isinstance(value, int | float) and (isinstance(value, bool) or math.isfinite(value)) for value in values)
