"""Layers that a defence puts into the clients' model, and what clients minimise with them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn import functional as F


class Inserted(nn.Module, ABC):
    """A layer that draws while a client trains, and adds to the client's loss."""

    draws: bool = False
    """Only clients draw. Anybody else takes the mean: the server, which judges the model by it, and an attacker, who is
    not told what a client drew."""

    @property
    @abstractmethod
    def penalised(self) -> nn.Module:
        """The layer in it whose output `penalty` is of."""

    @abstractmethod
    def penalty(self, output: Tensor) -> Float[Tensor, ""]:
        """What clients add to their loss."""


def inserted(network: nn.Module) -> list[Inserted]:
    """The network's."""
    return [module for module in network.modules() if isinstance(module, Inserted)]


def batchnorms(network: nn.Module) -> list[nn.Module]:
    """The network's layers of BatchNorm."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def in_training(network: nn.Module, batchnorm: str) -> nn.Module:
    """The network itself, in training mode.

    Args:
        batchnorm: `train`, or `eval` for BatchNorm by its running statistics, which then stay as they are.
    """
    network.train()
    for layer in batchnorms(network):
        layer.train(batchnorm == "train")
    return network


def functional_batchnorm(network: nn.Module) -> nn.Module:
    """The network, or where its BatchNorm trains a copy that keeps no statistics, as `torch.func.vmap` needs it.

    To be called by `functional_call`, which leaves it as it is.
    """
    if not any(one.training for one in batchnorms(network)):
        return network
    return replace_all_batch_norm_modules_(copy.deepcopy(network))


def training_loss(
    network: nn.Module,
    images: Float[Tensor, "images channel height width"],
    labels: Int[Tensor, "images"],
    respond: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """What clients minimise: the mean cross-entropy, and the penalties of what a defence has put in.

    Args:
        respond: from images to the logits of this network, where it is not called as it is.
    """
    layers = inserted(network)
    outputs: list[tuple[Inserted, Tensor]] = []
    hooks = [
        layer.penalised.register_forward_hook(lambda _, fed, out, layer=layer: outputs.append((layer, out)))
        for layer in layers
    ]
    try:
        total = F.cross_entropy((respond or network)(images), labels)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, output in outputs:
        total = total + layer.penalty(output)
    return total
