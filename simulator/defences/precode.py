"""PRECODE: a variational bottleneck before the last layer, so that what flows back depends on what the client drew.

Scheliga, Mäder and Seeland 2022, https://arxiv.org/abs/2108.04725; the bottleneck is that of Alemi et al. 2017,
https://arxiv.org/abs/1612.00410.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

BETA = 1e-3
"""Weight of the bottleneck's own loss; the paper's."""


class Bottleneck(nn.Module):
    """``decoder(mean + spread e)`` with e from N(0, I), where (mean, spread) are the encoder's.

    Only clients draw e. To anybody else it is 0: to the server, which judges the model by its mean, and to an attacker,
    who is not told what a client drew.

    Args:
        width: of what is fed to it, and of what it returns.
        features: between encoder and decoder.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, 2 * features)
        self.decoder = nn.Linear(features, width)
        self.draws = False

    def forward(self, hidden: Float[Tensor, "images width"]) -> Float[Tensor, "images width"]:
        mean, spread = split(self.encoder(hidden))
        return self.decoder(mean + spread * torch.randn_like(mean) if self.draws else mean)  # type: ignore[no-any-return]


def split(encoded: Float[Tensor, "images twice"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, the latter small to begin with: softplus(. - 5)."""
    mean, spread = encoded.chunk(2, dim=-1)
    return mean, F.softplus(spread - 5)


def bottlenecks(network: nn.Module) -> list[Bottleneck]:
    """The network's."""
    return [module for module in network.modules() if isinstance(module, Bottleneck)]


def training_loss(
    network: nn.Module,
    images: Float[Tensor, "images channel height width"],
    labels: Int[Tensor, "images"],
    respond: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """What clients minimise: the mean cross-entropy and, of a bottleneck, ``BETA KL(N(mean, spread^2) || N(0, I))``.

    Args:
        respond: from images to the logits of this network, where it is not called as it is.
    """
    encoded: list[Tensor] = []
    hooks = [
        module.encoder.register_forward_hook(lambda layer, fed, out: encoded.append(out))
        for module in bottlenecks(network)
    ]
    try:
        total = F.cross_entropy((respond or network)(images), labels)
    finally:
        for hook in hooks:
            hook.remove()
    for each in encoded:
        mean, spread = split(each)
        total = total + BETA * (0.5 * (mean.square() + spread.square() - 1) - spread.log()).sum(-1).mean()
    return total


def with_bottleneck(network: nn.Module, last: str, features: int) -> nn.Module:
    """The network with a bottleneck before the layer named `last`, in place."""
    parent, _, name = last.rpartition(".")
    layer = network.get_submodule(last)
    assert isinstance(layer, nn.Linear)
    setattr(network.get_submodule(parent), name, nn.Sequential(Bottleneck(layer.in_features, features), layer))
    return network
