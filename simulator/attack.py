"""The contracts of an attack: from a leak and a starting point to a reconstruction.

An attack is a value: a frozen dataclass whose fields are its hyper-parameters. The subclass writes `reconstruct`;
`__call__` is final and checks what goes in and what comes out. An attack that has to practise first is a `Learner`,
whose `fit` returns the attack that it has become, a `Learned`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import TypeVar

from fedtap.simulator.auxiliary import About, Auxiliary
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import write_atomically
from fedtap.simulator.leaks import CONVENTIONS, GradientLeak, Leak

FORMAT = 2
"""Version of the saved form of a trained attack; a reader refuses any other."""

Images = Float[Tensor, "victims batch channel height width"]
Labels = Int[Tensor, "victims batch"]


Made = TypeVar("Made", bound="Guess")


class Guess(ABC):
    """What an attack makes of a leak: a frozen dataclass of tensors.

    `objective` is the attack's own, at what is returned: lower is better.
    """

    objective: Float[Tensor, "victims"]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, each with a leading victims axis."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def told(self, victim: int) -> dict[str, Any]:
        """What a row says of a victim's guess where there is no truth to score it against."""
        return {}

    @abstractmethod
    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """Name -> shape of those tensors whose shape the leak tells."""

    def checked(self: Made, leak: Leak) -> Made:
        """Without a graph, once the shapes are as they have to be."""
        tensors = self.tensors()
        for name, shape in ({"objective": (len(leak),)} | self.shapes(leak)).items():
            if tuple(tensors[name].shape) != shape:
                raise AssertionError(f"{name} is {tuple(tensors[name].shape)}, not {shape}")
        return dataclasses.replace(self, **{name: tensor.detach() for name, tensor in tensors.items()})  # type: ignore[type-var]

    def on_cpu(self: Made) -> Made:
        """The same, on the CPU."""
        return dataclasses.replace(self, **{name: tensor.cpu() for name, tensor in self.tensors().items()})  # type: ignore[type-var]


@dataclass(frozen=True)
class Reconstruction(Guess):
    """Images and their labels; pixels in [0, 1]."""

    images: Images
    labels: Labels
    objective: Float[Tensor, "victims"]
    made_by: tuple[str, ...] = ()
    """Of each victim, which of several attacks the guess is by, as it is written; empty where there is but one."""
    candidates: tuple[Images, ...] = ()
    """All guesses among which the attacker chose; empty where it had no choice. For the scorer, who knows the best."""

    def told(self, victim: int) -> dict[str, Any]:
        """The labels."""
        return {"labels": self.labels[victim].tolist()}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """Those of the protocol."""
        lead = (len(leak), leak.protocol.batch)
        return {"images": (*lead, *leak.protocol.shape), "labels": lead}

    def checked(self, leak: Leak) -> Reconstruction:
        """With pixels in [0, 1]."""
        sound = super().checked(leak)
        return dataclasses.replace(sound, images=sound.images.clamp(0, 1))


@dataclass(frozen=True)
class PseudoData(Guess):
    """Weighted points that act on the model as the private data do."""

    points: Float[Tensor, "victims points features"]
    targets: Float[Tensor, "victims points"]
    """What the model is to answer there: numbers, or classes."""
    weights: Float[Tensor, "victims points"]
    """How many private examples each stands for, from 0."""
    objective: Float[Tensor, "victims"]

    def told(self, victim: int) -> dict[str, Any]:
        """How many points, and how many private examples they stand for."""
        return {"points": self.weights.shape[1], "sum_w": float(self.weights[victim].sum())}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """As many points as the attack likes, of as many features as the protocol says."""
        lead = tuple(self.points.shape[:2])
        return {"points": (len(leak), *lead[1:], *leak.protocol.shape), "targets": lead, "weights": lead}


@dataclass(frozen=True)
class Inputs(Guess):
    """A block's inputs, found by an iterative solver."""

    values: Float[Tensor, "victims tokens width"]
    objective: Float[Tensor, "victims"]
    iterations: Int[Tensor, "victims"]
    converged: Bool[Tensor, "victims"]
    """Whether the solver met its own criterion: it says nothing of the truth."""

    def told(self, victim: int) -> dict[str, Any]:
        """How the solver ended."""
        return {"iterations": int(self.iterations[victim]), "converged": bool(self.converged[victim])}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """The input's shape is the protocol's."""
        lead = (len(leak),)
        return {"values": (*lead, *leak.protocol.shape), "iterations": lead, "converged": lead}


@dataclass(frozen=True)
class Tokens(Guess):
    """Texts, as token numbers."""

    ids: Int[Tensor, "victims batch tokens"]
    objective: Float[Tensor, "victims"]

    def told(self, victim: int) -> dict[str, Any]:
        """The tokens' numbers."""
        return {"ids": self.ids[victim].tolist()}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """A text has as many tokens as the protocol says."""
        return {"ids": (len(leak), leak.protocol.batch, *leak.protocol.shape)}


Kind = TypeVar("Kind", bound=Guess, default=Reconstruction)


class Attack(ABC, Generic[Kind]):
    """What every attack is: `attack(leak, seed=0) -> Guess`; unless it says otherwise, the guess is a Reconstruction.

    Class attributes:
        leaks: the kinds of leak it can work on.
        guesses: what it makes of them.
        needs_weights: whether the listener has to know the weights.
    """

    leaks: ClassVar[tuple[type[Leak], ...]]
    guesses: ClassVar[type[Guess]] = Reconstruction
    needs_weights: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Its name in rows, on pictures and on the command line: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def distribution(self) -> Literal["uniform", "normal"]:
        """What the starting point is drawn from: U(0, 1) or N(0, 1), for each pixel; as the attack it wraps first."""
        return next((part.distribution for part in self._parts().values()), "uniform")

    @property
    def starts(self) -> int:
        """Starting points it wants for each victim; as many as the attack it wraps first."""
        return next((part.starts for part in self._parts().values()), 1)

    def written(self) -> str:
        """As it is written on the command line, with what differs from its defaults."""
        said = []
        for known in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, known.name)
            made = known.default_factory
            if value != (known.default if made is dataclasses.MISSING else made()):
                said.append(f"{known.name}={value.written() if isinstance(value, Attack) else repr(value)}")
        name = type(self).__module__.rpartition(".")[2]
        return f"{name}({', '.join(said)})" if said else name

    @property
    def needs_auxiliary(self) -> bool:
        """Whether it, or an attack that it wraps, has to practise before it can be called."""
        return any(part.needs_auxiliary for part in self._parts().values())

    def fit(self, auxiliary: Auxiliary, seed: int = 0) -> Attack[Kind]:
        """The same attack with each of its parts that learns having learned from this practice."""
        return dataclasses.replace(self, **{name: part.fit(auxiliary, seed) for name, part in self._parts().items()})  # type: ignore[type-var]

    def check_auxiliary(self, auxiliary_trainings: int) -> None:
        """Refuse practice along so many trainings, from which it or an attack that it wraps could not learn.

        Raises:
            FedtapError: with the reason and what to use instead.
        """
        for part in self._parts().values():
            part.check_auxiliary(auxiliary_trainings)

    def learned(self) -> list[Learned]:
        """Those of its parts that have learned, itself among them."""
        return [learned for part in self._parts().values() for learned in part.learned()]

    def _parts(self) -> dict[str, Attack]:
        return {name: part for name, part in vars(self).items() if isinstance(part, Attack)}

    @property
    def adapts(self) -> bool:
        """Whether it, or an attack that it wraps, sets out to adapt to a defence: by what is announced (its field
        `adaptive`), or by practice, whose pairs are defended as the leak is. `unknown` says whether it can."""
        return (
            bool(getattr(self, "adaptive", False))
            or self.needs_auxiliary
            or any(part.adapts for part in self._parts().values())
        )

    def knows(self, defence: Defence) -> bool:
        """Whether it takes into account all that this defence does to an answer, where it is announced."""
        return False

    def unknown(self, defence: str) -> tuple[str, ...]:
        """The parts of an announced defence that neither it nor an attack that it wraps takes into account.

        Auxiliary pairs are defended as the leak is, so whoever practises lacks nothing; and what the server does to its
        average is done after the answer was heard, so there is nothing to know of it.
        """
        if self.needs_auxiliary:
            return ()
        known = [wrapped.unknown(defence) for wrapped in self._parts().values()]
        strange = [part for part in answered(defence) if isinstance(part, str) or not self.knows(part)]
        return tuple(str(part) for part in strange if all(str(part) in missing for missing in known))

    @abstractmethod
    def reconstruct(self, leak: Leak, start: Tensor) -> Kind:
        """Rebuild what is behind `leak`, beginning at `start` (`starts` entries a victim, those of one in a row)."""

    def begin(self, leak: Leak, seed: int) -> Tensor:
        """A starting point for each entry: images, unless an attack on another kind of leak says what else."""
        return draw(leak, seed, self.distribution)

    @final
    def __call__(self, leak: Leak, *, seed: int = 0, start: Tensor | None = None) -> Kind:
        """Check the leak, draw the start where none is given, reconstruct, check the guess.

        Raises:
            FedtapError: the leak is of a kind this attack cannot use, lacks the weights it needs, or is not sound.
        """
        self.accepts(leak)
        leak.check()
        if start is None:
            start = self.begin(leak.repeat(self.starts), seed).to(leak.device)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return self.reconstruct(leak, start).checked(leak)

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
        if self.guesses is Reconstruction and len(leak.protocol.shape) != 3:
            raise FedtapError(
                f"{self.name} brings back images, and what {short(leak.protocol.model)!r} is fed are none: of tokens, "
                "use dager; numbers from 0 to 1 can be had as an image of one row, shape=(1, 1, N), "
                "with nn.Sequential(nn.Flatten(), model)."
            )
        if self.needs_weights and leak.weights is None:
            curious = leak.protocol.threat_model == "curious_server"
            who = "whoever has this leak alone" if curious else f"the {leak.protocol.threat_model}"
            remedy = "put them into its file as weights/NAME" if curious else "attack what a curious_server heard"
            raise FedtapError(
                f"{self.name} compares gradients at the victim's weights, and {who} does not know them: {remedy}, or "
                "use an attack that does without (linear)."
            )
        if leak.weights is None and leak.protocol.weight_decay:
            raise FedtapError(
                f"Weight decay adds the weights to the gradient, and the {leak.protocol.threat_model} does not know "
                f"them, "
                f"so {self.name} cannot take them off: use --threat-model curious_server."
            )


class Learner(Attack):
    """An attack that learns from practice: it becomes another, `fit(practice) -> Learned`.

    What it learns is a module, which the subclass makes (`inverter`), teaches (`learn`) and uses (`invert`). All that
    is learned is in the module's parameters and buffers, so that it can be saved without code.
    """

    leaks = (GradientLeak,)
    needs_weights = False

    @property
    def needs_auxiliary(self) -> bool:
        """It does."""
        return True

    @property
    def least(self) -> int:
        """Pairs below which it cannot learn."""
        return 2

    @abstractmethod
    def inverter(self, about: About, network: nn.Module) -> nn.Module:
        """A module that has learned nothing yet, for the leaks of this architecture (`network` is on the meta device).

        Raises:
            FedtapError: the architecture is none that this attack can learn to invert.
        """

    @abstractmethod
    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        """Teach the module, in place. What is random comes from `seed`."""

    @abstractmethod
    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        """Rebuild the images behind `leak` with the module that has learned."""

    @final
    def fit(self, auxiliary: Auxiliary, seed: int = 0) -> Learned:
        """Learn from this practice; the same again is remembered.

        Raises:
            FedtapError: there are too few pairs, or the architecture is none that this attack can learn to invert.
        """
        if len(auxiliary) < self.least:
            raise FedtapError(
                f"{self.name} needs at least {self.least:,} auxiliary pairs for {auxiliary.about.protocol.model} and "
                f"has "
                f"{len(auxiliary):,}, from which it could not tell anything: raise --pairs."
            )
        return _learned(self, auxiliary, seed)

    @final
    def restored(self, about: About, network: nn.Module, tensors: dict[str, Tensor]) -> Learned:
        """What `fit` returned, from the tensors that it had learned.

        Raises:
            RuntimeError: they are not those of this attack's module.
        """
        with torch.device("meta"):  # so that no more is built than there is
            wanted = self.inverter(about, network).state_dict()
        for name in wanted | tensors:
            ours, theirs = wanted.get(name), tensors.get(name)
            if ours is None or theirs is None:
                raise RuntimeError(f"{name} is not in both")
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not bool(theirs.isfinite().all()):
                raise RuntimeError(f"{name} is of another type or size, or not finite")
        inverter = self.inverter(about, network)
        inverter.load_state_dict(tensors)
        return Learned(self, about, inverter.eval().requires_grad_(False))

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        raise FedtapError(
            f"{self.name} has learned nothing yet, and without practice it cannot guess: run it in a scenario, where "
            "the compromised client gives it pairs, or name a trained one, --trained-attack PATH."
        )


@lru_cache(maxsize=4)
def _learned(learner: Learner, auxiliary: Auxiliary, seed: int) -> Learned:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inverter = learner.inverter(auxiliary.about, auxiliary.network).to(auxiliary.device)
        learner.learn(inverter, auxiliary, seed)
    return Learned(learner, auxiliary.about, inverter.eval().requires_grad_(False))


@dataclass(frozen=True)
class Learned(Attack):
    """A learner after its practice.

    Args:
        about: what it practised on: it attacks leaks of the same kind, and no other.
        inverter: what it has learned.
    """

    leaks = (GradientLeak,)
    needs_weights = False

    learner: Learner
    about: About
    inverter: nn.Module = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The learner's."""
        return self.learner.name

    @property
    def needs_auxiliary(self) -> bool:
        """It has done so."""
        return False

    def fit(self, auxiliary: Auxiliary, seed: int = 0) -> Learned:
        """It learns once."""
        return self

    def unknown(self, defence: str) -> tuple[str, ...]:
        """Nothing of the defence that it practised under; all of another one."""
        return () if defence == self.about.protocol.defence else tuple(map(str, answered(defence)))

    def learned(self) -> list[Learned]:
        """Itself."""
        return [self]

    def written(self) -> str:
        """As what it was before it learned."""
        return self.learner.written()

    def accepts(self, leak: Leak) -> None:
        """Leaks of the architecture, the image size and the batch that it practised on."""
        self.learner.accepts(leak)
        prepared(self.name, self.about, leak)

    def save(self, path: Path) -> None:
        """Write `path` (.safetensors) and, last, what it is beside it (.json)."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.inverter.state_dict().items()}
        content = dump_safetensors(tensors)
        document = {
            "format": FORMAT,
            "attack": self.written(),
            "about": dataclasses.asdict(self.about),
            "digest": hashlib.blake2b(content, digest_size=8).hexdigest(),
        }
        write_atomically(path, content)
        write_atomically(path.with_suffix(".json"), json.dumps(document, indent=2).encode() + b"\n")

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        return self.learner.invert(self.inverter.to(leak.device), leak, start)


def answered(defence: str) -> tuple[Defence | str, ...]:
    """The parts of a defence that shape a client's answer; what is not known here is one part, as it is written."""
    try:
        return tuple(part for part in described(defence) if part.hook != "server")
    except FedtapError:
        return (defence,)


def prepared(name: str, about: About, leak: Leak) -> None:
    """Refuse a leak that this practice does not prepare for; warn where only the defence is another.

    Raises:
        FedtapError: with what was practised and what the leak is.
    """
    ours, theirs = about.protocol, leak.protocol
    if other := [name for name in CONVENTIONS if getattr(ours, name) != getattr(theirs, name)]:
        said = ", ".join(f"{name} {getattr(ours, name)} and not {getattr(theirs, name)}" for name in other)
        raise FedtapError(
            f"{name} practised on clients of {said}, which this leak's is: use idlg, which replays what a client does, "
            "or practise on pairs of the same."
        )
    for what in ("model", "shape", "classes", "batch"):
        if getattr(ours, what) != getattr(theirs, what):
            size = short("x".join(map(str, theirs.shape)), 20)
            raise FedtapError(
                f"{short(name, 30)} practised on {short(about, 130)}, and this leak is of {short(theirs.model, 25)} on "
                f"{size} images in {theirs.classes} classes, batch {theirs.batch}: train it on pairs of its kind."
            )
    if ours.defence != theirs.defence:
        warnings.warn(
            f"{name} practised under defence {short(ours.defence, 40)} and this leak's is {short(theirs.defence, 40)}: "
            "it takes the defence's traces for the image's, so its guess is worse than what practice would give.",
            stacklevel=3,
        )


def draw(leak: Leak, seed: int, distribution: Literal["uniform", "normal"]) -> Images:
    """A starting point for each entry, from (seed, client, round, restart) alone, whoever its neighbours are."""
    shape = (leak.protocol.batch, *leak.protocol.shape)
    sample = torch.rand if distribution == "uniform" else torch.randn
    names = zip(leak.clients.tolist(), leak.rounds.tolist(), leak.restarts.tolist(), strict=True)
    return torch.stack([sample(shape, generator=generator(seed, *name)) for name in names])


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Flower draws the noise of its defences from numpy's own generator: seed that, and leave it as it was."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded by the names alone."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
