"""Identified: read the weights from the auxiliary pairs, then let an attack that needs weights use them.

A wrapper without a paper; what GIT fits by gradient descent (https://arxiv.org/abs/2505.20026) has a closed form, which
`fedtap.attackers.wrappers.identify` explains.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.wrappers.identify import check_identifiable, identify
from fedtap.simulator.attack import Attack, Images, Learner, Reconstruction
from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak, stack


@dataclass(frozen=True)
class Identified(Learner):
    """An attack that needs weights, given weights that are identified from auxiliary pairs: `identified(exact_git)`."""

    attack: Attack
    """The attack that is given the weights."""
    pairs: int = 2000
    """Auxiliary pairs that the weights are identified from; 0 takes all."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.attack.needs_auxiliary and not isinstance(self.attack, Learner):
            raise FedtapError(
                f"identified trains an attack that is a learner, and {self.attack.written()} has one inside it: put "
                "identified inside instead, such as refine(coarse_git,identified(idlg))."
            )

    @property
    def name(self) -> str:
        """The attack's name, marked."""
        return f"identified {self.attack.name}"

    @property
    def least(self) -> int:
        """What the attack itself needs, if it learns."""
        return self.attack.least if isinstance(self.attack, Learner) else super().least

    def accepts(self, leak: Leak) -> None:
        """What the attack accepts where it knows the weights."""
        super().accepts(leak)
        check_identifiable(leak)
        blank = {name: torch.zeros(p.shape, device=leak.device) for name, p in leak.network.named_parameters()}
        self.attack.accepts(dataclasses.replace(leak, weights=blank, buffers={}, stacked=False))

    def check_auxiliary(self, auxiliary_trainings: int) -> None:
        """It takes pairs at the same weights."""
        if auxiliary_trainings:
            raise FedtapError(
                f"{self.name} reads one set of weights, and these pairs were met at many, along {auxiliary_trainings} "
                "trainings: leave out --auxiliary-trainings, or use coarse_git."
            )

    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        self.check_auxiliary(about.auxiliary_trainings)
        inner = self.attack.inverter(about, network) if isinstance(self.attack, Learner) else nn.Identity()
        return IdentifiedWeights(network, inner)

    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        assert isinstance(inverter, IdentifiedWeights)
        chunks = [pairs.to("cpu") for pairs in auxiliary.first(self.pairs or len(auxiliary))]
        leak = stack([pairs.leak for pairs in chunks])
        assert isinstance(leak, GradientLeak)
        images, labels = (torch.cat(parts) for parts in zip(*((p.images, p.labels) for p in chunks), strict=True))
        # the larger of the wire's rounding and the announced noise
        noise = max(leak.resolution, sigma(leak.protocol))
        found = identify(dataclasses.replace(leak, resolution=noise), images, labels)
        inverter.network.load_state_dict(found, strict=False)
        if isinstance(self.attack, Learner):
            self.attack.learn(inverter.inner, auxiliary, seed)

    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        assert isinstance(inverter, IdentifiedWeights)
        kinds = {name: tensor.dtype for name, tensor in leak.observed.items()}
        weights = {name: weight.to(kinds[name]) for name, weight in inverter.network.named_parameters()}
        known = dataclasses.replace(leak, weights=weights, buffers={}, stacked=False)
        if isinstance(self.attack, Learner):
            return self.attack.invert(inverter.inner, known, start)
        return self.attack.reconstruct(known, start)


class IdentifiedWeights(nn.Module):
    """The network with the weights that were read, in float64, and what the attack itself has learned."""

    def __init__(self, network: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to_empty(device="cpu").double()
        self.inner = inner
