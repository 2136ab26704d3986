"""Does averaging hide each client's images, if the server sees the mean of several tuned diffusion models alone?

Expect: less comes back of each. The mean of C models went 1/C of each client's way, so by the paper's reading of
fine-tuning the extrapolation that brings one client's images back is C times as long, and carries everybody else's
with it: raise w with C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedtap.scenarios.checkpoints.extraction import Extracting
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class FinextractClients(Extracting):
    """Means of 1, 2, 5 and 10 clients' adapters."""

    averaged: int = sweep(1, 2, 5, 10)
    method: Literal["full", "lora"] = "lora"
    attack: str = "guided_sampling(samples=5,steps=20),finextract(w=5.0,k=0.0,samples=5,steps=20)"
