"""Knobs: a scenario's typed keyword arguments, as words on a command line. A knob given several values is swept."""

from __future__ import annotations

import inspect
import itertools
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fedtap.simulator.data.images import DATASETS
from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.files import exists


@dataclass(frozen=True)
class Knob:
    """What a knob means, and which values it takes (both ends included)."""

    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    path: bool = False
    """Whether it may name a file or a folder, commas and all."""
    made: bool = False
    """Whether it names a folder that is made where there is none."""
    swept: bool = True
    """Whether a comma separates values to try, one after the other."""


MOST_PARTS = 10_000
"""Combinations of swept knobs in a run, at most."""


def pairs(words: list[str]) -> dict[str, str]:
    """`--knob value` and `--knob=value` as a mapping."""
    knobs: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            raise FedtapError(
                f"{short(word)!r} belongs to no knob: write --knob value, and several values joined by commas."
            )
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and (found := next(rest, None)) is not None:
            value = found
        elif not equals:
            raise FedtapError(f"--{short(name)} has no value: write --{short(name)} value.")
        if name in knobs:
            both = f"{short(knobs[name], 30)},{short(value, 30)}"
            raise FedtapError(f"--{short(name)} is given twice: join values to try by commas, --{short(name)} {both}.")
        knobs[name] = value
    return knobs


def written(knobs: Mapping[str, Any]) -> str:
    """Knobs in one string, as on a command line: `shlex.split` and `pairs` read it."""
    return shlex.join(f"--{name.replace('_', '-')}={_word(value)}" for name, value in knobs.items())


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def absolute(function: Callable[..., Any], given: Mapping[str, str]) -> dict[str, str]:
    """The knobs given, with the names of files and folders that hold in any folder and on any engine."""
    knobs = {name: knob for name, (_, knob, _) in knobs_of(function).items()}
    found = {name.replace("-", "_"): value for name, value in given.items()}
    for name, value in found.items():
        if name in knobs and knobs[name].path:
            found[name] = ",".join(_absolute(word.strip(), knobs[name]) for word in _words(value, knobs[name]))
    return found


def _absolute(word: str, knob: Knob) -> str:
    path = Path(word)
    return str(path.resolve()) if word and word not in DATASETS and (knob.made or exists(path)) else word


def knobs_of(function: Callable[..., Any]) -> dict[str, tuple[type, Knob, Any]]:
    """Name -> (type, what it means, default) of each of a scenario's keyword arguments."""
    return {
        name: (*get_args(parameter.annotation), parameter.default)
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
    }


def settings(function: Callable[..., Any], given: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Every combination of the values given: keyword arguments, and the swept ones among them in words.

    Raises:
        FedtapError: no such knob, or a value of the wrong type or out of range.
    """
    knobs = knobs_of(function)
    words = {name.replace("-", "_"): value for name, value in given.items()}
    for name in words:
        if name not in knobs:
            raise unknown("knob", f"--{name.replace('_', '-')}", [f"--{known.replace('_', '-')}" for known in knobs])
    choices: dict[str, list[Any]] = {}
    for name, (kind, knob, default) in knobs.items():
        values = default if isinstance(default, tuple) else (default,)
        if name in words:
            values = tuple(_value(name, word, kind, knob) for word in _words(str(words[name]), knob))
        choices[name] = list(values)
    swept = [name for name, values in choices.items() if len(values) > 1]
    if (many := math.prod(map(len, choices.values()))) > MOST_PARTS:
        raise FedtapError(
            f"The values of --{', --'.join(swept[:4])} make {many:,} combinations, and a run plays {MOST_PARTS:,} at "
            "most: give fewer values."
        )
    combinations = [dict(zip(choices, chosen, strict=True)) for chosen in itertools.product(*choices.values())]
    return [(values, {name: str(values[name]) for name in swept}) for values in combinations]


def _words(text: str, knob: Knob) -> list[str]:
    """The values between the commas; a comma inside brackets is part of a value."""
    if not knob.swept or (knob.path and exists(Path(text))):
        return [text]
    words, depth = [""], 0
    for letter in text:
        depth = max(0, depth + (letter in "([") - (letter in ")]"))
        if letter == "," and not depth:
            words.append("")
        else:
            words[-1] += letter
    return words


def _value(name: str, word: str, kind: type, knob: Knob) -> Any:
    flag, word = f"--{name.replace('_', '-')}", word.strip()
    if not word:
        raise FedtapError(
            f"{flag} has an empty value, and a knob needs one ({knob.help}): leave it out for the default."
        )
    try:
        value = kind(word)
    except ValueError as error:
        raise FedtapError(
            f"{flag} {short(word)!r} is not {_KINDS[kind]}, which it needs to be ({knob.help})."
        ) from error
    if knob.choices and value not in knob.choices:
        raise unknown(flag.removeprefix("--"), word, knob.choices)
    if isinstance(value, int | float) and not knob.low <= value <= knob.high:
        upper = "" if knob.high == math.inf else f" and at most {knob.high:g}"
        raise FedtapError(f"{flag} {short(word)} is out of range ({knob.help}): it is at least {knob.low:g}{upper}.")
    return value


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text"}
