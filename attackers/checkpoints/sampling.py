"""What attacks on diffusion models share: both ends of a fine-tuning, and the way from a prediction to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.attackers.checkpoints.captions import caption_of
from fedtap.attackers.checkpoints.cliques import cliques
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.extraction import Extraction, Extractor
from fedtap.simulator.leaks import CheckpointLeak, Leak, Tensors
from fedtap.simulator.models.copy_detection import encoder
from fedtap.simulator.models.diffusion import Condition, Denoiser, Frozen, Noise, frozen
from fedtap.simulator.models.text_model import filled


@dataclass(frozen=True, eq=False)
class Ends:
    """The models that were sent to, and came back from, one victim, and what stayed as it was."""

    base: Denoiser
    """The broadcast one."""
    tuned: Denoiser
    """The one that came back."""
    frozen: Frozen
    """What is around both."""
    private: int
    """Images that the victim says it has."""
    device: torch.device
    """Where the models are."""

    @staticmethod
    def of(leak: CheckpointLeak) -> Ends:
        """Of the one victim of this leak.

        Raises:
            FedtapError: it does not say how many images it has.
        """
        if leak.examples is None or int(leak.examples[0]) < 1:
            raise FedtapError(
                "The leak does not say how many private images there are, and as many are extracted: save it with "
                "its examples, one number a victim."
            )
        base, tuned = (_model(leak, tensors) for tensors in (leak.broadcast(0), leak.tuned(0)))
        return Ends(base, tuned, frozen(leak.protocol.model), int(leak.examples[0]), leak.device)

    def condition(self, *captions: str) -> Condition:
        """What captions say; of an empty one, the null condition."""
        return self.frozen.condition(captions, self.device)


def _model(leak: CheckpointLeak, tensors: Tensors) -> Denoiser:
    made = filled(leak.network, tensors).to(leak.device).eval().requires_grad_(False)
    assert isinstance(made, Denoiser)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


Guided = Callable[[Ends, Condition, Condition, int], tuple[Noise, Mapping[str, float]]]
"""Of both ends, a caption's condition, the null condition and a seed: the prediction to sample by, and the guidance's
factors by name."""


def extracted(attack: Extractor, leak: Leak, start: Int[Tensor, "victims"], guided: Guided) -> Extraction:
    """Samples under a guided prediction, and of each cluster of them the one in the middle.

    Args:
        start: a seed for each victim.
    """
    assert isinstance(leak, CheckpointLeak)
    found, captions, factors = [], [], []
    for victim in range(len(leak)):
        ends = Ends.of(leak[victim])
        caption = caption_of(attack, leak[victim], ends.frozen)
        predicted, guidance = guided(ends, ends.condition(caption), ends.condition(""), int(start[victim]))
        begun = latents(ends, attack.samples * ends.private, int(start[victim]))
        samples = ends.frozen.decoded(ends.frozen.ddim(predicted, begun, attack.steps))
        found.append(samples)
        captions.append(caption)
        factors.append(dict(guidance))
    clusters = [
        cliques(encoder(attack.encoder)(samples), _private(leak, victim)) for victim, samples in enumerate(found)
    ]
    return Extraction(
        images=torch.stack([samples[one.medoids] for samples, one in zip(found, clusters, strict=True)]),
        samples=torch.stack([(255 * samples).round().to(torch.uint8) for samples in found]),
        objective=torch.tensor([1 - one.threshold for one in clusters]),
        captions=tuple(captions),
        guidance=tuple(factors),
    )


def latents(ends: Ends, many: int, seed: int) -> Float[Tensor, "many channel height width"]:
    """Start latents, drawn on the CPU so that all devices begin alike."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(many, *ends.frozen.shape, generator=draw).to(ends.device)


def _private(leak: CheckpointLeak, victim: int) -> int:
    assert leak.examples is not None
    return int(leak.examples[victim])
