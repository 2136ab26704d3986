"""Restarts: run an attack from several starting points and keep the reconstruction with the lowest objective.

A wrapper without a paper. The objective is the attack's own: nothing here sees the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak


@dataclass(frozen=True)
class Restarts(Attack):
    """`attack` from `times` starts, all in one batch; with `enough` > 0, more than one only where it is needed."""

    leaks = (GradientLeak, UpdateLeak)
    needs_weights = False

    attack: Attack
    """The attack that is restarted."""
    times: int = 8
    """Starting points of each victim."""
    enough: float = 0.0
    """Objective up to which a victim's first start is final and no other is tried; 0 tries all starts for everyone."""

    def __post_init__(self) -> None:
        check_fields(self, times=1)

    @property
    def name(self) -> str:
        """The attack's name and the number of restarts."""
        return f"{self.attack.name} x{self.times}"

    @property
    def starts(self) -> int:
        """`times` the starts of the attack itself."""
        return self.times * self.attack.starts

    def accepts(self, leak: Leak) -> None:
        """What the attack accepts, if it reconstructs images."""
        super().accepts(leak)
        self.attack.accepts(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        starts = start.reshape(len(leak), self.times, self.attack.starts, *start.shape[1:])
        at_once = 1 if self.enough > 0 else self.times
        reconstruction = self._best(leak, starts[:, :at_once])
        # not (objective <= enough) is true for NaN as well
        rows = (~(reconstruction.objective <= self.enough)).nonzero().squeeze(1).cpu()
        if self.enough > 0 and self.times > 1 and len(rows):
            again = self._best(leak[rows], starts[rows, 1:])
            better = ~(reconstruction.objective[rows] <= again.objective)
            images, labels, objective = (
                reconstruction.images.clone(),
                reconstruction.labels.clone(),
                reconstruction.objective.clone(),
            )
            images[rows[better.cpu()]] = again.images[better]
            labels[rows[better.cpu()]] = again.labels[better]
            objective[rows[better.cpu()]] = again.objective[better]
            return Reconstruction(images, labels, objective)
        return reconstruction

    def _best(
        self, leak: Leak, starts: Float[Tensor, "victims restarts start batch channel height width"]
    ) -> Reconstruction:
        """The lowest objective of each victim; `starts` has axes victims, restarts, the attack's own starts."""
        times = starts.shape[1]
        reconstruction = self.attack.reconstruct(leak.repeat(times), starts.flatten(0, 2))
        objective = reconstruction.objective.reshape(-1, times).nan_to_num(nan=float("inf"))
        rows = torch.arange(len(leak), device=objective.device) * times + objective.argmin(dim=1)
        return Reconstruction(reconstruction.images[rows], reconstruction.labels[rows], reconstruction.objective[rows])
