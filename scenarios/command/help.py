"""Help that goes on one screen: a scenario's question, with its options by what they are about, and the help of a
command with many options. `--help-all` shows all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from rich.console import Console, RenderableType
from rich.console import Group as RenderGroup
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

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


class ScreenCommand(TyperCommand):
    """A command whose `--help` leaves out the panel FOLDED of its options, which `--help-all` shows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, unless all options are asked for."""
        if "--help-all" in args:
            _explain_command(self, ctx, whole=True)
            ctx.exit()
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the short help."""
        _explain_command(self, ctx, whole=False)


FOLDED = "the client's training"
"""Panel of options that the short help of a command names, and does not explain."""


def _explain_command(command: TyperCommand, context: Any, whole: bool) -> None:
    """A command's purpose, and its options by their panels: those without one first."""
    panels: dict[str, list[Any]] = {}
    for parameter in command.get_params(context):
        panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(parameter)
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for panel, parameters in panels.items():
        if panel == FOLDED and not whole:
            continue
        if panel:
            table.add_row(Text(panel, style="bold"))
        for parameter in parameters:
            table.add_row(_usage(parameter), Text(_meaning(parameter)))
    table.add_row("--help-all", Text("Show this message with all options, and exit."))
    console = Console()
    purpose, usage = " ".join((command.help or "").split()), " ".join(command.collect_usage_pieces(context))
    console.print(RenderGroup(Text(purpose), Text(f"\n{context.command_path} {usage}", style="bold"), table))
    if not whole:
        rest = " ".join(parameter.opts[0] for parameter in panels[FOLDED])
        console.print(Text(f"With their meaning by --help-all: {rest}"))


def with_arguments_told(command: Any) -> Any:
    """The command with the help of its arguments, and of its commands': typer sets it, and click 8.5 forgets it."""
    for one in getattr(command, "commands", {}).values():
        with_arguments_told(one)
    hints = get_type_hints(command.callback, include_extras=True) if command.callback else {}
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            parameter.help = get_args(hints[parameter.name])[1].help
    return command


def _usage(parameter: Any) -> Text:
    """A parameter as it is written on the command line."""
    if parameter.param_type_name == "argument":
        return Text(parameter.name.upper())
    kind = parameter.type.name.partition(" ")[0]
    takes = "" if kind == "boolean" else {"integer": "N", "float": "NUMBER"}.get(kind, kind.upper())
    return Text(" ".join([", ".join([*parameter.opts, *parameter.secondary_opts]), takes]).strip())


def _meaning(parameter: Any) -> str:
    """Its help, with its default where that says something."""
    plain = isinstance(parameter.default, int) and not isinstance(parameter.default, bool)
    return f"{parameter.help or ''} [{parameter.default}]" if plain else parameter.help or ""


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
