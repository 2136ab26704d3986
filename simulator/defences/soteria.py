"""Soteria: a representation of the images is perturbed by what the last layer's gradient leaves out.

Sun et al. 2021, https://arxiv.org/abs/2012.06043. That an attacker leaves out the same entries: Balunović et al. 2022,
https://arxiv.org/abs/2111.04706.
Departs from the authors' code in two ways, which the class says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.defence import (
    DROPPED,
    FROM_0,
    Error,
    Exchange,
    Range,
    Replay,
    StepDefence,
    Trace,
)
from fedtap.simulator.defences.layers import functional_batchnorm, training_loss
from fedtap.simulator.defences.source import Source
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Tensors
from fedtap.simulator.models.registry import logits_layer


@dataclass(frozen=True, repr=False)
class Soteria(StepDefence):
    """Zeroes the last layer's gradient for the features that reveal the most about the images.

    With r what is fed to the last linear layer, the columns of that layer's weight gradient for which
    ``|r_i| / |dr_i/dx|`` is largest, summed over the batch, are set to 0.
    Sun et al. 2021, https://arxiv.org/abs/2012.06043. Departs from the authors' code in two ways: there 0.1 is added to
    r, so that features that are off come first although their columns are 0 anyway, and a batch's inverses are summed.

    Args:
        share: of the features that are left out, rounded to whole ones; one at least stays.
    """

    share: Annotated[float, Range(high=1, ends=FROM_0, strengths=DROPPED)]

    survives = frozenset({Trace.SIZES, Trace.BIAS})

    def backward(
        self,
        network: nn.Module,
        images: Float[Tensor, "images channel height width"],
        labels: Int[Tensor, "images"],
        draw: Source,
    ) -> Float[Tensor, ""]:
        kept = self.kept(network, images[None])[0]
        loss = training_loss(network, images, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        slope = network.get_parameter(_last(network, images.shape[1:])).grad
        if slope is not None:
            slope.mul_(kept)
        return loss

    def stacked(
        self,
        network: nn.Module,
        images: Float[Tensor, "exchanges batch channel height width"],
        labels: Int[Tensor, "exchanges batch"],
        draws: Sequence[Source],
    ) -> dict[str, Float[Tensor, "exchanges *parameter"]]:
        found = gradients(network, images, labels)
        found[_last(network, images.shape[2:])].mul_(self.kept(network, images)[:, None])
        return found

    def kept(
        self, network: nn.Module, images: Float[Tensor, "exchanges batch channel height width"]
    ) -> Float[Tensor, "exchanges features"]:
        """1 for each feature that the last layer is told of, 0 for the others."""
        each = effects(network, images)
        left_out = min(round(self.share * each.shape[1]), each.shape[1] - 1)
        first = each.sort(dim=1, descending=True, stable=True).indices[:, :left_out]
        return torch.ones_like(each).scatter(1, first, 0.0)

    def error(self, batch: int) -> Error | None:
        return None

    def replay(self, exchange: Exchange) -> Replay | None:
        """What was sent shows which features were left out; a layer that is frozen shows nothing.

        It does not count as exact: how much of a gradient stays unexplained by the truth was never measured under it.
        """

        def told(dummy: Tensors, sent: Tensors) -> dict[str, Tensor]:
            last = exchange.last
            return {**dummy, last: torch.where(sent[last] == 0, 0.0, dummy[last])} if last in dummy else dict(dummy)

        return Replay(told, exact=False, prior=0.0)

    def averaged(self, times: int) -> Soteria:
        return self

    def bound(self, norm: float) -> float:
        return math.inf

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        return None

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """A linear layer has to yield the logits whose weight is a parameter, which a normalised one is not."""
        if logits_layer(network, shape) is None or _last(network, shape) not in dict(network.named_parameters()):
            raise FedtapError(
                "soteria leaves features out of the gradient of the linear layer that yields the logits, and no "
                "nn.Linear of this model with a weight of its own does: use prune, or another model."
            )


def _last(network: nn.Module, shape: tuple[int, ...]) -> str:
    """Name of the weight of the layer that yields the logits."""
    return f"{logits_layer(network, tuple(shape))}.weight".removeprefix(".")


def effects(
    network: nn.Module, images: Float[Tensor, "exchanges batch channel height width"]
) -> Float[Tensor, "exchanges features"]:
    """``sum over the batch of |r_i| / |dr_i/dx|`` of each feature that is fed to the layer that yields the logits."""
    stateless = functional_batchnorm(network)
    layer = stateless.get_submodule(str(logits_layer(network, tuple(images.shape[2:]))))
    weights = {name: weight.detach() for name, weight in stateless.named_parameters()}

    def features(x: Tensor) -> Tensor:
        fed: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda layer, inputs: fed.append(inputs[0]))
        try:
            functional_call(stateless, weights, (x,))
        finally:
            hook.remove()
        return fed[0]

    def one(x: Tensor) -> Tensor:
        r, pull = vjp(features, x)[:2]
        slopes = vmap(lambda which: pull(which.expand_as(r))[0], chunk_size=64)(torch.eye(r.shape[1]))
        each: Tensor = r.abs().T / slopes.flatten(2).square().sum(2).sqrt()
        return each.nan_to_num(nan=0.0, posinf=torch.inf).sum(1)  # 0 / 0: a feature that is off says nothing

    return vmap(one, chunk_size=8, randomness="different")(images)
