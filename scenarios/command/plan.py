"""From a scenario's name and options, on a command line or in Flower's run config, to the settings to be played."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.command.options import combinations, pairs
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.options import options_of
from fedtap.simulator.scenario import Scenario

if TYPE_CHECKING:
    from flwr.app import UserConfig

RUN_KEYS = ("scenario", "options", "data-root", "out", "device", "overwrite", "reply-timeout")
"""Keys of Flower's run config."""


def scenario_named(name: str) -> type[Scenario]:
    """The scenario of this name, or that of a user's own package, `module:Class`.

    Raises:
        FedtapError: there is none, it cannot be imported, or it is not a whole one.
    """
    kind = SCENARIOS.own(name) if ":" in name else SCENARIOS[name]
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise FedtapError(
            f"{kind.__name__} in {short(kind.__module__)} does not say {short(', '.join(missing), 80)}, and a scenario "
            "needs each: write them, or begin with a subclass of ImageScenario."
        )
    return kind


def plan(name: str, options: Mapping[str, Any]) -> tuple[Scenario, ...]:
    """The settings, in the order in which they are played: those of each combination of swept options.

    Raises:
        FedtapError: there is no such scenario or option, or a value that it cannot take.
    """
    kind = scenario_named(name)
    given = tuple(sorted(word.replace("-", "_") for word in options))
    settings: list[Scenario] = []
    for values, swept in combinations(options_of(kind), options):
        for setting in kind(**values, name=name, given=given).settings():
            settings.append(dataclasses.replace(setting, name=name, given=given, swept=tuple(swept.items())))
    if not settings:
        raise FedtapError(f"Nothing is left of {name} to be played with these options: leave some of them out.")
    once: dict[Scenario, tuple[Scenario, dict[str, str]]] = {}
    for setting in settings:  # a sweep may repeat a setting that does not depend on what is swept
        spent: Any = {option: getattr(type(setting), option) for option in setting.spent}
        same = dataclasses.replace(setting, swept=(), **spent)
        first, there = once.setdefault(same, (setting, dict(setting.swept)))
        here = dict(setting.swept)
        once[same] = first, {option: value for option, value in there.items() if here.get(option) == value}
    return tuple(dataclasses.replace(setting, swept=tuple(swept.items())) for setting, swept in once.values())


def plan_of(config: UserConfig) -> tuple[Scenario, ...]:
    """The settings that Flower's run config asks for: `scenario="first_leak"` and `options="--victims 3 --seed 1"`.

    Raises:
        FedtapError: as `plan` does; the run config has other keys than RUN_KEYS, or names code that this host does not
            allow.
    """
    from fedtap.simulator.models.registry import check_allowed

    name, options = str(config.get("scenario") or ""), str(config.get("options") or "")
    if not name:
        raise FedtapError('The run config names no scenario, so there is nothing to play: add scenario="first_leak".')
    if strange := [key for key in config if key not in RUN_KEYS]:
        raise FedtapError(
            f"The run config has no key {short(strange[0])!r}: a scenario's options go into one string, "
            "options=\"--victims 3 --attack 'idlg(steps=20)'\"."
        )
    for code in code_in(name, options):  # a run config may come from a stranger
        check_allowed(code)
    settings = planned(name, options)
    for model in models_of(settings):
        check_allowed(model)
    return settings


def code_in(name: str, options: str) -> list[str]:
    """The classes of users' own packages that a scenario's name and its attacks' text name: planning imports them.

    Args:
        options: in one string, as on the command line.
    """
    from fedtap.attackers import code_named

    return [*([name] if ":" in name else []), *code_named(pairs(words_of(options)).get("attack", ""))]


def models_of(settings: Sequence[Scenario]) -> list[str]:
    """The models that these settings name, and that their attacks assume: each may be code to import."""
    from fedtap.attackers import models_named

    named = [model for setting in settings if isinstance(model := getattr(setting, "model", None), str)]
    named += [model for setting in settings for attack in setting.attacks for model in models_named(attack)]
    return list(dict.fromkeys(named))


@lru_cache(maxsize=8)
def planned(name: str, options: str) -> tuple[Scenario, ...]:
    """The settings of a scenario, its options in one string as on the command line.

    Raises:
        FedtapError: as `plan` does, or the string cannot be split into words.
    """
    return plan(name, pairs(words_of(options)))


def words_of(options: str) -> list[str]:
    """The words of a string of options.

    Raises:
        FedtapError: a quotation is not closed.
    """
    try:
        return shlex.split(options)
    except ValueError as error:
        raise FedtapError(
            f"The options {short(options)!r} in the run config cannot be split into words ({error}): close what is "
            "open, as in options=\"--attack 'idlg(steps=20)'\"."
        ) from error
