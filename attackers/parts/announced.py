"""What an attack knows of the defence: what the protocol announces."""

from __future__ import annotations

import re

from simulator.leaks import Protocol


def sigma(protocol: Protocol) -> float:
    """Standard deviation of the noise on each entry of the gradient; 0 where none is announced."""
    found = re.fullmatch(r"\s*noise\((.*)\)\s*", protocol.defence)
    return float(found[1]) if found else 0.0
