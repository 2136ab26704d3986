"""A scenario's options: annotated fields, from which the command line, the help and Flower's run config are derived."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
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
            if name not in annotated and "Annotated[" in str(text):
                annotated[name] = eval(text, vars(sys.modules[owner.__module__])) if isinstance(text, str) else text
    found: dict[str, Known] = {}
    for field in dataclasses.fields(scenario):
        hint = annotated.get(field.name)
        if hint is None or get_origin(hint) is not Annotated:
            continue
        kind, option = get_args(hint)[:2]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        values = field.metadata.get("sweep", (field.default,))
        found[field.name] = Known(field.name, str if choices else kind, choices, option, values)
    return found
