"""Inputs that an auditor tries: the neighbours that a clip should keep near each other, and messages hidden in them.

A probe is an update of which only one unit differs from `absent`: a client's whole update, or one example's gradient in
a stack of them. It is far longer than any clip, so that it is as long as the clip allows once it is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtap.scenarios.audit_dp.target import AuditedUpdate

LONG = 1000.0
"""Length of a probe, in clips."""

_COUNT = 1000
"""What a counter says of a unit that is there; 0 says that it is not."""


@dataclass(frozen=True)
class Probe:
    """One update, and what it is for."""

    name: str
    """What it is, as a sentence names it."""
    update: AuditedUpdate
    """The input."""
    about: str = ""
    """Name of the tensor that it is all in; empty where it is in all of them."""
    long: bool = True
    """Whether it is far longer than the clip."""
    apart: bool = True
    """Whether its mean may differ; not for stacks of another number of examples, all of them zeros."""


class AuditInputs:
    """All inputs for a mechanism.

    Args:
        template: zeros of an update, or of a stack of examples' gradients.
        records: examples in the stack; 0 for one update.
        length: the clip, or another length by which to scale.
        counts: names of numbers that say how many examples there are, and stay as they are in the template.
        seed: of the canaries' signs.
    """

    def __init__(
        self, template: AuditedUpdate, records: int, length: float, counts: Sequence[str] = (), seed: int = 0
    ) -> None:
        self.template, self.records, self.length, self.counts = template, records, length, counts
        self.absent = {
            name: tensor.clone() if name in counts else torch.zeros_like(tensor) for name, tensor in template.items()
        }
        draw = np.random.default_rng(seed)
        self.floats = [name for name, tensor in template.items() if tensor.is_floating_point() and name not in counts]
        self.signs = {
            name: torch.from_numpy(draw.choice([-1.0, 1.0], self._shape(name))).to(template[name].dtype)
            for name in self.floats
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of one unit's tensor."""
        return tuple(self.template[name].shape[bool(self.records) :])

    def of_unit(self, unit: Mapping[str, Tensor]) -> AuditedUpdate:
        """The input in which one unit holds these tensors, and zeros of all others."""
        update = {name: tensor.clone() for name, tensor in self.absent.items()}
        for name, tensor in unit.items():
            if self.records:
                update[name][-1] = tensor.to(update[name].dtype)
            else:
                update[name] = tensor.reshape(update[name].shape).to(update[name].dtype)
        return update

    def along(self, direction: Mapping[str, Tensor], clips: float) -> AuditedUpdate:
        """The input whose unit points along a direction and is so many clips long."""
        length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in direction.values()))
        return self.of_unit({name: tensor * (clips * self.length / length) for name, tensor in direction.items()})

    def probes(self) -> list[Probe]:
        """A canary over all tensors, long and short, one in a single entry, and one in each tensor."""
        found = [
            Probe("a long update", self.along(self.signs, LONG)),
            Probe("an update just within the clip", self.along(self.signs, 0.999), long=False),
        ]
        if not self.floats:
            return found
        largest = max(self.floats, key=lambda name: self.template[name].numel())
        one = torch.zeros_like(self.signs[largest])
        one.view(-1)[one.numel() // 2] = 1.0
        found.append(Probe("an update in a single entry", self.along({largest: one}, LONG), largest))
        if len(self.floats) > 1:
            found += [
                Probe(f"an update in {name} alone", self.along({name: self.signs[name]}, LONG), name)
                for name in self.floats
            ]
        for name in self.template.keys() - set(self.floats) - set(self.counts):
            full = torch.full(self._shape(name), _COUNT, dtype=self.template[name].dtype)
            found.append(Probe(f"an update in {name} alone", self.of_unit({name: full}), name))
        return found

    def direction(self, probe: Probe, sizes: Mapping[str, int]) -> np.ndarray | None:
        """The unit's direction in a release's entries, of which those count that have the name and size of an input.

        Args:
            sizes: entries of each tensor of a release.
        """
        parts = []
        for key, size in sizes.items():
            tensor = probe.update.get(key)
            if tensor is not None and self.records:
                tensor = tensor[-1]
            fits = tensor is not None and tensor.numel() == size
            parts.append(tensor.double().numpy().reshape(-1) if fits and tensor is not None else np.zeros(size))
        whole = np.concatenate(parts)
        length = float(np.linalg.norm(whole))
        return whole / length if length else None

    def signed(self, canary: AuditedUpdate, signs: np.ndarray, sizes: Mapping[str, int]) -> AuditedUpdate:
        """The canary with each entry multiplied; entries that no release has are zeros.

        Args:
            signs: of each entry of a release.
            sizes: entries of each tensor of a release.
        """
        update = {name: tensor.clone() for name, tensor in self.absent.items()}
        start = 0
        for key, size in sizes.items():
            tensor = canary.get(key)
            if tensor is not None and tensor.is_floating_point():
                unit = tensor[-1] if self.records else tensor
                if unit.numel() == size:
                    sign = torch.from_numpy(signs[start : start + size]).reshape(unit.shape).to(unit.dtype)
                    if self.records:
                        update[key][-1] = unit * sign
                    else:
                        update[key] = unit * sign
            start += size
        return update

    def opposite(self, probe: Probe) -> Probe:
        """The same with the other sign."""
        update = {name: tensor if name in self.counts else -tensor for name, tensor in probe.update.items()}
        return Probe(f"the opposite of {probe.name}", update, probe.about, probe.long)

    def of_other_sizes(self) -> list[Probe]:
        """Zeros of one example fewer and of one more, where the number of examples is an input."""
        if self.counts:
            many = float(self.template[self.counts[0]])
            return [Probe(f"{many + step:g} examples", self._counting(many + step), apart=False) for step in (-1, 1)]
        if not self.records:
            return []
        fewer = {name: tensor[:-1] for name, tensor in self.absent.items()}
        more = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in self.absent.items()}
        return [
            Probe(f"{self.records - 1} examples", fewer, apart=False),
            Probe(f"{self.records + 1} examples", more, apart=False),
        ]

    def _counting(self, many: float) -> AuditedUpdate:
        return self.absent | {name: torch.full_like(self.absent[name], many) for name in self.counts}


class Code:
    """Messages of some bits, written into a direction by the signs of as many blocks of its entries.

    Each message is an update of its own. A mechanism that is (ε, δ)-differentially private lets nobody read more than
    e^ε / 2^bits + δ of them: the reader would say the same with probability 2^-bits if the unit were not there.

    Args:
        size: entries of the direction.
        bits: of a message, `size` at most.
    """

    def __init__(self, size: int, bits: int, draw: np.random.Generator) -> None:
        self.bits = min(bits, size)
        self.block = draw.permutation(np.arange(size) % self.bits)

    def written(self, message: np.ndarray) -> np.ndarray:
        """Of each entry, the sign by which the direction is multiplied.

        Args:
            message: -1 or 1, one a bit.
        """
        return message[self.block]  # type: ignore[no-any-return]

    def read(self, entries: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """The message that these entries are nearest to, where `direction` is what a message of ones becomes."""
        return np.where(np.bincount(self.block, entries * direction, self.bits) >= 0, 1.0, -1.0)

    def chance(self, epsilon: float, delta: float) -> float:
        """How often a message is read right, at most."""
        return min(math.exp(min(epsilon - self.bits * math.log(2), 0.0)) + delta, 1.0)


def bits_for(epsilon: float, delta: float) -> int:
    """Bits of messages that are read by chance about as rarely as δ allows."""
    return math.ceil((epsilon + (math.log(1 / delta) if delta else 14.0)) / math.log(2))
