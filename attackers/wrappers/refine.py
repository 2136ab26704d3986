"""Refine: hand one attack's guess to another as its starting point.

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
    """`start` guesses, `finish` goes on from there; the result is that of `finish`.

    `finish` reads the labels off the gradient in an order of its own: a batch's images are handed over in the order in
    which their gradient fits those labels best.
    """

    leaks = (GradientLeak, UpdateLeak)
    needs_weights = False

    start: Attack
    finish: Attack

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """Both, in order."""
        return f"{self.start.name} + {self.finish.name}"

    def accepts(self, leak: Leak) -> None:
        """What both accept."""
        self.start.accepts(leak)
        self.finish.accepts(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        guess = self.start.reconstruct(leak, start)
        images = paired(leak, guess.images.clamp(0, 1))
        return self.finish.reconstruct(leak, images.repeat_interleave(self.finish.starts, dim=0))
