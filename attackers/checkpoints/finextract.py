"""FineXtract: guide sampling away from the model that was broadcast, beyond the one that came back.

Wu, Zhang, Wu, ICML 2025. https://arxiv.org/abs/2410.03039
Fine-tuning is read as p_θ' ∝ p_θ^(1-λ) q^λ, so the score of the private images q is an extrapolation by w = 1/λ; with a
caption, w' takes the place of w and k that of what classifier-free guidance leaves over.
Adds to the paper: a rule that chooses w without the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.checkpoints.sampling import Ends, extracted, latents
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.extraction import Extraction, Extractor
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.diffusion import DENOISED_AT_ONCE, Condition, Latents, Noise, all_threads

CANDIDATES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
"""Guidances among which one is chosen."""

SAMPLES_TRIED = 8
"""Samples that are drawn under each of them."""

MIDDLE = (0.1, 0.7)
"""Steps at which two models are compared on a sample, as shares of the schedule: before, both see the image, and after,
neither does."""

NOISE_DRAWS = 4
"""Of such a step and noise for each sample."""


@dataclass(frozen=True)
class FineXtract(Extractor):
    """Samples by ``ε_θ(∅) + w (ε_θ'(c) - ε_θ(∅)) + k ε_θ(∅)`` from the broadcast θ and the tuned θ'."""

    w: float | Literal["auto"] = 3.0
    """Guidance: 0 samples from the broadcast model, 1 from the tuned one; `auto` chooses the one of CANDIDATES whose
    samples the tuned model knows best beside the broadcast one."""
    k: float = -0.02
    """Correction; the paper's is -0.02 for full fine-tuning and 0 for LoRA."""
    guidance: Literal["conditional", "unconditional"] = "conditional"
    """`unconditional` leaves the caption out: ``ε_θ(∅) + w (ε_θ'(∅) - ε_θ(∅))``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("w", -100, 100), ("k", -1, 1)):
            value = getattr(self, name)
            if (name, value) != ("w", "auto") and not (type(value) in (int, float) and low <= value <= high):
                raise FedtapError(
                    f"{name} of {self.name} is {short(repr(value))}, and it is a number from {low} to {high}"
                    f"{', or auto' * (name == 'w')}: give one."
                )
        if self.guidance not in ("conditional", "unconditional"):
            raise FedtapError(
                f"guidance of {self.name} is {short(repr(self.guidance))}: write conditional or unconditional."
            )

    def reconstruct(self, leak: Leak, start: Tensor) -> Extraction:
        return extracted(self, leak, start, self._guided)

    def _guided(self, ends: Ends, caption: Condition, null: Condition, seed: int) -> tuple[Noise, Mapping[str, float]]:
        told, k = (caption, self.k) if self.guidance == "conditional" else (null, 0.0)
        w = self._chosen(ends, told, null, k, seed) if isinstance(self.w, str) else self.w
        return _extrapolated(ends, told, null, w, k), {"w": w, "k": k}

    def _chosen(self, ends: Ends, told: Condition, null: Condition, k: float, seed: int) -> float:
        """The w whose samples have the largest ``log p_θ'(x | c) - log p_θ(x)``, which is λ log (q / p_θ) + const."""
        start = latents(ends, SAMPLES_TRIED, seed)
        drawn = [ends.frozen.ddim(_extrapolated(ends, told, null, w, k), start, self.steps) for w in CANDIDATES]
        gains = torch.stack([gained(ends, samples, told, null, seed) for samples in drawn])
        return CANDIDATES[int(gains.mean(1).argmax())]


def _extrapolated(ends: Ends, told: Condition, null: Condition, w: float, k: float) -> Noise:
    def predicted(noisy: Latents, step: Tensor) -> Latents:
        many = len(noisy)
        base = ends.base(noisy, step, null.expand(many, -1, -1))
        tuned = ends.tuned(noisy, step, told.expand(many, -1, -1))
        return (1 + k - w) * base + w * tuned

    return predicted


def gained(ends: Ends, samples: Latents, told: Condition, null: Condition, seed: int) -> Float[Tensor, "samples"]:
    """How much better the tuned model predicts noise that is added to a sample than the broadcast one: the difference
    of their mean squared errors, in which the evidence bounds of ``log p_θ'(x | c)`` and ``log p_θ(x)`` differ."""
    draw = torch.Generator().manual_seed(seed)
    low, high = (int(share * ends.frozen.train_steps) for share in MIDDLE)
    found = []
    with torch.no_grad(), all_threads():
        for some in torch.split(samples, DENOISED_AT_ONCE):
            gain = torch.zeros(len(some), device=some.device)
            for _ in range(NOISE_DRAWS):
                noise = torch.randn(some.shape, generator=draw).to(some.device)
                steps = torch.randint(low, high, (len(some),), generator=draw).to(some.device)
                noisy, target = ends.frozen.noisy(some, noise, steps), ends.frozen.target(some, noise, steps)
                base = ends.base(noisy, steps, null.expand(len(some), -1, -1))
                tuned = ends.tuned(noisy, steps, told.expand(len(some), -1, -1))
                gain += ((base - target).square() - (tuned - target).square()).flatten(1).mean(1)
            found.append(gain)
    return torch.cat(found)
