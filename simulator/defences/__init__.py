"""One defence a file: what it does, how it is written, what may be known of it, and what it guarantees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtap.simulator.registry import Registry

if TYPE_CHECKING:
    from fedtap.simulator.defences.defence import Defence

DEFENCES: Registry[Defence] = Registry(
    "defence", "fedtap.simulator.defences", "fedtap.defences", "fedtap.simulator.defences.defence:Defence"
)
"""Name, as it is written -> defence."""
