"""Columns: what a row's value is called, means, how it is written, and what several rows make of it; and their tables.

A table is columns over groups of rows, one row or several to a line. The same cells are drawn in a terminal and on a
page.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, TypeAlias

from rich.table import Table
from rich.text import Text

AnyRow: TypeAlias = Mapping[str, Any]
Group: TypeAlias = Sequence[AnyRow]

WIDTH, MOST_ROWS = 80, 60
"""Of a terminal's table, in letters and in lines; the page has every column and row."""

WRAPPED = (14, 10)
"""Letters from which on a terminal wraps words: the first of these with which all columns fit, or the first."""

MANY_COLUMNS, MOST_COLUMNS = 12, 16
"""Columns from which on the page sets a table closer, and breaks its lines; and prints it in landscape."""

SENTENCE = 60
"""Letters from which on the page gives a cell the width of a sentence."""

_FEW = 8
"""Rows that need no summary."""

NONE = "–"

BOOKKEEPING = ("scenario", "client", "round", "seed", "unit", "settings")
"""Of a row, what is neither a setting nor measured; a column shows it only where one is declared."""

FIGURE = re.compile(r"[-–∞≥.\d]|(yes|no)?$")
"""How a cell begins that holds a number."""


class Html(str):
    """A cell for the page, in HTML: what comes from outside is escaped in it."""


class Alarm(str):
    """A cell in the colour of alarm."""


@dataclass(frozen=True)
class Column:
    """One column of a table, over rows that may lack its value."""

    name: str
    """Of the row's value."""
    meaning: str = ""
    """For the legend; empty where the heading says it all."""
    heading: str = ""
    """The name in words, unless another is given."""
    form: str = ""
    """Format of a float, such as `.1f`; unless said, four digits, or two and a power of ten."""
    over: Literal["same", "median", "mean", "share", "rows", "group", "hidden"] = "median"
    """What several rows become. `same`: nothing, since rows with different values are never summed up. `share`: of
    those that say yes. `rows`: only a row of its own has this column. `group`: only several rows have it. `hidden`: in
    no table; the value is measured, so that it is no setting either."""
    of: Callable[[Group], Any] | None = None
    """The value over a group of rows, where it is more than a median or a mean of the named one."""
    page: bool = False
    """Whether terminals leave it to the page."""

    @property
    def title(self) -> str:
        """The heading in words."""
        return self.heading or self.name.replace("_", " ")

    def value(self, rows: Group) -> Any:
        """What these rows have here; None where that is nothing."""
        if self.of is not None:
            return self.of(rows)
        known = [value for row in rows if (value := row.get(self.name)) is not None]
        if self.over == "same" or len(rows) == 1:
            return known[0] if known else None
        numbers = [float(value) for value in known if isinstance(value, int | float) and math.isfinite(value)]
        if self.over == "rows" or not numbers:
            return None
        return statistics.median(numbers) if self.over == "median" else statistics.fmean(numbers)

    def cell(self, rows: Group) -> str:
        """The value as it is written."""
        value = self.value(rows)
        return f"{value:.0%}" if self.over == "share" and isinstance(value, float) else said(value, self.form)


def said(value: Any, form: str = "") -> str:
    """A value as tables write it: four digits, or two and a power of ten; yes or no; a dash where there is none."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not form:
        return f"{value:.4g}" if 1e-2 <= abs(value) < 1e4 else f"{value:.1e}" if value else "0"
    if isinstance(value, float) or (isinstance(value, int) and form[-1:] in ("f", "e", "%")):
        return format(value, form)
    return value if isinstance(value, str) else str(value)


def setting(name: str) -> Column:
    """The column of a value that was chosen and not measured."""
    return Column(name, over="same", form="g")


def settings(rows: Group, columns: Sequence[Column]) -> list[Column]:
    """Of the settings, which are the values that no column is about, those that differ among the rows.

    Where an attack's row lacks a setting, that is a difference too, unless it failed before the setting was told.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    for name in (*BOOKKEEPING, "error", *(column.name for column in columns)):
        names.pop(name, None)
    told = {
        name: {said(row.get(name), "g") for row in rows if name in row or ("attack" in row and not row.get("error"))}
        for name in names
    }
    return [setting(name) for name in names if len(told[name]) > 1]


def grouped(rows: Group, columns: Iterable[Column]) -> list[list[AnyRow]]:
    """Rows that are the same in all of these columns, in the order of the first of them."""
    keys = list(columns)
    groups: dict[tuple[str, ...], list[AnyRow]] = {}
    for row in rows:
        groups.setdefault(tuple(column.cell([row]) for column in keys), []).append(row)
    return list(groups.values())


def summary(rows: Group, columns: Sequence[Column]) -> tuple[list[list[AnyRow]], list[Column]]:
    """Rows that differ in who was attacked, when and under which seed alone, in groups; and the columns over them.

    No groups where few rows repeat each other, unless a column counts over groups.
    """
    chosen = settings(rows, columns)
    groups = grouped(rows, (*chosen, *(column for column in columns if column.over == "same")))
    shown = [column for column in (*chosen, *columns) if column.over not in ("rows", "hidden")]
    if not any(column.over == "group" for column in columns):
        if len(rows) <= _FEW or 2 * len(groups) > len(rows) or all(column.over == "same" for column in shown):
            return [], shown
        at = next((place for place, column in enumerate(shown) if column.over != "same"), len(shown))
        shown.insert(at, Column("rows", "over how many rows numbers are medians, and yes and no are shares", of=len))
    return groups, shown


def single(rows: Group, columns: Sequence[Column]) -> tuple[list[list[AnyRow]], list[Column]]:
    """Every row as a group of its own; and the columns over them."""
    shown = [column for column in columns if column.over not in ("group", "hidden")]
    return [[row] for row in rows], settings(rows, columns) + shown


def table(rows: Group, columns: Sequence[Column], notes: Sequence[str] = ()) -> Table:
    """The rows for a terminal of WIDTH columns: in groups where they repeat each other, settings that vary first."""
    groups, shown = summary(rows, columns)
    return terminal(*(groups, shown) if groups or not rows else single(rows, columns), notes)


def terminal(groups: Sequence[Group], columns: Sequence[Column], notes: Sequence[str] = ()) -> Table:
    """A line for each group, with as many columns as there is room for; the caption says what they mean."""
    cells = {column: [column.cell(group) for group in groups] for column in columns if not column.page}
    cells = {column: some for column, some in cells.items() if {*some} != {NONE} or not groups}
    keys = [column for column in cells if column.over == "same" and column.name != "attack"]
    for column in {*keys} - {*telling(keys, groups)}:  # 80 columns are few
        del cells[column]
    for most in (*WRAPPED, WRAPPED[0]):
        widths = {column: _width(column, some, most) for column, some in cells.items()}
        if sum(widths.values()) + len(widths) <= WIDTH + 1:
            break
    room, kept = WIDTH + 1, []
    for column in cells:
        if (room := room - widths[column] - 1) < 0:
            break
        kept.append(column)
    drawn = Table(box=None, padding=(0, 1, 0, 0))
    spare = max(room, 0) // max(1, sum(not _figures(cells[column]) for column in kept))  # for words that are wrapped
    for column in kept:
        words, wide = not _figures(cells[column]), widths[column]
        heading = column.title.replace(" ", "\n") if len(column.title) > wide else column.title
        justify: Literal["left", "right"] = "left" if words else "right"
        most = wide + spare * words
        drawn.add_column(
            Text(heading), justify=justify, no_wrap=not words, overflow="fold", min_width=wide, max_width=most
        )
    for number in range(min(len(groups), MOST_ROWS)):
        lines = [cells[column][number] for column in kept]
        drawn.add_row(*(Text(cell, style="red" if isinstance(cell, Alarm) else "") for cell in lines))
    left_out = ["The page has all rows and columns."] * (len(groups) > MOST_ROWS or len(kept) < len(columns))
    drawn.caption = Text("\n".join(filter(None, (legend(kept, groups), *left_out, *notes))))
    return drawn


def follows(column: Column, others: Sequence[Column], groups: Sequence[Group]) -> bool:
    """Whether the column's cell is told by those of the others."""
    known = [tuple(other.cell(group) for other in others) for group in groups]
    return len({*zip(known, map(column.cell, groups), strict=True)}) == len({*known})


def telling(columns: Sequence[Column], groups: Sequence[Group]) -> list[Column]:
    """The columns of which none is told by another one alone."""
    left = list(columns)
    for column in reversed(columns):
        if any(follows(column, [other], groups) for other in left if other != column):
            left.remove(column)
    return left


def label(group: Group, columns: Iterable[Column]) -> str:
    """The group's values of these settings in words, such as `dlg, noise 0.1`; settings that it lacks are left out."""
    cells = {column: column.cell(group) for column in columns}
    words = (
        cell if column.name == "attack" else f"{column.title} {cell}" for column, cell in cells.items() if cell != NONE
    )
    return ", ".join(words)


def _figures(cells: Sequence[str]) -> bool:
    return all(map(FIGURE.match, cells))


def _width(column: Column, cells: Sequence[str], most: int) -> int:
    widest = max((len(line) for cell in cells for line in cell.split("\n")), default=0)
    return max(*map(len, column.title.split(" ")), widest if _figures(cells) else min(widest, most))


def legend(columns: Iterable[Column], groups: Sequence[Group]) -> str:
    """What the columns mean that are not empty."""
    shown = (column for column in columns if column.meaning and any(column.cell(group) != NONE for group in groups))
    return "; ".join(f"{column.title}: {column.meaning}" for column in shown)


def listing(groups: Sequence[Group], columns: Iterable[Column], name: str = "Table") -> str:
    """The page's table, a line for each group; columns that are empty are left out. It scrolls within its own box.
    Where columns are many, the settings that are the same in every line are said below.

    Args:
        name: what it is called for those who do not see it.
    """
    head, cells, below = "", [], ""
    lines = f"{len(groups)} {'line' if len(groups) == 1 else 'lines'}"
    found = {column: [column.cell(group) for group in groups] for column in columns}
    found = {column: some for column, some in found.items() if {*some} != {NONE}}
    if len(found) >= MOST_COLUMNS and len(groups) > 1:
        one = {column: some[0] for column, some in found.items() if column.over == "same" and len({*some}) == 1}
        found = {column: some for column, some in found.items() if column not in one}
        said = "; ".join(f"{column.title}: {cell}" for column, cell in one.items())
        below = f"<p class='pale'>In every line {escape(said)}.</p>" if said else ""
    for column, some in found.items():
        kind = _kind(some)
        head += f"<th scope='col' class='{kind}'>{escape(column.title)}</th>"
        cells.append([_drawn(cell, kind) for cell in some])
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in zip(*cells, strict=True))
    wide = " many" * (len(cells) >= MANY_COLUMNS) + " most" * (len(cells) >= MOST_COLUMNS)
    caption = f"<caption>{escape(name)}: {lines}, {len(cells)} columns</caption>"
    whole = f"<table class='sortable{wide}'>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return scrolled(whole, f"{name}, {lines}") + below


def scrolled(table: str, words: str, style: str = "") -> str:
    """A table in a box that scrolls, also by the arrow keys.

    Args:
        words: what it holds, for those who do not see it.
        style: of the box, in CSS.
    """
    look = f" style='{style}'" if style else ""
    return f"<div class='scroll' role='region' tabindex='0' aria-label='{escape(words)}'{look}>{table}</div>"


def _kind(cells: Sequence[str]) -> str:
    if any(isinstance(cell, Html) for cell in cells):
        return "words"
    longest = max(map(len, cells), default=0)
    return (
        "number" if _figures(cells) else "sentence" if longest > SENTENCE else "words" if longest > WRAPPED[0] else ""
    )


def _drawn(cell: str, kind: str) -> str:
    words = breakable(cell) if kind in ("words", "sentence") else escape(cell)  # a wbr breaks where nothing else may
    if kind == "number":  # neither an interval nor a power of ten is broken at its dash
        words = re.sub(r"\[[^\]]*\]|\S+e-\d+", r"<span>\g<0></span>", words)
    words = cell if isinstance(cell, Html) else words.replace("\n", "<br>")
    return f"<td class='{kind}{' leak' if isinstance(cell, Alarm) else ''}'>{words}</td>"


def breakable(text: str) -> str:
    """Escaped, and free to go on in a new line after _ ( , and before a capital."""
    return re.sub(r"(?<=[_,])|(?<=\()(?!\))|(?<=[a-z])(?=[A-Z])", "<wbr>", escape(text))
