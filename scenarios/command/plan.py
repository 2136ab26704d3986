"""From a scenario's name and knobs, on a command line or in Flower's run config, to what is to be played."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import UserConfig

from fedtap.attackers import models_named
from fedtap.scenarios.command.options import pairs, settings
from fedtap.scenarios.gradients.game import Game
from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.federation.settings import Scenario
from fedtap.simulator.models.registry import check_allowed
from fedtap.simulator.study import Study

Part = Scenario | Study

RUN_KEYS = ("scenario", "options", "data-root", "out", "device", "overwrite")
"""Of Flower's run config: a scenario, its options in one string as on the command line, and what is said of the run."""


@lru_cache(maxsize=1)
def catalogue() -> dict[str, Callable[..., Any]]:
    """Every scenario by name: each module of this folder that defines a function `scenario`."""
    return {name: importlib.import_module(module).scenario for name, module in _modules().items()}


@lru_cache(maxsize=1)
def _modules() -> dict[str, str]:
    files = sorted(Path(__file__).parents[1].glob("*/*.py"), key=lambda file: file.stem)
    return {
        file.stem: f"fedtap.scenarios.{file.parent.name}.{file.stem}"
        for file in files
        if "\ndef scenario(" in file.read_text(encoding="utf-8")
    }


def question(name: str) -> str:
    """What the scenario asks, and what to expect: its module's docstring.

    Raises:
        FedtapError: Python has thrown docstrings away.
    """
    text = inspect.getdoc(importlib.import_module(_modules()[name]))
    if text is None:
        raise FedtapError(
            f"The question of {name} is a docstring, and this Python throws those away: unset PYTHONOPTIMIZE, and "
            "leave out -OO."
        )
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def plan(name: str, knobs: Mapping[str, Any]) -> tuple[Part, ...]:
    """The scenario's parts, in the order they are played: one for each combination of swept knobs, or as it says.

    Raises:
        FedtapError: no such scenario or knob, or a value it cannot take.
    """
    if name not in catalogue():
        raise unknown("scenario", name, catalogue())
    function = catalogue()[name]
    parts: list[Part] = []
    for values, swept in settings(function, knobs):
        made = function(**values)
        for part in made if isinstance(made, tuple) else (made,):
            if isinstance(part, Scenario):
                part = dataclasses.replace(part, fewer="victims" not in knobs)
            parts.append(dataclasses.replace(part, name=name, question=question(name), swept=tuple(swept.items())))
    if not parts:
        raise FedtapError(f"Nothing is left of {name} to be played with these knobs: leave some of them out.")
    once: dict[Part, dict[str, str]] = {}
    for part in parts:  # a sweep may repeat a part that does not depend on what is swept
        same, here = dataclasses.replace(part, swept=()), dict(part.swept)
        there = once.setdefault(same, here)
        once[same] = {knob: value for knob, value in there.items() if here.get(knob) == value}
    return tuple(dataclasses.replace(part, swept=tuple(swept.items())) for part, swept in once.items())


def sorted_out(parts: Sequence[Part]) -> tuple[tuple[Scenario, ...], tuple[Study, ...]]:
    """The parts, as what they are: all are of one kind, since they are of one file."""
    scenarios = tuple(part for part in parts if isinstance(part, Scenario))
    return scenarios, tuple(part for part in parts if isinstance(part, Study))


def plan_of(config: UserConfig) -> tuple[Part, ...]:
    """The parts that Flower's run config asks for: `scenario="first_leak"` and `options="--victims 3 --seed 1"`.

    Raises:
        FedtapError: as `plan` does, or the run config has other keys than RUN_KEYS.
    """
    name = str(config.get("scenario") or "")
    if not name:
        raise FedtapError('The run config names no scenario, so there is nothing to play: add scenario="first_leak".')
    if strange := [key for key in config if key not in RUN_KEYS]:
        raise FedtapError(
            f"The run config has no key {short(strange[0])!r}: a scenario's options go into one string, "
            "options=\"--victims 3 --attack 'idlg(steps=20)'\"."
        )
    parts = planned(name, str(config.get("options") or ""))
    for model in models_of(parts):  # a run config may come from a stranger, over the network
        check_allowed(model)
    return parts


def models_of(parts: Sequence[Part]) -> list[str]:
    """The models that these parts name, and that their attacks assume; that of a game is fedtap's own."""
    scenarios, _ = sorted_out(parts)
    named = [part.model for part in scenarios if not isinstance(part, Game)]
    named += [model for part in scenarios for attack in part.attacks for model in models_named(attack)]
    return list(dict.fromkeys(named))


@lru_cache(maxsize=8)
def planned(name: str, options: str) -> tuple[Part, ...]:
    """The scenario's parts, its options in one string as on the command line.

    Raises:
        FedtapError: as `plan` does, or the string cannot be split into words.
    """
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise FedtapError(
            f"The options {short(options)!r} in the run config cannot be split into words ({error}): close what is "
            "open, as in options=\"--attack 'idlg(steps=20)'\"."
        ) from error
    return plan(name, pairs(words))
