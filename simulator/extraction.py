"""The contract of attacks that extract images from the checkpoint of a fine-tuned diffusion model.

An `Extractor` samples many images, keeps those that come again and again, and returns an `Extraction`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fedtap.simulator.attack import Attack, Reconstructed, generator
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import CheckpointLeak, Leak
from fedtap.simulator.models.diffusion import Denoiser

MOST_IMAGES = 10_000
"""Private images that are asked for at once, at the most."""


@dataclass(frozen=True)
class Extraction(Reconstructed):
    """Images that a fine-tuned diffusion model gives back, pixels in [0, 1]."""

    images: Float[Tensor, "victims images channel height width"]
    """As many as the client says it has, one for each cluster of samples, the largest cluster first."""
    samples: UInt8[Tensor, "victims samples channel height width"]
    """All that were drawn, in [0, 255]."""
    objective: Float[Tensor, "victims"]
    """1 - the similarity from which on two samples count as the same image."""
    captions: tuple[str, ...] = ()
    """Of each victim, the caption under which samples were drawn; empty where only the tensors were kept."""
    guidance: tuple[dict[str, float], ...] = ()
    """Of each victim, the factors of the guidance by name, such as `w`, where there is any."""

    def columns(self, victim: int) -> dict[str, Any]:
        """Columns `caption`, and those of the guidance."""
        return {"caption": self.captions[victim], **self.guidance[victim]} if self.captions else {}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """Any number of images and samples, of the protocol's shape."""
        shape = leak.protocol.shape
        return {
            "images": (len(leak), self.images.shape[1], *shape),
            "samples": (len(leak), self.samples.shape[1], *shape),
        }


@dataclass(frozen=True)
class Extractor(Attack[Extraction]):
    """An attack that draws samples and clusters them."""

    leaks: ClassVar[tuple[type[Leak], ...]] = (CheckpointLeak,)
    reconstructs: ClassVar[type[Reconstructed]] = Extraction

    samples: int = field(default=50, kw_only=True)
    """Drawn for each private image."""
    steps: int = field(default=50, kw_only=True)
    """Of deterministic DDIM."""
    encoder: str = field(default="", kw_only=True)
    """By which samples are compared, as fedtap.simulator.models.copy_detection takes it."""
    prompt: str = field(default="", kw_only=True)
    """The caption of the private images, in place of the announced one; with * for a word that is not known."""
    captions: str = field(default="", kw_only=True)
    """PATH of a text with a candidate a line, for a caption or a word of it that is not known; a list of 200 nouns
    otherwise."""

    def __post_init__(self) -> None:
        for name, low, high in (("samples", 2, 10_000), ("steps", 2, 1000)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise FedtapError(
                    f"{name} of {self.name} is {short(repr(value))}, and it is a whole number from {low} to {high}: "
                    "give one."
                )

        for name in ("encoder", "prompt", "captions"):
            if type(getattr(self, name)) is not str:
                raise FedtapError(
                    f"{name} of {self.name} is {short(repr(getattr(self, name)))}, and it is text: quote it."
                )

    def accepts(self, leak: Leak) -> None:
        """Checkpoints of diffusion models, of clients that have equally many images."""
        super().accepts(leak)
        if not isinstance(leak.network, Denoiser):
            raise FedtapError(
                f"{self.name} samples from a diffusion model, and {short(leak.protocol.model)!r} is none: for a "
                "language model, use select."
            )
        counts = set() if leak.examples is None else set(leak.examples.tolist())
        if len(counts) > 1:
            raise FedtapError(
                f"The victims of this leak have {short(sorted(counts), 40)} images, and as many are extracted of each: "
                "attack those of unequal numbers one by one, leak[0]."
            )
        if max(counts, default=1) > MOST_IMAGES:
            raise FedtapError(
                f"The client says it has {max(counts):,} images, and {MOST_IMAGES:,} are extracted at the most: "
                "correct the leak's examples."
            )

    def begin(self, leak: Leak, seed: int) -> Int[Tensor, "victims"]:
        """A seed for each victim; all attacks draw the same start latents by it."""
        names = zip(leak.clients.tolist(), leak.rounds.tolist(), strict=True)
        return torch.tensor([generator(seed, *name).initial_seed() for name in names])
