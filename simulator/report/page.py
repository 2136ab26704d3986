"""What a run leaves for people: one page for every kind of leak, with nothing fetched from anywhere.

The answer comes first, then one chart, the first victims' pictures, the tables, what was expected, the threat model and
the settings; what few readers need is folded.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from rich.table import Table

from fedtap.simulator.files import write_atomically
from fedtap.simulator.report.columns import Column, Group, legend, listing, single, summary
from fedtap.simulator.report.papers import Paper, papers_html
from fedtap.simulator.report.pictures import Picture, gallery, strip
from fedtap.simulator.report.script import SCRIPT

REASONS = 3
"""Reasons of failures that are given, at most."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --pale: #666d7a; --line: #dfe2e8; --paper: #fff; --panel: #f6f7f9;
  --alarm: #b3261e; --mark: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --pale: #9aa1ae; --line: #343943; --paper: #15171b;
  --panel: #1d2025; --alarm: #ff8a80; --mark: #f0c35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 8px 24px 96px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 1.5em 0 .6em; letter-spacing: -.01em; }
p { max-width: 46em; margin: .5em 0; white-space: pre-line; overflow-wrap: break-word; }
.lead { font-size: 1.15rem; max-width: 62em; }
.pale { color: var(--pale); font-size: .875rem; } .leak { color: var(--alarm); font-weight: 600; }
.answer { border-left: 4px solid var(--ink); padding: 0 0 0 16px; margin: .8em 0; line-height: 1.45;
  font-size: .95rem; }
.answer p { max-width: none; margin: .25em 0; } .answer + h2 { margin-top: 1em; }
.banner { border: 2px solid var(--alarm); border-radius: 10px; padding: 4px 14px; margin: .8em 0; }
.banner p { font-size: .875rem; max-width: none; margin: .2em 0; }
summary { cursor: pointer; padding: 6px 0; font-weight: 600; } details { margin: 1em 0; }
.figure { overflow-x: auto; } .figure svg { min-width: 700px; max-width: 780px; color: var(--pale); }
.figure svg.panels { min-width: 900px; max-width: 1000px; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.scroll { position: relative; overflow: auto; max-height: 70vh; margin: 1em 0;
  border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 6px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--panel); font-weight: 600; z-index: 1; vertical-align: bottom;
  white-space: normal; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: inherit; cursor: pointer; }
th button { text-decoration: underline dotted var(--pale); text-underline-offset: 3px; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
:is(button, input, summary, .scroll, .figure):focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
.keep { margin: 0; font-size: .8rem; }
.keep :is(button, a) { color: var(--pale); text-decoration: underline; margin-right: 1em; }
.slides { position: relative; display: block; max-width: 144px; margin: 0 auto 4px; }
.slides img:last-child { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--shown, 0%)) 0 0); }
input[type=range] { display: block; width: 100%; max-width: 144px; margin: 0 auto 2px; accent-color: var(--mark); }
.filter { margin: 1em 0 -.5em; font-size: .875rem; color: var(--pale); }
.filter input { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--pale);
  border-radius: 6px; padding: 4px 8px; margin-right: 1em; width: 16em; max-width: 100%; }
tr:last-child td { border-bottom: 0; } .number { text-align: right; }
td.words, td.sentence { white-space: normal; min-width: 13em; } td.sentence { min-width: 18em; }
.many :is(th, td) { white-space: normal; padding: 7px 4px; } .many td.words { min-width: 7em; }
.many { font-size: .8rem; } .most { font-size: .7rem; }
.most :is(th, td) { padding: 6px 2px; } .most td.words { min-width: 6em; overflow-wrap: anywhere; }
td.number span { white-space: nowrap; }
.pictures td, .pictures th { border: 0; text-align: center; vertical-align: top; padding: 6px 8px;
  white-space: normal; }
.pictures { table-layout: fixed; } .pictures :is(th, td):first-child { width: 7.5em; }
.pictures thead th { vertical-align: bottom; overflow-wrap: anywhere; }
.pictures tbody th { position: static; background: none; text-align: left; color: var(--pale); font-weight: 400;
  white-space: pre-line; overflow-wrap: anywhere; }
.pictures img { display: block; width: 100%; max-width: 144px; margin: 0 auto 4px; border-radius: 4px; }
.many :is(img, .slides, input) { max-width: 216px; } .whole :is(img, .slides, input) { max-width: 480px; }
.pixels { image-rendering: pixelated; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 0; font-size: .9rem; }
dt { color: var(--pale); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; font-family: ui-monospace, monospace; }
dl.papers dd { font-family: inherit; } dd a { color: inherit; }
pre { margin: 0; padding: 10px 12px; font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 10px; background: var(--panel); }
svg { display: block; width: 100%; height: auto; }
@media (max-width: 600px) { main { padding: 8px 16px 64px; } h1 { font-size: 1.5rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 8px; } }
.dots { position: relative; display: block; width: 112px; height: 26px; border-bottom: 1px solid var(--line); }
.dots i { position: absolute; width: 6px; height: 6px; margin: -3px; border-radius: 3px; background: var(--ink);
  opacity: .35; }
.dots b { position: absolute; top: 2px; bottom: 0; border-left: 2px solid var(--mark); }
@page wide { size: landscape; }
@media print { main { padding: 0; } .scroll { max-height: none; overflow: visible; }
  input[type=range], .keep, .filter { display: none; }
  :is(th, td, .many th, .many td) { padding: 2px; white-space: normal; } table { font-size: .6rem; }
  .many { font-size: .5rem; } .scroll:has(.most) { page: wide; } tr { break-inside: avoid; } .dots { width: 64px; }
  :is(td.words, td.sentence, .pictures, .figure svg, .figure svg.panels) { min-width: 0 !important; } }
"""


@dataclass(frozen=True)
class Page:
    """What a run was, and what is to be shown of it: in words, but for columns, charts and pictures."""

    title: str
    question: str
    """What is asked; after an empty line, what its author expects."""
    threat: str
    """Who observes, and what they know."""
    settings: Mapping[str, object]
    environment: Mapping[str, object]
    finished: bool = True
    columns: Sequence[Column] = ()
    charts: Mapping[str, str] = field(default_factory=dict)
    """Heading -> an element of the page, in HTML or SVG."""
    pictures: Sequence[Picture] = ()
    answers: Sequence[str] = ()
    """What the rows say, in sentences."""
    alarms: Sequence[str] = ()
    """What has to be known before a figure is believed, beside what `failures` says."""
    notes: Sequence[str] = ()
    """What is said below the tables."""
    beside: Sequence[Table] = ()
    """Tables that a terminal shows beside that of the rows."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Setting -> its default in words: the page folds what is left at it."""
    command: str = ""
    """The command line that gives the rows, for a shell; empty where there is none."""
    papers: Mapping[str, Sequence[Paper]] = field(default_factory=dict)
    """Attack or defence -> the papers that it comes from."""


def write(folder: Path, page: Page, rows: Group) -> None:
    """`report.html` and `rows.csv` in this folder, and `strip.png` where there are pictures.

    Raises:
        FedtapError: the folder cannot be written.
    """
    if page.pictures:
        write_atomically(folder / "strip.png", strip(page.pictures))
    write_atomically(folder / "rows.csv", as_csv(rows).encode(errors="replace"))
    write_atomically(folder / "report.html", html(page, rows, files=_ROWS).encode())


def html(page: Page, rows: Group, files: str = "") -> str:
    """The page of these rows.

    Args:
        files: where else they are, in HTML.
    """
    question, _, expected = page.question.partition("\n\n")
    unfinished = ["This run is not finished: the page is about what was done by then."] * (not page.finished)
    tables = {"Summary": summary(rows, page.columns), "Every row": single(rows, page.columns)}
    tables = {heading: made for heading, made in tables.items() if made[0]}
    shown = dict.fromkeys(column for _, columns in tables.values() for column in columns)
    told = legend(shown, [group for groups, _ in tables.values() for group in groups])
    below = [f"<p class='pale'>{escape(note)}</p>" for note in (told, *page.notes) if note]
    charts = list(page.charts.items())
    first = next((number for number, (_, chart) in enumerate(charts) if "<svg" in chart), None)
    headline = [] if first is None else [charts.pop(first)]
    sections = [
        f"<h1>{escape(page.title)}</h1>",
        f"<p class='lead'>{escape(question)}</p>",
        _box("banner", "Read this first", [f"⚠ {said}" for said in (*unfinished, *failures(rows), *page.alarms)]),
        _box("answer", "Answer", page.answers),
        *(f"<h2>{escape(heading)}</h2>{_figure(heading, chart)}" for heading, chart in headline),
        gallery(page.pictures),
        *(f"<h2>{escape(heading)}</h2>{chart}" for heading, chart in charts if "<svg" not in chart),
        *(_folded(heading, _figure(heading, chart)) for heading, chart in charts if "<svg" in chart),
        *(f"<h2>{heading}</h2>{listing(*made, heading)}" for heading, made in tables.items()),
        files,
        *below,
        f"<h2>What was expected</h2><p>{escape(expected)}</p>" if expected else "",
        f"<h2>Threat model</h2><p>{escape(page.threat)}</p>",
        f"<h2>Papers</h2>{papers_html(page.papers)}" if page.papers else "",
        f"<h2>Settings</h2>{_settings(page)}",
        f"<h2>Command</h2><pre class='copied'>{escape(page.command)}</pre>" if page.command else "",
        _folded("Environment", _definitions(page.environment)),
    ]
    whole = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>fedtap: {escape(page.title)}</title><style>{_STYLE}</style></head><body><main>"
        "<p class='pale'>fedtap: what a federation's server can learn from what its clients send</p>"
        + "\n".join(filter(None, sections))
        + f"</main><script>{SCRIPT}</script></body></html>\n"
    )
    return whole.encode(errors="replace").decode()  # the name of a file need not be text


def as_csv(rows: Group) -> str:
    """The rows as a table for spreadsheets: a column for each name, and lists and mappings as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    for row in rows:
        values = (row.get(name) for name in names)
        table.writerow(["" if value is None else _plain(value) for value in values])
    return text.getvalue()


def _plain(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    if isinstance(value, list | dict):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


_ROWS = "<p class='keep'>All rows, with every column: <a href='rows.jsonl'>JSON</a> <a href='rows.csv'>CSV</a></p>"


def failures(rows: Group) -> list[str]:
    """A sentence about the rows that hold no result, with reasons; none where there are none."""
    failed = [row for row in rows if isinstance(row.get("error"), str)]  # a number is a result: how far it is off
    told = (": ".join(filter(None, (row.get("attack") or row.get("leak"), row["error"]))) for row in failed)
    reasons = "; ".join(list(dict.fromkeys(told))[:REASONS])
    return [f"{len(failed)} of {len(rows)} rows hold no result, so shares are of the others: {reasons}"] * bool(failed)


def _box(kind: str, heading: str, sentences: Sequence[str]) -> str:
    """A heading and its sentences; nothing where there are none."""
    body = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f"<section class='{kind}'><b>{heading}</b>{body}</section>" if body else ""


def _figure(heading: str, chart: str) -> str:
    """A chart in a box that scrolls where a screen is too narrow for its words."""
    return f"<div class='figure' role='region' tabindex='0' aria-label='{escape(heading)}'>{chart}</div>"


def _folded(heading: str, body: str) -> str:
    return f"<details><summary>{escape(heading)}</summary>{body}</details>"


def _settings(page: Page) -> str:
    """The settings that are not at their defaults; the others are folded."""
    usual = {name: text for name, text in page.settings.items() if page.defaults.get(name) == str(text)}
    chosen = {name: text for name, text in page.settings.items() if name not in usual}
    told = _definitions(chosen) if chosen else "<p>Every setting is at its default.</p>"
    heading = "1 setting at its default" if len(usual) == 1 else f"{len(usual)} settings at their defaults"
    return told + (_folded(heading, _definitions(usual)) if usual else "")


def _definitions(words: Mapping[str, object]) -> str:
    lines = (f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(text))}</dd>" for name, text in words.items())
    return f"<dl>{''.join(lines)}</dl>"
