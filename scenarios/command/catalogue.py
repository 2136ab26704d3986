"""What `fedtap list` shows: every name of a kind with a line about it, and one name in full."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtap.attackers import ATTACKS
from fedtap.scenarios import SCENARIOS
from fedtap.simulator.data import DATASETS
from fedtap.simulator.defences import DEFENCES
from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.models import DIFFUSION_MODELS, MODELS, TEXT_MODELS
from fedtap.simulator.registry import Registry

if TYPE_CHECKING:
    from fedtap.simulator.attack import Attack


def listed(kind: str = "") -> dict[str, dict[str, str]]:
    """Heading -> name -> a line about it, of one kind or of all; nothing is imported for it.

    Args:
        kind: one of LISTS, or empty.
    """
    lists = [LISTS[kind]] if kind else LISTS.values()
    return {heading: entries() for headings in lists for heading, entries in headings.items()}


def _own(names: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    return {**names, **more}


LISTS: dict[str, dict[str, Callable[[], dict[str, str]]]] = {
    "scenarios": {"scenario": lambda: {name: _first(SCENARIOS, name) for name in SCENARIOS}},
    "attacks": {"attack": lambda: {name: _paper(name) for name in ATTACKS}},
    "defences": {"defence": lambda: {_with_fields(DEFENCES, name): _first(DEFENCES, name) for name in DEFENCES}},
    "datasets": {
        "dataset": lambda: _own(DATASETS, {"FOLDER, FILE.zip": "your own images", "FILE.npz": "your own arrays"})
    },
    "models": {
        "model": lambda: dict(MODELS),
        "model of texts": lambda: dict(TEXT_MODELS),
        "diffusion model": lambda: dict(DIFFUSION_MODELS),
    },
}
"""Kind -> heading -> its names, each with a line about it."""

_REGISTRIES: tuple[Registry[Any], ...] = (ATTACKS, DEFENCES, SCENARIOS)

_LINES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "dataset": ("--dataset", DATASETS),
    "model of images": ("--model", MODELS),
    "model of texts": ("--model", TEXT_MODELS),
}
"""What has a line and no more: its kind -> the option that takes it, and its names."""


def in_full(console: Console, name: str, scenario: Callable[[str], None]) -> None:
    """Print all that is known of a name, of each kind that has it.

    Args:
        scenario: prints a scenario's question and options.

    Raises:
        FedtapError: nothing has this name, or it cannot be loaded.
    """
    kinds = [registry.kind for registry in _REGISTRIES if name in registry]
    lines = {kind: known for kind, known in _LINES.items() if name in known[1]}
    if not kinds and not lines:
        names = {*LISTS, *(one for registry in _REGISTRIES for one in registry)}
        raise unknown(
            "list, attack, defence, scenario, dataset or model", name, names.union(*(n for _, n in _LINES.values()))
        )
    for number, kind in enumerate([*kinds, *lines]):
        if number:
            console.print()
        if kind in lines:
            option, about = lines[kind]
            _print(console, f"{name}: a {kind}, {option} {name}", about[name])
        elif kind == "attack":
            _attack_in_full(console, name)
        elif kind == "defence":
            _defence_in_full(console, name)
        else:
            scenario(name)


def _attack_in_full(console: Console, name: str) -> None:
    kind = ATTACKS[name]
    _print(console, f"{name}: an attack, --attack {name}", ATTACKS.about(name), _docstring(kind))
    _print(console, *reads(kind))
    table = Table("hyper-parameter", "default", "meaning", box=None, pad_edge=False)
    meanings = field_docs(kind)
    for field, default in _defaults(kind).items():
        table.add_row(Text(field), Text(default), Text(meanings.get(field, "")))
    if table.rows:
        console.print("", table)


def _defence_in_full(console: Console, name: str) -> None:
    kind = DEFENCES[name]
    arguments = kind.arguments()
    written = f"{name}({', '.join(argument.name for argument in arguments)})"
    _print(console, f"{name}: a defence, --defence '{written}'", _docstring(kind).partition("\n\nArgs:")[0])
    table = Table("argument", "values", "meaning", box=None, pad_edge=False)
    meanings = field_docs(kind)
    for argument in arguments:
        table.add_row(Text(argument.name), Text(str(argument)), Text(meanings.get(argument.name, "")))
    if table.rows:
        console.print("", table)


def reads(kind: type[Attack[Any]]) -> tuple[str, ...]:
    """What an attack reads, and what it gives back, in sentences."""
    from fedtap.simulator.attack import Learner

    leaks = " or ".join(leak.__name__ for leak in kind.leaks)
    trained = " It is trained on auxiliary pairs first." * issubclass(kind, Learner)
    weights = "at weights that it has to know" if kind.needs_weights else "whether or not the weights are known"
    return (f"Reads: {leaks}, {weights}.{trained}", f"Gives back: {kind.reconstructs.__name__}.")


def field_docs(kind: type) -> dict[str, str]:
    """Field -> what it means: the docstring line below it, or its line under `Args:` in the class's docstring."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        found |= _args(owner.__doc__ or "") | dict(_below_fields(owner))
    return found


def _below_fields(owner: type) -> Iterator[tuple[str, str]]:
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # a class that Python itself made has no source
        return
    for field, below in zip(getattr(body, "body", [])[:-1], getattr(body, "body", [])[1:], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield ast.unparse(field.target), " ".join(str(below.value.value).split())


def _args(docstring: str) -> dict[str, str]:
    """Name -> its description, of the section `Args:` of a docstring."""
    section = inspect.cleandoc(docstring).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)[1:]
    pairs = (entry.partition(": ") for entry in entries)
    return {name: " ".join(text.split()) for name, _, text in pairs}


def _defaults(kind: type[Attack[Any]]) -> dict[str, str]:
    """Field -> its default, as it is written on the command line."""
    found = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        written = getattr(value, "written", None)
        if field.repr:
            found[field.name] = "(needed)" if value is dataclasses.MISSING else written() if written else repr(value)
    return found


def _docstring(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _print(console: Console, heading: str, *texts: str) -> None:
    """A heading, and below it texts whose paragraphs are filled anew."""
    console.print(Text(heading, style="bold"))
    for text in texts:
        for paragraph in text.split("\n\n"):
            console.print(Text(" ".join(paragraph.split())), highlight=False)


def _with_fields(registry: Registry[Any], name: str) -> str:
    """An entry as it is written with its arguments; its name alone where it does not load, which `_first` tells."""
    try:
        return f"{name}({', '.join(registry.fields(name))})"
    except FedtapError:
        return name


def _first(registry: Registry[Any], name: str) -> str:
    """The first paragraph of what is said of an entry, which may not load."""
    try:
        return first_paragraph(registry.about(name))
    except FedtapError as error:
        return f"[red]{short(error)}[/red]"


def first_paragraph(docstring: str) -> str:
    """A docstring's first paragraph on one line; empty where there is none."""
    return " ".join(docstring.partition("\n\n")[0].split())


def _paper(name: str) -> str:
    """An attack's paper and the folder that it is in; the attack may not load."""
    try:
        text = ATTACKS.about(name).partition("Departs")[0]
    except FedtapError as error:
        return f"[red]{short(error)}[/red]"
    return f"{' '.join(text.split())} [dim]({ATTACKS.entries[name].room})[/dim]"
