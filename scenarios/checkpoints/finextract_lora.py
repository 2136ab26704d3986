"""Does a LoRA of lower rank give away fewer of the images that it was tuned on?

Expect: less than full tuning at any rank, and little between ranks: what a LoRA takes up depends on its steps and
learning rate more than on its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedtap.scenarios.checkpoints.extraction import Extracting
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class FinextractLora(Extracting):
    """Adapters of rank 2, 8, 32 and 64."""

    method: Literal["full", "lora"] = "lora"
    rank: int = sweep(2, 8, 32, 64)
    attack: str = "guided_sampling(samples=5,steps=20),finextract(w=5.0,k=0.0,samples=5,steps=20)"
