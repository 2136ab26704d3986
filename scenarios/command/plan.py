"""From a scenario's name and options, on a command line or in Flower's run config, to the settings to be played."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.command.options import combinations
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import options_of
from fedtap.simulator.scenario import Scenario

if TYPE_CHECKING:
    from flwr.app import UserConfig

RUN_OPTIONS = ("device", "data-root", "out", "overwrite")
"""What is said of a run in Flower's run config that is no option of the scenario."""


def scenario_named(name: str) -> type[Scenario]:
    """The scenario of this name, or that of a user's own package, `module:Class`.

    Raises:
        FedtapError: there is none, or it cannot be imported.
    """
    return SCENARIOS.own(name) if ":" in name else SCENARIOS[name]


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
    once: dict[Scenario, dict[str, str]] = {}
    for setting in settings:  # a sweep may repeat a setting that does not depend on what is swept
        same, here = dataclasses.replace(setting, swept=()), dict(setting.swept)
        there = once.setdefault(same, here)
        once[same] = {option: value for option, value in there.items() if here.get(option) == value}
    return tuple(dataclasses.replace(setting, swept=tuple(swept.items())) for setting, swept in once.items())


def plan_of(config: UserConfig) -> tuple[Scenario, ...]:
    """The settings that Flower's run config asks for; its empty values mean the scenario's defaults.

    Raises:
        FedtapError: as `plan` does.
    """
    from fedtap.attackers import code_named
    from fedtap.simulator.models.registry import check_allowed

    given = {name: str(value) for name, value in config.items() if name not in RUN_OPTIONS and str(value) != ""}
    if "scenario" not in given:
        raise FedtapError('The run config names no scenario, so there is nothing to play: add scenario="first_leak".')
    # A run config may come from a stranger, over the network.
    for name in (
        *filter(None, [given["scenario"] if ":" in given["scenario"] else ""]),
        *code_named(given.get("attack", "")),
    ):
        check_allowed(name)
    settings = _plan_of(given.pop("scenario"), tuple(sorted(given.items())))
    for name in models_of(settings):
        check_allowed(name)
    return settings


def models_of(settings: Sequence[Scenario]) -> list[str]:
    """The models that these settings name, and that their attacks assume: each may be code to import."""
    from fedtap.attackers import models_named

    named = [model for setting in settings if isinstance(model := getattr(setting, "model", None), str)]
    named += [model for setting in settings for attack in setting.attacks for model in models_named(attack)]
    return list(dict.fromkeys(named))


@lru_cache(maxsize=8)
def _plan_of(name: str, options: tuple[tuple[str, str], ...]) -> tuple[Scenario, ...]:
    return plan(name, dict(options))
