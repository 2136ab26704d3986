"""Refine: one attack's reconstruction is another's starting point.

A wrapper without a paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.labels import paired
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak


@dataclass(frozen=True)
class Refine(Attack):
    """The reconstruction of `start` is the starting point of `finish`, whose result is returned.

    `finish` reads the labels off the gradient in rising order, so a batch's images are handed over in the order that
    fits those labels best.
    """

    leaks = (GradientLeak, UpdateLeak)
    needs_weights = False

    start: Attack
    """The attack whose reconstruction is the starting point."""
    finish: Attack
    """The attack that starts there and gives the result."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """Both names, joined by a plus sign."""
        return f"{self.start.name} + {self.finish.name}"

    def accepts(self, leak: Leak) -> None:
        """What both accept."""
        self.start.accepts(leak)
        self.finish.accepts(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        first = self.start.reconstruct(leak, start)
        images = paired(leak, first.images.clamp(0, 1))
        return self.finish.reconstruct(leak, images.repeat_interleave(self.finish.starts, dim=0))
