"""A scenario's options: annotated fields, from which the command line, the help and Flower's run config are derived."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args, get_origin

GROUPS = ("data", "model", "federation", "attack", "defence", "auxiliary", "scenario")
"""What options are about, in the order in which the help shows them; `scenario` is what no other one shares."""


@dataclass(frozen=True)
class Option:
    """What an option means, and which values it takes (both ends included).

    Args:
        help: in a few words.
        group: one of GROUPS.
        file: whether it may name a file or a folder, which other processes would look for in folders of their own.
        made: whether that folder is made where there is none.
        single: whether a comma is part of the value; without it, a comma separates values to try one after the other.
    """

    help: str
    low: float = -math.inf
    high: float = math.inf
    group: str = "scenario"
    file: bool = False
    made: bool = False
    single: bool = False


@dataclass(frozen=True)
class Known:
    """An option of one scenario.

    Args:
        type: int, float or str.
        choices: the values it takes, where it takes no other ones.
        values: its default; several where the scenario tries them one after the other.
    """

    name: str
    type: type
    choices: tuple[str, ...]
    option: Option
    values: tuple[Any, ...]

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return f"--{self.name.replace('_', '-')}"


def sweep(*values: Any) -> Any:
    """The default of a field whose values a scenario tries one after the other, unless others are given."""
    return dataclasses.field(default=values[0], metadata={"sweep": values})


@lru_cache(maxsize=64)
def options_of(scenario: type[Any]) -> Mapping[str, Known]:
    """Name -> option, of a dataclass: each field whose annotation has an Option, in this class or in one above it.

    A class may give an inherited option another default, `victims: int = 4`, and keeps its meaning.
    """
    annotated: dict[str, Any] = {}
    for owner in scenario.__mro__:
        for name, text in vars(owner).get("__annotations__", {}).items():
            hint = _evaluated(text, vars(sys.modules[owner.__module__]))
            if name not in annotated and get_origin(hint) is Annotated:
                annotated[name] = hint
    found: dict[str, Known] = {}
    for field in dataclasses.fields(scenario):
        if field.name not in annotated:
            continue
        kind, option = get_args(annotated[field.name])[:2]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        values = field.metadata.get("sweep", (field.default,))
        found[field.name] = Known(field.name, str if choices else kind, choices, option, values)
    return found


def command_line(name: str, values: Mapping[str, Sequence[Any]], options: Mapping[str, Known]) -> str:
    """`fedtap run NAME` with these options, quoted for a shell.

    Args:
        values: of each option that was given, all values that it has in the run, each once.
    """
    words = ["fedtap", "run", name]
    for option, several in values.items():
        words += [options[option].flag, ",".join(map(_written, several))]
    return shlex.join(words)


def _written(value: Any) -> str:
    return format(value, ".12g") if isinstance(value, float) else str(value)


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation stands for, where it is Annotated or the name of such a one; others are not evaluated, since
    what they name may be imported for types alone."""
    if not isinstance(annotation, str):
        return annotation
    return eval(annotation, names) if "Annotated[" in annotation else names.get(annotation)


ImageSource = Annotated[str, Option("photos, cifar10, a folder or zip of images, or an .npz", group="data", file=True)]
ImageSize = Annotated[
    int, Option("pixels a side that photos and the images of a folder or zip are brought to", 8, 512, "data")
]
WeightsFile = Annotated[
    str, Option(".safetensors of initial weights, in place of the seed's", group="model", file=True, single=True)
]
WeightsSeed = Annotated[int, Option("seed of the model's initial weights", 0, 2**31, "model")]
Delta = Annotated[float, Option("δ at which ε is meant", group="defence")]
"""Options that several scenarios share, each of which has its own default."""
