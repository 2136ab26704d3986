"""Does a LoRA of lower rank give away fewer of the images that it was tuned on?

Expect: no rule for rank alone. The paper tunes at rank 64. A LoRA of any rank sends fewer numbers than full tuning,
and all of them lie in the layers that captions act on; what it takes up depends on steps and learning rate as well,
so sweep those too.
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
