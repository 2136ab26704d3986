"""Columns and tables: what several rows become, which settings are shown, and cells that are the same everywhere."""

from __future__ import annotations

import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedtap.simulator.report.columns import (
    WIDTH,
    Alarm,
    Column,
    Html,
    grouped,
    legend,
    listing,
    said,
    setting,
    settings,
    summary,
    table,
    telling,
)

COLUMNS = (
    Column("client", over="rows"),
    Column("error_norm", "of the reconstruction"),
    Column("found", "whether it was", over="share"),
    Column("seconds", over="mean", form=".1f", page=True),
    Column("error", over="same"),
    Column("path", over="hidden"),
)


def rows(noises: tuple[float, ...] = (0.0, 0.5), clients: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "noise": noise,
            "client": n,
            "error_norm": n + noise,
            "found": n > 0,
            "seconds": float(n),
            "path": [n],
            "seed": n,
        }
        for noise in noises
        for n in range(clients)
    ]


def drawn(*arguments: Any) -> str:
    console = Console(width=WIDTH, file=io.StringIO(), record=True)
    console.print(table(*arguments))
    return console.export_text()


def test_rows_that_repeat_each_other_become_one_line() -> None:
    groups, columns = summary(rows(), COLUMNS)
    lines = [{column.name: column.cell(group) for column in columns} for group in groups]
    assert lines[1] == {
        "noise": "0.5",
        "rows": "5",
        "error_norm": "2.5",
        "found": "80%",
        "seconds": "2.0",
        "error": "–",
    }
    assert len(lines) == 2


def test_settings_are_what_varies_and_no_column_is_about() -> None:
    assert settings(rows(), COLUMNS) == [setting("noise")]
    assert settings(rows(noises=(0.5,)), COLUMNS) == []
    failed = {"client": 9, "error": "client 9 failed"}
    assert settings([*rows(noises=(0.5,)), failed], COLUMNS) == []  # it says nothing by what it lacks
    attacked = [{"attack": "dlg", "pairs": 5}, {"attack": "dlg"}]
    assert settings(attacked, [Column("attack")]) == [setting("pairs")]


def test_a_setting_that_another_one_tells_is_not_said_again() -> None:
    groups = [[{"a": a, "b": a % 2, "c": a * 10}] for a in range(4)]
    assert telling([setting("a"), setting("b"), setting("c")], groups) == [setting("a")]
    assert telling([setting("b")], groups) == [setting("b")]


def test_a_client_that_failed_is_a_line_of_its_own() -> None:
    failed = [row | {"error": "no answer"} for row in rows(noises=(0.0,))[:2]]
    groups, _ = summary([*rows(), *failed], COLUMNS)
    assert [len(group) for group in groups] == [5, 5, 2]


def test_the_terminal_has_80_columns_and_says_what_it_leaves_out() -> None:
    text = drawn(rows(), COLUMNS, ["A note."])
    assert "seconds" not in text
    assert "A note." in text
    assert "error norm: of the reconstruction; found: whether it was" in " ".join(text.split())
    assert "The page has all rows and columns." in " ".join(text.split())
    wide = [{f"column_{n}": 10**9 + n for n in range(12)} | {"client": 0}]
    text = drawn(wide, [Column(f"column_{n}") for n in range(12)])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "1000000000" in text
    assert "1000000011" not in text


@given(st.lists(st.text(min_size=1, max_size=90), min_size=1, max_size=6))
def test_words_of_any_length_fit_into_80_columns(words: list[str]) -> None:
    cells = [{"name": word, "attack": word * 2, "value": 0.5} for word in words]
    shown = table(cells, [setting("name"), setting("attack"), Column("value")])
    widths = [column.max_width or 0 for column in shown.columns]
    assert sum(widths) + len(widths) - 1 <= WIDTH


def test_a_page_and_a_terminal_have_the_same_cells_and_the_page_is_escaped() -> None:
    evil = [[{"word": "<script>", "value": 1e-9, "mark": 0}]]
    columns = [
        Column("word"),
        Column("value", "<b>"),
        Column("mark", of=lambda rows: Html("<mark>x</mark>")),
        Column("won", of=lambda rows: Alarm("1 of <1>")),
        Column("empty"),
    ]
    page = listing(evil, columns)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<mark>x</mark>" in page
    assert "leak'>1 of &lt;1&gt;" in page
    assert "empty" not in page
    assert "1.0e-09" in page
    assert legend(columns, evil) == "value: <b>"  # whoever puts it on a page escapes it


def test_numbers_are_written_alike_everywhere() -> None:
    assert [said(value) for value in (0.05, 1e-5, True, None, "x", 12)] == ["0.05", "1.0e-05", "yes", "–", "x", "12"]
    assert (said(0.25, ".0%"), said(1, ".0%"), said(8, "g"), said(1e-4, "g")) == ("25%", "100%", "8", "0.0001")
    assert [len(group) for group in grouped(rows(), [setting("noise")])] == [5, 5]
