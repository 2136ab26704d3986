"""A film of an attack: what its first victim looks like on the way, and the falling objective.

An iterative attack shows its present images at each step, `shown`; while nobody films, that costs a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

MOST_FRAMES = 48
"""Frames at most: of more, every second one is left out, and from then on they are taken half as often."""

Frame = Float[Tensor, "batch channel height width"]


@dataclass
class Film:
    """Frames of the first victim, on the CPU."""

    frames: list[Frame] = field(default_factory=list)
    objectives: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """At which of the attack's steps each frame was taken."""
    every: int = 1
    """Steps from one frame to the next."""
    step: int = 0
    """Steps that were shown."""

    def take(self, present: Callable[[], tuple[Frame, Tensor]]) -> None:
        """Take what is there, if it is time for a frame."""
        self.step += 1
        if (self.step - 1) % self.every:
            return
        if len(self.frames) == MOST_FRAMES:
            for kept in (self.frames, self.objectives, self.steps):
                del kept[1::2]
            self.every *= 2
            if (self.step - 1) % self.every:
                return
        images, objective = present()
        self.frames.append(images.detach().float().clamp(0, 1).cpu().clone())
        self.objectives.append(float(objective))
        self.steps.append(self.step)


_rolling: list[Film] = []


@contextmanager
def filming() -> Iterator[Film]:
    """Film the attack that is called in here; of one that goes through several loops, all of them."""
    film = Film()
    _rolling.append(film)
    try:
        yield film
    finally:
        _rolling.remove(film)


def shown(present: Callable[[], tuple[Frame, Tensor]]) -> None:
    """Show a step.

    Args:
        present: gives the first victim's present images, and its objective; called if a frame is taken.
    """
    for film in _rolling:
        film.take(present)
