"""Grey: the middle of every pixel's range, whatever was sent; a baseline without a paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak


@dataclass(frozen=True)
class Grey(Attack):
    """0.5 in every pixel, label 0: a blind guess that uses no data."""

    leaks = (GradientLeak, UpdateLeak)
    needs_weights = False

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        nothing = torch.zeros(start.shape[:2], dtype=torch.long, device=start.device)
        return Reconstruction(torch.full_like(start, 0.5), nothing, start.new_zeros(len(leak)))
