"""How soon does a client that sends the same batch again and again wear out its noise?

Expect: the mean of n answers has noise of σ/√n, so a hundred repetitions give an attacker ten times less of it, and the
picture comes back; ε of all of them together grows about as n where it is large, which says the same. The server sends
the same weights again, which an honest one would not, and asks for no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtap.scenarios.gradients.promises import Promising
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class Repeat(Promising):
    """One batch, one set of weights, fresh noise in each round; the attacker averages what it observes."""

    tried: ClassVar[str] = "exact_git"
    repeats: int = sweep(1, 3, 10, 30, 100)
    victims: int = 4
    defence: str = "clip(10.0)+noise(0.002)"
