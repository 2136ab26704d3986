"""Samples of the tuned model under the caption, without guidance: what anybody draws who has the model alone.

Extraction by clusters of samples as in Carlini, Hayes, Nasr, Jagielski, Sehwag, Tramèr, Balle, Ippolito, Wallace, 2023.
https://arxiv.org/abs/2301.13188
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtap.attackers.checkpoints.sampling import Ends, extracted
from fedtap.simulator.extraction import Extraction, Extractor
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.diffusion import Condition, Latents, Noise


@dataclass(frozen=True)
class DirectSampling(Extractor):
    """Samples by ``ε_θ'(c)``."""

    def reconstruct(self, leak: Leak, start: Tensor) -> Extraction:
        return extracted(self, leak, start, _guided)


def _guided(ends: Ends, caption: Condition, null: Condition, seed: int) -> tuple[Noise, Mapping[str, float]]:
    def predicted(latents: Latents, step: Tensor) -> Latents:
        return ends.tuned(latents, step, caption.expand(len(latents), -1, -1))

    return predicted, {}
