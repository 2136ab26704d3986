"""`fedtap show RUN`, `open RUN`, `compare A B` and `index DIR`: what runs left, read again."""

from __future__ import annotations

import dataclasses
import math
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtap.scenarios import SCENARIOS
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.options import options_of
from fedtap.simulator.report.columns import NONE, Group, said
from fedtap.simulator.report.saved_run import SavedRun, read_run, runs_below
from fedtap.simulator.scenario import Scenario

if TYPE_CHECKING:
    from fedtap.simulator.report.page import Page

RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/first_leak.")]


def show_command(run: RunFolder) -> None:
    """The answer and the table of a run."""
    saved = read_run(run)
    page, rows = page_of_saved(saved)
    console = _console()
    console.print(Text(page.question.splitlines()[0] if page.question else saved.name))
    answer(console, page, rows)
    files(console, "Page", saved.path)


def open_command(run: RunFolder) -> None:
    """The page of a run, in the browser; where there is none, its path."""
    page = read_run(run, unfinished=True).path.resolve() / "report.html"
    if not page.is_file():
        raise FedtapError(f"{short(run)} has no report.html, since nothing was attacked there yet: finish the run.")
    opened = webbrowser.open(page.as_uri())
    words = "Opened" if opened else "No browser could be started here; the page is"
    _console().print(f"{words} {page}", markup=False, highlight=False, soft_wrap=True)


def compare_command(
    first: RunFolder,
    second: RunFolder,
    figure: Annotated[
        list[str] | None,
        typer.Option(
            help="A column of rows.jsonl to compare, such as ssim; again for more. The main ones unless said."
        ),
    ] = None,
) -> None:
    """Two runs: rows of the same attack and setting, and how far the second is above the first."""
    from fedtap.simulator.report.comparison import differences, options_that_differ

    one, other = read_run(first), read_run(second)
    columns = [column for run in (one, other) for column in page_of_saved(run)[0].columns]
    found = differences(one, other, columns, figure or ())
    console = _console()
    for line in options_that_differ(one, other):
        console.print(Text(line))
    table = Table(box=None, pad_edge=False)
    for heading in ("", "figure", "first", "second", "difference", "victims"):
        table.add_column(heading, justify="left" if heading in ("", "figure") else "right", no_wrap=heading != "")
    for number, one_found in enumerate(found):
        again = number and found[number - 1].label == one_found.label
        n = f"{one_found.counts[0]}" if one_found.paired else "{}, {}".format(*one_found.counts)
        table.add_row(
            Text("" if again else one_found.label),
            Text(one_found.figure.replace("_", " ")),
            said(one_found.first),
            said(one_found.second),
            Text(_difference(one_found.second - one_found.first, one_found.low, one_found.high)),
            n + (" pairs" if one_found.paired else ""),
        )
    console.print(table)
    paired = {one.paired for one in found}
    how = ["of the mean difference over the same victims"] * (True in paired)
    how += ["Welch's, over other victims"] * (False in paired)
    console.print(Text(f"Means over victims; second less first, with the 95 % interval {', or '.join(how)}."))


def index_command(
    folder: Annotated[Path, typer.Argument(help="Runs in it and below it are listed.")] = Path("runs"),
) -> None:
    """A table of all runs in a folder and below it."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "scenario", "dataset", "attacks", "finished", "figure"):
        table.add_column(heading, overflow="fold")
    for run in runs_below(folder):
        if isinstance(run, SavedRun):
            table.add_row(*map(Text, _line(folder, run)))
        else:
            table.add_row(Text(str(run)), style="red")
    if not table.rows:
        raise FedtapError(
            f"There is no run in {short(folder)} or below it: name a folder in which runs are, or play one."
        )
    _console().print(table)


def page_of_saved(run: SavedRun) -> tuple[Page, Group]:
    """The page of a run's rows, as far as rows tell: columns, charts and answers; and the rows that tables show.

    A scenario of a user's own package is not imported for it, since what is read from a file names no code.
    """
    from fedtap.simulator.report.page import Page
    from fedtap.simulator.saved_leak import columns_of_found

    page = Page(run.name, str(run.about.get("question", "")), "", {}, {}, finished=run.finished)
    if (setting := _setting(run)) is not None:
        return setting.shown_on(page, run.rows)
    if any(row.get("levels") for row in run.rows):
        from fedtap.simulator.report.images import page_of

        return page_of(page, run.rows)
    return dataclasses.replace(page, columns=columns_of_found(run.rows)), run.rows


def _setting(run: SavedRun) -> Scenario | None:
    """The run's scenario with its options, as far as run.json holds them; None where it or an attack is not ours."""
    from fedtap.attackers import code_named

    values = run.options
    if run.name not in SCENARIOS or any(code_named(str(one)) for one in values.get("attack", ())):
        return None
    kind = SCENARIOS[run.name]
    known = options_of(kind)
    first: dict[str, Any] = {
        name: known[name].type(found[0])
        for name, found in values.items()
        if name in known and isinstance(found[0], int | float | str) and type(found[0]) is not bool
    }
    swept = tuple((name, str(found[0])) for name, found in values.items() if name in known and len(found) > 1)
    try:
        return kind(**first, name=run.name, swept=swept)
    except (TypeError, ValueError) as error:
        raise FedtapError(
            f"The settings in {short(run.path / 'run.json')} are none of {run.name} ({short(error)}): play it again."
        ) from error


def answer(console: Console, page: Page, rows: Group) -> None:
    """The answers in sentences, what has to be known first, and the tables."""
    from fedtap.simulator.report.columns import table
    from fedtap.simulator.report.page import failures

    for sentence in (*page.answers, *(f"⚠ {alarm}" for alarm in (*failures(rows), *page.alarms))):
        console.print(sentence, highlight=False, markup=False, emoji=False)
    console.print(table(rows, page.columns, page.notes))
    for other in page.beside:
        console.print(other)


def files(console: Console, what: str, out: Path) -> None:
    """Where a run's page and its figures are."""
    text = f"{what}: {out / 'report.html'}   figures: {out / 'rows.jsonl'}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _line(folder: Path, run: SavedRun) -> list[str]:
    where = str(run.path.relative_to(folder)) if run.path != folder else str(run.path)
    attacks = dict.fromkeys(str(row["attack"]) for row in run.rows if row.get("attack"))
    datasets = dict.fromkeys(Path(str(row["dataset"])).name for row in run.rows if row.get("dataset"))
    cells = (where, run.name, ", ".join(datasets), ", ".join(attacks), "yes" if run.finished else "no", _best(run))
    return [cell or NONE for cell in cells]


def _best(run: SavedRun) -> str:
    """Of images the highest median PSNR of an attack in a setting; of other leaks the first figure, over all groups."""
    from fedtap.simulator.report.columns import grouped, setting, settings
    from fedtap.simulator.report.images import chosen
    from fedtap.simulator.report.outcomes import median, outcome, psnrs

    attacked = [row for row in run.rows if row.get("attack")]
    groups = grouped(attacked, [setting("attack"), *chosen(attacked)])
    ranked = [(value, some) for some in groups if (value := median(psnrs(some))) is not None]
    if ranked:
        value, some = max(ranked, key=lambda one: one[0])
        back = outcome(some)
        share = f", {back.won} of {back.images} {back.measure}" * bool(back.images)
        return f"{some[0]['attack']}: {value:.1f} dB{share}"
    try:
        page, rows = page_of_saved(run)
    except FedtapError:
        return ""
    for column in page.columns:
        if column.over not in ("median", "mean", "share") or column.page:
            continue
        groups = grouped(rows, settings(rows, page.columns))
        values = [value for some in groups if isinstance(value := column.value(some), int | float)]
        if values:
            ends = dict.fromkeys((said(min(values), column.form), said(max(values), column.form)))
            return f"{column.title} {' to '.join(ends)}"
    return ""


def _difference(middle: float, low: float, high: float) -> str:
    interval = "" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]"
    return f"{middle:+.3g}{interval}"


def _console() -> Console:
    return Console(emoji=False)


COMMANDS_ON_RUNS: Sequence[tuple[str, Any]] = (
    ("show", show_command),
    ("open", open_command),
    ("compare", compare_command),
    ("index", index_command),
)
"""Each command, and what it does."""
