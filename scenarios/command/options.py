"""A scenario's options on the command line: words to values, and every combination of values that are to be tried."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedtap.simulator.data import DATASETS
from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.files import exists
from fedtap.simulator.options import Known, Option

RENAMED = {
    "world": "dataset",
    "victims_world": "target_dataset",
    "victims_classes": "target_classes",
    "listener": "threat_model",
    "practice": "auxiliary",
    "practice_labels": "auxiliary_labels",
    "practice_classes": "auxiliary_classes",
    "source": "auxiliary_source",
    "drifts": "auxiliary_trainings",
    "practised": "auxiliary_at",
    "attacker": "trained_attack",
    "steps": "local_steps",
    "games": "trials",
    "sabotage": "broken_mechanism",
    "start_off": "start_near_truth",
}
"""Options of fedtap 0.1, and what they are called now."""

MOST_SETTINGS = 10_000
"""Combinations of values in a run, at most."""


def pairs(words: list[str]) -> dict[str, str]:
    """`--option value` and `--option=value` as a mapping."""
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            raise FedtapError(
                f"{short(word)!r} belongs to no option: write --option value, and several values joined by commas."
            )
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and (found := next(rest, None)) is not None:
            value = found
        elif not equals:
            raise FedtapError(f"--{short(name)} has no value: write --{short(name)} value.")
        if name in options:
            both = f"{short(options[name], 30)},{short(value, 30)}"
            raise FedtapError(f"--{short(name)} is given twice: join values to try by commas, --{short(name)} {both}.")
        options[name] = value
    return options


def options_text(options: Mapping[str, Any]) -> str:
    """Options in one string, as on a command line: `shlex.split` and `pairs` read it."""
    return shlex.join(f"--{_flag(name)}={_word(value)}" for name, value in options.items())


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)


def absolute(known: Mapping[str, Known], given: Mapping[str, str]) -> dict[str, str]:
    """The options given, with the names of files and folders that hold in any folder and on any engine."""
    found = {name.replace("-", "_"): value for name, value in given.items()}
    for name, value in found.items():
        if name in known and known[name].option.file:
            option = known[name].option
            found[name] = ",".join(_absolute(word.strip(), option) for word in _words(value, option))
    return found


def _absolute(word: str, option: Option) -> str:
    path = Path(word)
    return str(path.resolve()) if word and word not in DATASETS and (option.made or exists(path)) else word


def combinations(known: Mapping[str, Known], given: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Every combination of the values given or swept by default: fields of a scenario, and in words the swept ones.

    Raises:
        FedtapError: there is no such option, or a value is of the wrong type or out of range.
    """
    words = {name.replace("-", "_"): value for name, value in given.items()}
    for name in words:
        if name in RENAMED and name not in known:
            raise FedtapError(f"--{_flag(name)} is called --{_flag(RENAMED[name])} since fedtap 0.2: write that.")
        if name not in known:
            raise unknown("option", f"--{_flag(name)}", [option.flag for option in known.values()])
    choices = {name: list(option.values) for name, option in known.items()}
    for name in words:
        option = known[name]
        choices[name] = [_value(option, word) for word in _words(str(words[name]), option.option)]
    swept = [name for name, values in choices.items() if len(values) > 1]
    if (many := math.prod(map(len, choices.values()))) > MOST_SETTINGS:
        raise FedtapError(
            f"The values of --{', --'.join(swept[:4])} make {many:,} combinations, and a run plays {MOST_SETTINGS:,} "
            f"at "
            "most: give fewer values."
        )
    named = [name for name in choices if name in words or name in swept]  # the others keep the class's own defaults
    chosen = [dict(zip(named, one, strict=True)) for one in itertools.product(*(choices[name] for name in named))]
    return [(values, {name: str(values[name]) for name in swept}) for values in chosen]


def _words(text: str, option: Option) -> list[str]:
    """The values between the commas; a comma inside brackets is part of a value, and so is one in a file's name."""
    if option.single or (option.file and exists(Path(text))):
        return [text]
    return between_commas(text)


def between_commas(text: str) -> list[str]:
    """The words between the commas that stand outside brackets."""
    words, depth = [""], 0
    for letter in text:
        depth = max(0, depth + (letter in "([") - (letter in ")]"))
        if letter == "," and not depth:
            words.append("")
        else:
            words[-1] += letter
    return words


def _value(known: Known, word: str) -> Any:
    word, option = word.strip(), known.option
    if not word:
        raise FedtapError(
            f"{known.flag} has an empty value, and an option needs one ({option.help}): leave it out for the default."
        )
    try:
        value = known.type(word)
    except ValueError as error:
        raise FedtapError(
            f"{known.flag} {short(word)!r} is not {_KINDS[known.type]}, which it needs to be ({option.help})."
        ) from error
    if known.choices and value not in known.choices:
        raise unknown(known.flag.removeprefix("--"), word, known.choices)
    if isinstance(value, int | float) and not option.low <= value <= option.high:
        upper = "" if option.high == math.inf else f" and at most {option.high:g}"
        raise FedtapError(
            f"{known.flag} {short(word)} is out of range ({option.help}): it is at least {option.low:g}{upper}."
        )
    return value


def _flag(name: str) -> str:
    return name.replace("_", "-")


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text"}
