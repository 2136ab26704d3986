"""A scenario's help: its question, and its options by what they are about; the short one goes on one screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.console import Group as RenderGroup
from rich.table import Table
from rich.text import Text

from fedtap.scenarios.command.plan import scenario_named
from fedtap.simulator.options import GROUPS, Known, options_of
from fedtap.simulator.scenario import Scenario, question_of

_COMMON = ("seed", "attack", "victims", "batch", "local_steps", "rounds", "model", "dataset", "defence", "threat_model")
"""Options of federations that the short help has; beside them it has those that no other scenario shares, and those
whose default is the scenario's own."""

_MOST_LINES = 45
"""Of the short help, on a terminal of 80 columns: one screen."""


def explain(name: str, whole: bool = False) -> None:
    """A scenario's question and its options, by what they are about.

    Args:
        whole: all options; without it, those that are used most, as many as go on one screen, and the others' names.
    """
    console, scenario = Console(), scenario_named(name)
    known = options_of(scenario)
    own = vars(scenario).get("__annotations__", {})
    shown = [
        option
        for option in known.values()
        if whole or option.name in (*_COMMON, *own) or option.option.group == "scenario"
    ]
    while True:
        told = _help(name, scenario, shown, [option for option in known.values() if option not in shown])
        with console.capture() as captured:
            console.print(told, width=min(console.width, 80))
        if whole or len(captured.get().splitlines()) <= _MOST_LINES:
            break
        shared = [option for option in shown if option.option.group != "scenario" and option.name != "attack"]
        shown.remove((shared or shown)[-1])
    console.print(told)


def _help(name: str, scenario: type[Scenario], options: Sequence[Known], others: Sequence[Known]) -> RenderGroup:
    """What the help shows: question, options by groups, output options, and the names of the other options."""
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for group in reversed(GROUPS):
        here = [option for option in options if option.option.group == group]
        if here:
            table.add_row(f"[bold]{group}[/bold]")
        for option in here:
            kind = "NAME" if option.choices else _KINDS[option.type]
            values = ",".join(map(str, option.values))
            about = f"{option.option.help}: {', '.join(option.choices)}" if option.choices else option.option.help
            table.add_row(f"{option.flag} {kind}", Text(f"{about} [{values or 'as the scenario says'}]"))
    table.add_row("[bold]output[/bold]")
    for flag, default, help in _OUTPUT:
        table.add_row(flag, Text(f"{help} [{default}]" if default else help))
    parts: list[RenderableType] = [Text(question_of(scenario)), Text(f"\nfedtap run {name}", style="bold"), table]
    if others:
        parts.append(Text(f"With their meaning by --help-all: {' '.join(option.flag for option in others)}"))
    return RenderGroup(*parts)


_KINDS = {int: "N", float: "NUMBER", str: "TEXT"}
"""What an option takes, in the help."""

_OUTPUT = (
    ("--out DIR", "runs/NAME", "folder for what the run leaves"),
    ("--data-root DIR", "data", "folder that holds the data sets"),
    ("--device cpu|cuda|cuda:N", "cuda if there is one", "where attacks run"),
    ("--film", "", "film iterative attacks, for the page and as GIF"),
    ("--parallel N", "1", "processes among which the values of a sweep are dealt"),
    ("--resume", "", "go on with the run that is in the folder"),
    ("--overwrite", "", "replace a run with other settings in the folder"),
)
"""Options that every scenario has."""
