"""The contracts of an attack: from a leak and a starting point to a reconstruction.

An attack is a value: a frozen dataclass whose fields are its hyper-parameters. The subclass writes `reconstruct`;
`__call__` is final and checks what goes in and what comes out.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simulator.errors import FedtapError
from simulator.leaks import Leak

Images = Float[Tensor, "victims batch channel height width"]
Labels = Int[Tensor, "victims batch"]


@dataclass(frozen=True)
class Reconstruction:
    """An attack's guess. Pixels in [0, 1]; `objective` is the attack's own, at the returned images: lower is better."""

    images: Images
    labels: Labels
    objective: Float[Tensor, "victims"]


class Attack(ABC):
    """What every attack is: `attack(leak, seed=0) -> Reconstruction`.

    Class attributes:
        leaks: the kinds of leak it can work on.
        needs_weights: whether the listener has to know the weights.
    """

    leaks: ClassVar[tuple[type[Leak], ...]]
    needs_weights: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Its name in rows, on pictures and on the command line: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def distribution(self) -> Literal["uniform", "normal"]:
        """What the starting point is drawn from: U(0, 1) or N(0, 1), for each pixel."""
        return "uniform"

    @property
    def starts(self) -> int:
        """Starting points it wants for each victim."""
        return 1

    @abstractmethod
    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        """Rebuild the images behind `leak`, beginning at `start` (`starts` entries a victim, those of one in a row)."""

    @final
    def __call__(self, leak: Leak, *, seed: int = 0, start: Images | None = None) -> Reconstruction:
        """Check the leak, draw the start where none is given, reconstruct, check the guess.

        Raises:
            FedtapError: the leak is of a kind this attack cannot use, lacks the weights it needs, or is not sound.
        """
        self.accepts(leak)
        leak.check()
        if start is None:
            start = draw(leak.repeat(self.starts), seed, self.distribution).to(leak.device)
        guess = self.reconstruct(leak, start)
        expected = (len(leak), leak.protocol.batch, *leak.protocol.shape)
        if tuple(guess.images.shape) != expected or tuple(guess.labels.shape) != expected[:2]:
            raise AssertionError(f"{self!r} returned images {tuple(guess.images.shape)}, not {expected}")
        if tuple(guess.objective.shape) != expected[:1]:
            raise AssertionError(f"{self!r} returned objective {tuple(guess.objective.shape)}, not {expected[:1]}")
        return Reconstruction(guess.images.detach().clamp(0, 1), guess.labels.detach(), guess.objective.detach())

    def accepts(self, leak: Leak) -> None:
        """Refuse a leak of the wrong kind, or without the weights this attack needs.

        Raises:
            FedtapError: with the reason and what to use instead.
        """
        if not isinstance(leak, self.leaks):
            wanted = " or ".join(kind.__name__ for kind in self.leaks)
            raise FedtapError(
                f"{self.name} works on a {wanted} and this is a {type(leak).__name__}: "
                "`fedtap list` names the attacks for each kind of leak."
            )
        if self.needs_weights and leak.weights is None:
            raise FedtapError(
                f"{self.name} compares gradients at the victim's weights, and the {leak.protocol.listener} "
                "does not know them: use --listener curious_server, or an attack that does without (linear)."
            )


def draw(leak: Leak, seed: int, distribution: Literal["uniform", "normal"]) -> Images:
    """A starting point for each entry, from (seed, client, round, restart) alone, whoever its neighbours are."""
    shape = (leak.protocol.batch, *leak.protocol.shape)
    sample = torch.rand if distribution == "uniform" else torch.randn
    names = zip(leak.clients.tolist(), leak.rounds.tolist(), leak.restarts.tolist(), strict=True)
    return torch.stack([sample(shape, generator=generator(seed, *name)) for name in names])


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded by the names alone."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
