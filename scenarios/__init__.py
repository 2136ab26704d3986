"""One question a file, in the folder of the leak that it is about."""

from __future__ import annotations

from fedtap.simulator.registry import Registry
from fedtap.simulator.scenario import Scenario

SCENARIOS: Registry[Scenario] = Registry(
    "scenario", "fedtap.scenarios", "fedtap.scenarios", "fedtap.simulator.scenario:Scenario"
)
"""Name on the command line -> scenario."""
