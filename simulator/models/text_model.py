"""What every model of texts shares: features of a document, and one linear layer that predicts from them.

Documents are stacks of token numbers, padded at the end with PAD. A model of the next token predicts at each place; a
classifier predicts one label a document, at a single place.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.simulator.leaks import Tensors

PAD = -1
"""In the place of a token, after a document's end."""

IGNORED = -100
"""In the place of a target, where nothing is predicted; torch's cross-entropy leaves it out."""


class TextModel(nn.Module, ABC):
    """A network that predicts a document's tokens, or its class, by one linear layer on features."""

    generative: bool
    """Whether it predicts the next token; a label of the document otherwise."""
    output: str
    """Name of the last layer's weight among the parameters, `outputs width`; empty where that layer is not trained."""

    end: int | None = None
    """The token that marks a document's end; None where there is none."""
    cap: float | None = None
    """c of logits that are capped, ``c tanh(u / c)``; None where they are not."""

    @abstractmethod
    def features(self, ids: Int[Tensor, "documents tokens"]) -> Float[Tensor, "documents places width"]:
        """Input of the last layer."""

    @abstractmethod
    def logits(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch outputs"]:
        """Output of the last layer."""

    @abstractmethod
    def targets(
        self, ids: Int[Tensor, "documents tokens"], labels: Int[Tensor, "documents"] | None
    ) -> Int[Tensor, "documents places"]:
        """What is predicted at each place: the next token, or the label; IGNORED where nothing is."""

    def losses(
        self, ids: Int[Tensor, "documents tokens"], labels: Int[Tensor, "documents"] | None
    ) -> Float[Tensor, "documents"]:
        """Cross-entropy of each document, in nats: the mean over its places."""
        targets = self.targets(ids, labels)
        each = F.cross_entropy(
            self.logits(self.features(ids)).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        return each.sum(1) / (targets != IGNORED).sum(1).clamp_min(1)


def filled(network: nn.Module, tensors: Tensors) -> nn.Module:
    """A copy of a network that may be on the meta device, with these parameters and buffers, by name.

    Tensors that layers share are filled in wherever they stand.
    """
    made = copy.deepcopy(network)
    modules = dict(made.named_modules())
    held = [
        *((name, tensor, True) for name, tensor in made.named_parameters(remove_duplicate=False)),
        *((name, tensor, False) for name, tensor in made.named_buffers(remove_duplicate=False)),
    ]
    first: dict[int, torch.Tensor] = {}
    for name, tensor, trained in held:
        if id(tensor) not in first:
            if name not in tensors:
                continue
            given = tensors[name].detach().clone()
            first[id(tensor)] = nn.Parameter(given, tensor.requires_grad) if trained else given
        owner, _, leaf = name.rpartition(".")
        (modules[owner]._parameters if trained else modules[owner]._buffers)[leaf] = first[id(tensor)]
    return made
