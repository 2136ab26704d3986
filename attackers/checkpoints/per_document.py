"""Gradients of single documents, of a last layer or of the whole model: as inner products, and as random sketches.

With errors e = p - y and features h, the gradient of a document's mean cross-entropy with respect to the last layer's
weight is the sum of outer products ``G = 1/T sum_t e_t h_t^T``, `outputs x width` numbers that are never laid out:
``<G, M> = 1/T sum_t e_t . (M h_t)``, ``||G||^2 = 1/T^2 sum_{t,s} (e_t . e_s)(h_t . h_s)``.

A sketch is a random projection to few numbers that keeps inner products in the mean. Of an outer product it is
``(R1 e) * (R2 h) / sqrt(m)`` with signs R1 and R2 (Kar and Karnick 2012, https://arxiv.org/abs/1201.6530).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedtap.simulator.attack import generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.text_model import IGNORED, TextModel

Ids = Int[Tensor, "documents tokens"]
Marks = Int[Tensor, "documents"] | None

LAID_OUT = 2**26
"""Numbers that a batch of documents may fill at once: 256 MiB of float32."""


class DocumentGradients(ABC):
    """Gradients of documents at one or several models; of several, the mean."""

    batch: int
    """Documents that fit into memory at once."""

    @abstractmethod
    def change(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
        """``before - after`` of the parameters that gradients are of, as a direction for `products`.

        Raises:
            FedtapError: none of them has changed.
        """

    @abstractmethod
    def products(self, ids: Ids, labels: Marks, directions: Sequence[Tensor]) -> Float[Tensor, "documents products"]:
        """Inner product with each direction, and last the squared norm."""

    @abstractmethod
    def total(self, ids: Ids, labels: Marks) -> Tensor:
        """Sum of the documents' gradients, as a direction."""

    @abstractmethod
    def laid_out(self, ids: Ids, labels: Marks) -> Float[Tensor, "documents entries"]:
        """Every number of every document's gradient."""

    @abstractmethod
    def sketches(self, ids: Ids, labels: Marks, size: int, seed: int) -> Float[Tensor, "documents size"]:
        """Random projections, whose inner products are those of the gradients in the mean over seeds."""

    @abstractmethod
    def sketch(self, direction: Tensor, size: int, seed: int) -> Float[Tensor, "size"]:
        """The same projection of a direction."""


@dataclass(frozen=True, eq=False)
class LastLayer(DocumentGradients):
    """Of the last layer, by outer products; at several models, those of all of them."""

    nets: Sequence[TextModel]
    """At whose weights gradients are taken."""
    tokens: str = "all"
    """`all` places, or the `last` one that predicts a token of the document."""
    places: int = 64
    """Of a document, at most."""

    @property
    def batch(self) -> int:  # type: ignore[override]
        """By the logits of a document."""
        weight = dict(self.nets[0].named_parameters())[self._weight()]
        return max(1, min(512, LAID_OUT // (4 * self.places * len(self.nets) * len(weight))))

    def change(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
        """`outputs width`, and a column more for a bias."""
        names = [self._weight(), *([self._bias] if self._bias else [])]
        moved = torch.cat([(before[name] - after[name]).reshape(len(before[names[0]]), -1) for name in names], 1)
        if not bool(moved.any()):
            raise FedtapError(
                "The last layer came back as it was sent, so its gradient says nothing of the documents: use "
                "layer='all'."
            )
        return moved

    def products(self, ids: Ids, labels: Marks, directions: Sequence[Tensor]) -> Float[Tensor, "documents products"]:
        errors, features = self.factors(ids, labels)
        each = [(errors * F.linear(features, direction)).sum((1, 2)) for direction in directions]
        norms = ((errors @ errors.mT) * (features @ features.mT)).sum((1, 2))
        return torch.stack([*each, norms.clamp_min(0)], 1)

    def total(self, ids: Ids, labels: Marks) -> Tensor:
        errors, features = self.factors(ids, labels)
        return torch.mm(errors.flatten(0, 1).mT, features.flatten(0, 1))

    def laid_out(self, ids: Ids, labels: Marks) -> Float[Tensor, "documents entries"]:
        errors, features = self.factors(ids, labels)
        return torch.bmm(errors.mT, features).flatten(1)

    def sketches(self, ids: Ids, labels: Marks, size: int, seed: int) -> Float[Tensor, "documents size"]:
        errors, features = self.factors(ids, labels)
        left, right = _both_signs(errors.shape[2], features.shape[2], size, seed, ids.device)
        return (F.linear(errors, left) * F.linear(features, right)).sum(1) / size**0.5  # type: ignore[no-any-return]

    def sketch(self, direction: Tensor, size: int, seed: int) -> Float[Tensor, "size"]:
        left, right = _both_signs(direction.shape[0], direction.shape[1], size, seed, direction.device)
        return ((left @ direction) * right).sum(1) / size**0.5  # type: ignore[no-any-return]

    def factors(
        self, ids: Ids, labels: Marks
    ) -> tuple[Float[Tensor, "documents places outputs"], Float[Tensor, "documents places width"]]:
        """Errors e_t / T and features h_t; places that predict nothing have no error, and a bias is a feature of 1."""
        both = [self._factors(net, ids, labels) for net in self.nets]
        return torch.cat([e for e, _ in both], 1) / len(both), torch.cat([h for _, h in both], 1)

    def _factors(self, net: TextModel, ids: Ids, labels: Marks) -> tuple[Tensor, Tensor]:
        features, targets = net.features(ids), net.targets(ids, labels)
        real = targets != IGNORED
        if self.tokens == "last":
            inside = real & (targets != net.end) if net.generative else real
            last = (inside * torch.arange(1, real.shape[1] + 1, device=ids.device)).argmax(1, keepdim=True)
            features = features.take_along_dim(last[:, :, None], 1)
            targets, real = targets.gather(1, last), real.gather(1, last)
        errors = net.logits(features).softmax(2)
        # e = p - y
        errors.scatter_add_(2, targets.clamp_min(0)[:, :, None], -torch.ones_like(errors[:, :, :1]))
        if net.cap is not None:  # z = c tanh(u / c), so that dz / du = 1 - (z / c)^2
            errors = errors * (1 - (net.logits(features) / net.cap).square())
        errors *= (real / real.sum(1, keepdim=True).clamp_min(1))[:, :, None]
        return errors, F.pad(features, (0, 1), value=1.0) if self._bias else features

    def _weight(self) -> str:
        name = self.nets[0].output
        if not name:
            raise FedtapError(
                "The last layer of this model is frozen, so no client changes it: use layer='all', or another model."
            )
        return name

    @cached_property
    def _bias(self) -> str:
        name = f"{self._weight().removesuffix('weight')}bias"
        return name if name in dict(self.nets[0].named_parameters()) else ""


@dataclass(frozen=True, eq=False)
class WholeModel(DocumentGradients):
    """Of all parameters of these names, laid out for a few documents at a time."""

    nets: Sequence[TextModel]
    """At whose weights gradients are taken."""
    names: Sequence[str]
    """Of the parameters."""

    @property
    def batch(self) -> int:  # type: ignore[override]
        """By the numbers of a gradient."""
        held = dict(self.nets[0].named_parameters())
        return max(1, min(64, LAID_OUT // sum(held[name].numel() for name in self.names)))

    def change(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
        """All of them, one after the other."""
        return torch.cat([(before[name] - after[name]).flatten() for name in self.names])

    def products(self, ids: Ids, labels: Marks, directions: Sequence[Tensor]) -> Float[Tensor, "documents products"]:
        each = self.laid_out(ids, labels)
        return torch.stack([*(each @ direction for direction in directions), each.square().sum(1)], 1)

    def total(self, ids: Ids, labels: Marks) -> Tensor:
        return self.laid_out(ids, labels).sum(0)

    def laid_out(self, ids: Ids, labels: Marks) -> Float[Tensor, "documents entries"]:
        marks = torch.zeros(len(ids), dtype=torch.long, device=ids.device) if labels is None else labels
        found: Tensor | None = None
        for net in self.nets:
            held = dict(net.named_parameters()) | dict(net.named_buffers())
            loss = _Loss(net, labels is not None)

            def of(
                some: dict[str, Tensor], one: Tensor, label: Tensor, held: dict[str, Tensor] = held, loss: _Loss = loss
            ) -> Tensor:
                tensors = {f"net.{name}": tensor for name, tensor in (held | some).items()}
                return functional_call(loss, tensors, (one[None], label[None])).sum()  # type: ignore[no-any-return]

            parts = vmap(grad(of), (None, 0, 0))({name: held[name].detach() for name in self.names}, ids, marks)
            rows = torch.cat([parts[name].flatten(1) for name in self.names], 1) / len(self.nets)
            found = rows if found is None else found + rows
        assert found is not None
        return found

    def sketches(self, ids: Ids, labels: Marks, size: int, seed: int) -> Float[Tensor, "documents size"]:
        return self._projected(self.laid_out(ids, labels), size, seed)

    def sketch(self, direction: Tensor, size: int, seed: int) -> Float[Tensor, "size"]:
        return self._projected(direction[None], size, seed)[0]

    def _projected(self, rows: Float[Tensor, "rows entries"], size: int, seed: int) -> Float[Tensor, "rows size"]:
        """Rows times signs, of which a block at a time is drawn."""
        found = rows.new_zeros(len(rows), size)
        for number, block in enumerate(torch.split(rows, max(1, LAID_OUT // (4 * size)), 1)):
            drawn = signs(block.shape[1], size, generator(seed, "sketch", size, number))
            found += block @ drawn.to(rows.device)
        return found / size**0.5  # type: ignore[no-any-return]


class _Loss(torch.nn.Module):
    """A model whose output is its documents' losses, for functional_call."""

    def __init__(self, net: TextModel, labelled: bool) -> None:
        super().__init__()
        self.net, self.labelled = net, labelled

    def forward(self, ids: Ids, labels: Tensor) -> Tensor:
        return self.net.losses(ids, labels if self.labelled else None)


@lru_cache(maxsize=2)
def _both_signs(outputs: int, width: int, size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the sketch of an outer product: signs for its left and for its right factor."""
    draw = generator(seed, "sketch", size)
    return signs(size, outputs, draw).to(device), signs(size, width, draw).to(device)


def signs(rows: int, columns: int, draw: torch.Generator) -> Float[Tensor, "rows columns"]:
    """-1 and 1, each as likely."""
    return torch.randint(0, 2, (rows, columns), generator=draw, dtype=torch.int8).float().mul_(2).sub_(1)
