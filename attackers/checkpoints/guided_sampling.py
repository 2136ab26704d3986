"""Classifier-free guidance: samples of the tuned model, guided away from its own samples without a caption.

Ho, Salimans 2021. https://arxiv.org/abs/2207.12598; extraction by clusters of samples as in Carlini et al. 2023,
https://arxiv.org/abs/2301.13188. FineXtract's baseline: it needs no model but the tuned one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtap.attackers.checkpoints.sampling import Ends, extracted
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.extraction import Extraction, Extractor
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.diffusion import Condition, Latents, Noise


@dataclass(frozen=True)
class GuidedSampling(Extractor):
    """Samples by ``ε_θ'(∅) + w (ε_θ'(c) - ε_θ'(∅))``."""

    w: float = 3.0
    """Guidance: 1 samples as direct_sampling does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.w) not in (int, float) or not -100 <= self.w <= 100:
            raise FedtapError(
                f"w of {self.name} is {short(repr(self.w))}, and it is a number from -100 to 100: give one."
            )

    def reconstruct(self, leak: Leak, start: Tensor) -> Extraction:
        return extracted(self, leak, start, self._guided)

    def _guided(self, ends: Ends, caption: Condition, null: Condition, seed: int) -> tuple[Noise, Mapping[str, float]]:
        def predicted(latents: Latents, step: Tensor) -> Latents:
            many = len(latents)
            without = ends.tuned(latents, step, null.expand(many, -1, -1))
            told = ends.tuned(latents, step, caption.expand(many, -1, -1))
            return without + self.w * (told - without)

        return predicted, {"w": self.w}
