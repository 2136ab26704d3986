"""An attention block that a client runs on its own input, in split learning: what it sends on is the block's output.

Also the cut of a vision transformer after its first attention, patch embedding included.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, unknown
from fedtap.simulator.models.registry import VIT_HEADS, VIT_WIDTH, EncoderBlock, ViT, build

NORMS = ("none", "before", "after")
"""LayerNorm before attention, as in GPT-2 and ViT, or after the residual sum, as in BERT."""

AROUND: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scale": {"scaled": True},
    "residual": {"residual": True, "project": True},
    "norm": {"norm": "before"},
    "gpt": {"residual": True, "project": True, "scaled": True, "norm": "before"},
    "bert": {"residual": True, "project": True, "scaled": True, "norm": "after"},
}
"""What may be around the heads: nothing, as in the paper; scores divided by the root of the width; a linear layer and
the input added; LayerNorm before; all of them, with LayerNorm before (GPT-2, ViT) or after the sum (BERT)."""


class Attention(nn.Module):
    """``softmax(Q(x) K(x)^T) V(x)`` of each head, side by side, and what may be around it.

    Args:
        width: d, of a token.
        heads: how many.
        columns: of Q, K and V of each head; 0 means d, as in the paper.
        residual: whether the input is added; the sum of widths has to fit.
        scaled: whether scores are divided by the square root of `columns`.
        norm: one of NORMS.
        project: whether a linear layer takes the heads to width d.
        bias: whether Q, K, V and that layer have biases.
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        columns: int = 0,
        *,
        residual: bool = False,
        scaled: bool = False,
        norm: str = "none",
        project: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        columns = columns or width
        both = heads * columns
        self.heads, self.residual = heads, residual
        self.scale = columns**-0.5 if scaled else 1.0
        self.query, self.key, self.value = (nn.Linear(width, both, bias=bias) for _ in range(3))
        self.project = nn.Linear(both, width, bias=bias) if project else None
        self.width = width if project else both
        self.before = nn.LayerNorm(width) if norm == "before" else None
        self.after = nn.LayerNorm(self.width) if norm == "after" else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal entries: Q^T K and V have entries of variance 1 / width, and LayerNorm's gain is 1 and its shift 0."""
        width, columns = self.query.in_features, self.query.out_features // self.heads
        for layer in (self.query, self.key):
            # an entry of Q^T K sums `columns` products of variance 1 / (width columns)
            nn.init.normal_(layer.weight, 0.0, (width * columns) ** -0.25, generator=generator)
        for layer in (self.value, *([] if self.project is None else [self.project])):
            nn.init.normal_(layer.weight, 0.0, layer.in_features**-0.5, generator=generator)

    def forward(self, x: Float[Tensor, "*elements n d"]) -> Float[Tensor, "*elements n m"]:
        u = x if self.before is None else self.before(x)
        query, key, value = (
            layer(u).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for layer in (self.query, self.key, self.value)
        )
        # P = softmax(scale Q K^T) of each head, and P V
        mixed = torch.softmax(self.scale * query @ key.transpose(-1, -2), dim=-1) @ value
        out = mixed.transpose(-2, -3).flatten(-2)
        out = out if self.project is None else self.project(out)
        out = out + x if self.residual else out
        return out if self.after is None else self.after(out)  # type: ignore[no-any-return]


class Words(nn.Module):
    """An attention block behind a table of embeddings that the server knows; its input is a text's embeddings."""

    def __init__(self, vocabulary: int, attention: Attention, draw: torch.Generator | None) -> None:
        super().__init__()
        self.table = nn.Parameter(
            torch.randn(vocabulary, attention.query.in_features, generator=draw, dtype=attention.query.weight.dtype)
        )
        self.attention = attention

    def embedded(self, words: Int[Tensor, "*elements n"]) -> Float[Tensor, "*elements n d"]:
        """The embeddings of these words.

        Raises:
            FedtapError: a word is not in it.
        """
        if strange := sorted({int(word) for word in words.flatten() if not 0 <= word < len(self.table)}):
            raise FedtapError(
                f"Token {strange[0]} is outside the vocabulary of {len(self.table)} words, numbered from 0, so it has "
                "no embedding: take the text's tokens from the model's own tokenizer."
            )
        return self.table.detach()[words]

    def forward(self, x: Float[Tensor, "*elements n d"]) -> Float[Tensor, "*elements n m"]:
        return self.attention(x)  # type: ignore[no-any-return]


class Patches(nn.Module):
    """A vision transformer up to its first attention: patches of pixels in [0, 1], embedded, plus positions."""

    def __init__(self, tokens: int, pixels: int, attention: Attention) -> None:
        super().__init__()
        self.embed = nn.Linear(pixels, attention.query.in_features)
        self.position = nn.Parameter(torch.empty(tokens, attention.query.in_features))
        self.attention = attention

    def forward(self, x: Float[Tensor, "*elements n pixels"]) -> Float[Tensor, "*elements n m"]:
        return self.attention(self.embed(x) + self.position)  # type: ignore[no-any-return]


def first_attention(vit: ViT, *, residual: bool = True) -> Patches:
    """A vision transformer of `fedtap.simulator.models.registry` up to its first attention, with its weights.

    Args:
        residual: whether the cut is after the residual sum, or before it.
    """
    block = vit.blocks[0]
    assert isinstance(block, EncoderBlock)
    tokens, width = vit.position.shape[1:]
    channels, (high, wide) = vit.embed.in_channels, vit.embed.kernel_size
    attention = Attention(width, block.heads, width // block.heads, residual=residual, **OF_VIT)
    patches = Patches(tokens, channels * high * wide, attention)
    # E ((x - mean) / std) + b is affine in x, so that the normalisation goes into the embedding's weight and bias
    mean, std = (vit.normalise(torch.full((1, channels, 1, 1), value)) for value in (0.0, 1.0))
    scale, shift = (std - mean).view(-1, 1, 1), mean.view(-1, 1, 1)
    kernel = vit.embed.weight.detach()
    with torch.no_grad():
        patches.embed.weight.copy_((kernel * scale).flatten(1))
        patches.embed.bias.copy_(vit.embed.bias + (kernel * shift).flatten(1).sum(1))
        patches.position.copy_(vit.position[0])
        for layer, weight, bias in zip(
            (attention.query, attention.key, attention.value),
            block.qkv.weight.chunk(3),
            block.qkv.bias.chunk(3),
            strict=True,
        ):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    assert attention.project is not None
    assert attention.before is not None
    attention.project.load_state_dict(block.proj.state_dict())
    attention.before.load_state_dict(block.norm1.state_dict())
    return patches


_BLOCK = re.compile(r"attention\(heads=([1-9]\d{0,3}), around='(\w+)', vocabulary=(0|[1-9]\d{0,6})\)")
"""Form of a block's name in a saved leak."""

HALVES = {"vit(cut='sum')": True, "vit(cut='attention')": False}
"""A vision transformer's half by name: whether it ends after the residual sum."""


def block_name(heads: int, around: str, vocabulary: int) -> str:
    """The name that `architecture` reads."""
    return f"attention(heads={heads}, around={around!r}, vocabulary={vocabulary})"


def architecture(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The architecture behind a leak, on the meta device: half of a model, whose inputs are `tokens width`.

    Raises:
        FedtapError: there is none of this name.
    """
    if len(shape) != 2:
        return build(name, shape, classes)
    tokens, numbers = shape
    found = _BLOCK.fullmatch(name)
    with torch.device("meta"):
        if found and found[2] in AROUND:
            attention = Attention(numbers, int(found[1]), **AROUND[found[2]])
            return Words(int(found[3]), attention, None) if int(found[3]) else attention
        if name in HALVES:
            columns = VIT_WIDTH // VIT_HEADS
            return Patches(tokens, numbers, Attention(VIT_WIDTH, VIT_HEADS, columns, residual=HALVES[name], **OF_VIT))
    raise unknown("half of a model", name, (block_name(4, "nothing", 0), *HALVES))


OF_VIT: dict[str, Any] = {"scaled": True, "norm": "before", "project": True, "bias": True}
"""Arguments of `Attention` for a block of a vision transformer."""

MOVES = ((-4, -2, -5, -3), (-5, -4, -3, -2))
"""Permutation from (channel, row, y, column, x) to (row, column, channel, y, x)."""


def patches_of(
    images: Float[Tensor, "*elements channel height width"], high: int, wide: int
) -> Float[Tensor, "*elements n pixels"]:
    """Pictures as patches, row by row; a patch's pixels channel by channel."""
    columns = images.unflatten(-1, (-1, wide))  # type: ignore[no-untyped-call]
    rows = columns.unflatten(-3, (-1, high))
    return rows.movedim(*MOVES).flatten(-3).flatten(-3, -2)  # type: ignore[no-any-return]


def joined(
    patches: Float[Tensor, "*elements n pixels"], shape: tuple[int, int, int], high: int, wide: int
) -> Float[Tensor, "*elements channel height width"]:
    """Patches as a picture of this shape: the inverse of `patches_of`."""
    channels, height, width = shape
    apart = patches.unflatten(-2, (height // high, width // wide)).unflatten(-1, (channels, high, wide))  # type: ignore[no-untyped-call]
    return apart.movedim(*reversed(MOVES)).flatten(-2).flatten(-3, -2)  # type: ignore[no-any-return]
