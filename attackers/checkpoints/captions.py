"""The caption under which a diffusion model was tuned, where it is not announced: it stands in the weights.

The gradient of a cross-attention's projection of keys or values is a sum of outer products with the caption's token
embeddings, ``∂L/∂W = Σ δ_i e_iᵀ``. So each row of the change of W lies in the span of the embeddings of the caption,
and nearly so after AdamW. The caption is taken to be the candidate whose span holds most of the change; not one
prediction is needed. For linear layers in general see Zhang et al. 2021, https://arxiv.org/abs/2105.09369; we found no
earlier use of it for captions, as of November 2026.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.simulator.data.captions import BLANK, NOUNS, filled_in, read_candidates
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.extraction import Extractor
from fedtap.simulator.leaks import CheckpointLeak
from fedtap.simulator.models.diffusion import Frozen

CROSS = ("attn2.to_k.weight", "attn2.to_v.weight")
"""Last names of the parameters that token embeddings are multiplied by, in diffusers' U-Nets."""

CAPTIONS_AT_ONCE = 64
"""Candidates whose embeddings are in memory at once."""


def caption_of(attack: Extractor, leak: CheckpointLeak, frozen: Frozen) -> str:
    """The caption that the attack was told, or that the protocol announces; otherwise the likeliest candidate.

    Args:
        leak: of one victim.

    Raises:
        FedtapError: the file of candidates cannot be read, or the change of the weights shows no caption.
    """
    announced = attack.prompt or leak.protocol.prompt
    if announced and BLANK not in announced:
        return announced
    words = read_candidates(attack.captions) if attack.captions else NOUNS
    candidates = list(words) if attack.captions and not announced else filled_in(announced, words)
    return candidates[int(explained(leak, frozen, candidates).argmax())]


def explained(leak: CheckpointLeak, frozen: Frozen, captions: Sequence[str]) -> Float[Tensor, "captions"]:
    """The share of the squared change of the projections that lies in the span of each caption's embeddings, in [0, 1].

    Raises:
        FedtapError: nothing was tuned that embeddings are multiplied by.
    """
    before, after = leak.broadcast(0), leak.tuned(0)
    changes = [after[name] - before[name] for name in after if name.endswith(CROSS)]
    width = frozen.text_encoder.config.hidden_size
    moments = sum((change.T @ change for change in changes), torch.zeros(width, width, device=leak.device))
    total = moments.trace()
    if not bool(total > 0):
        raise FedtapError(
            "The caption is read off the change of the cross-attention's weights, and those came back unchanged: say "
            "it in the attack, such as prompt='a photo of sks'."
        )
    found = []
    for number in range(0, len(captions), CAPTIONS_AT_ONCE):
        embeddings = frozen.condition(captions[number : number + CAPTIONS_AT_ONCE], leak.device)
        basis = torch.linalg.qr(embeddings.transpose(1, 2))[0]  # captions width tokens
        found.append(torch.einsum("cik,ij,cjk->c", basis, moments, basis) / total)
    return torch.cat(found).cpu()
