"""Assuming: an attack that takes the victim's model for another one.

A wrapper without a paper. A reply on the wire is one row of numbers; an attacker who is wrong about the model's width
or depth cuts that row into layers at the wrong places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Pairs
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak, Tensors, UpdateLeak, float_buffers
from fedtap.simulator.models.registry import build

_AnyLeak = TypeVar("_AnyLeak", bound=Leak)


@dataclass(frozen=True)
class Assuming(Attack):
    """`attack` on the leak, and trained on auxiliary pairs, as if the model were `model`: `assuming('mlp', idlg)`."""

    leaks = (GradientLeak, UpdateLeak)
    needs_weights = False

    model: str
    """Name of the model that the attacker takes for the victim's, with its parameters."""
    attack: Attack
    """The attack that is run on the recut leak."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """The attack's name, marked."""
        return f"misled {self.attack.name}"

    def fit(self, auxiliary: Auxiliary, seed: int = 0) -> Attack:
        """Its attack learns from pairs that are cut as its leaks will be."""
        protocol = dataclasses.replace(auxiliary.about.protocol, model=self.model)
        wrong = RecutPairs(
            auxiliary.folder,
            dataclasses.replace(auxiliary.about, protocol=protocol),
            build(self.model, protocol.shape, protocol.classes),
            auxiliary.device,
            auxiliary,
        )
        return dataclasses.replace(self, attack=self.attack.fit(wrong, seed))

    def accepts(self, leak: Leak) -> None:
        """What its attack accepts of the model that it assumes."""
        super().accepts(leak)
        self.attack.accepts(taken_for(self.model, leak))

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        return self.attack.reconstruct(taken_for(self.model, leak), start)


@dataclass(frozen=True)
class RecutPairs(Auxiliary):
    """Auxiliary pairs of another model, cut as if they were of `network`."""

    pairs_as_sent: Auxiliary | None = None
    """The pairs as the client sent them."""

    def __iter__(self) -> Iterator[Pairs]:
        assert self.pairs_as_sent is not None
        for pairs in self.pairs_as_sent:
            yield dataclasses.replace(pairs, leak=taken_for(self.about.protocol.model, pairs.leak))

    def first(self, pairs: int) -> Auxiliary:
        assert self.pairs_as_sent is not None
        about = dataclasses.replace(self.about, pairs=min(pairs, len(self)))
        return dataclasses.replace(self, about=about, pairs_as_sent=self.pairs_as_sent.first(pairs))


def taken_for(model: str, leak: _AnyLeak) -> _AnyLeak:
    """The leak as it looks to someone who takes its model for another.

    Raises:
        FedtapError: there is no such model, or it has buffers (BatchNorm's), which the leak cannot be cut into.
    """
    network = build(model, leak.protocol.shape, leak.protocol.classes)
    if float_buffers(network):
        raise FedtapError(
            f"{model} keeps statistics beside its parameters, and there are none in a gradient that could be taken "
            "for them: assume a model without BatchNorm."
        )
    names = [name for name, _ in leak.network.named_parameters()]
    return dataclasses.replace(
        leak,
        observed=_cut([leak.observed[name] for name in names], network, 1),
        protocol=dataclasses.replace(leak.protocol, model=model),
        network=network,
        weights=leak.weights and _cut([leak.weights[name] for name in names], network, int(leak.stacked)),
        buffers={},
    )


def _cut(tensors: list[torch.Tensor], network: nn.Module, lead: int) -> Tensors:
    """One row of all numbers, cut into the network's parameters; its end is the last layer's, where attacks begin.

    Numbers that lack are zeros at the beginning, and numbers too many are dropped there.

    Args:
        lead: leading axes that stay.
    """
    row = torch.cat([tensor.flatten(lead) for tensor in tensors], dim=-1)
    sizes = {name: parameter.shape for name, parameter in network.named_parameters()}
    # zeros before the row where the assumed model is larger, a cut there where it is smaller
    row = F.pad(row, (sum(shape.numel() for shape in sizes.values()) - row.shape[-1], 0))
    parts = torch.split(row, [shape.numel() for shape in sizes.values()], dim=-1)
    return {
        name: part.reshape(*part.shape[:-1], *shape) for (name, shape), part in zip(sizes.items(), parts, strict=True)
    }
