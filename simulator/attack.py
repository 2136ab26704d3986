"""The contracts of an attack: from a leak and a starting point to a reconstruction.

An attack is a value: a frozen dataclass whose fields are its hyper-parameters. The subclass writes `reconstruct`;
`__call__` is final and checks what goes in and what comes out. An attack that is trained on auxiliary pairs first is a
`Learner`, whose `fit` returns the trained attack, a `Learned`.
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

from fedtap.simulator.auxiliary import Auxiliary, Provenance
from fedtap.simulator.defences.defence import Defence
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import write_atomically
from fedtap.simulator.leaks import CONVENTIONS, GradientLeak, Leak, Tensors
from fedtap.simulator.registry import ATTACK_GROUP, called

TRAINED_FORMAT = 2
"""Version of the saved form of a trained attack; a reader refuses any other."""

Images = Float[Tensor, "victims batch channel height width"]
Labels = Int[Tensor, "victims batch"]


_Self = TypeVar("_Self", bound="Reconstructed")


class Reconstructed(ABC):
    """What an attack returns: a frozen dataclass of tensors.

    `objective` is the value that the attack minimised, at what it returns: lower is better.
    """

    objective: Float[Tensor, "victims"]

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, each with a leading victims axis."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def columns(self, victim: int) -> dict[str, Any]:
        """Columns of a victim's row where there is no truth to score against."""
        return {}

    @abstractmethod
    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """Name -> shape of those tensors whose shape the leak determines."""

    def checked(self: _Self, leak: Leak) -> _Self:
        """This reconstruction detached from autograd, after its shapes are checked.

        Raises:
            AssertionError: a tensor is of another shape.
        """
        tensors = self.tensors()
        for name, shape in ({"objective": (len(leak),)} | self.shapes(leak)).items():
            if tuple(tensors[name].shape) != shape:
                raise AssertionError(f"{name} is {tuple(tensors[name].shape)}, not {shape}")
        return dataclasses.replace(self, **{name: tensor.detach() for name, tensor in tensors.items()})  # type: ignore[type-var]

    def on_cpu(self: _Self) -> _Self:
        """This reconstruction on the CPU."""
        return dataclasses.replace(self, **{name: tensor.cpu() for name, tensor in self.tensors().items()})  # type: ignore[type-var]


@dataclass(frozen=True)
class Reconstruction(Reconstructed):
    """Images and their labels; pixels in [0, 1]."""

    images: Images
    labels: Labels
    objective: Float[Tensor, "victims"]
    made_by: tuple[str, ...] = ()
    """For each victim, the attack whose reconstruction was chosen, as it is written; empty where there is but one."""
    candidates: tuple[Images, ...] = ()
    """All reconstructions among which the attack chose; empty where it had no choice. The scorer finds the best."""
    weights: Tensors | None = None
    """The weights, with a victims axis, at which the attack estimates that the victims computed their gradients; None
    for those that the leak tells."""

    def columns(self, victim: int) -> dict[str, Any]:
        """Column `labels`: class numbers."""
        return {"labels": self.labels[victim].tolist()}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """Batch and image shape of the protocol."""
        lead = (len(leak), leak.protocol.batch)
        return {"images": (*lead, *leak.protocol.shape), "labels": lead}

    def checked(self, leak: Leak) -> Reconstruction:
        """As `Reconstructed.checked`, with pixels clamped to [0, 1], and labels that have to be whole numbers."""
        if self.labels.is_floating_point():
            raise AssertionError(f"labels are {self.labels.dtype}, and not whole numbers")
        sound = super().checked(leak)
        return dataclasses.replace(sound, images=sound.images.clamp(0, 1))


@dataclass(frozen=True)
class CertifiedReconstruction(Reconstruction):
    """Images and labels that the attack has checked against the leak, which does not use the truth."""

    certified: Bool[Tensor, "victims"] = field(kw_only=True)
    """Whether the gradient recomputed from them is the leaked one to the wire's precision, and they alone cause it."""
    recovered: Float[Tensor, "victims"] = field(kw_only=True)
    """Share of the images that switch on the units whose gradient they were read from."""

    def columns(self, victim: int) -> dict[str, Any]:
        """Columns `labels`, `certified` and `recovered`."""
        checks = {"certified": bool(self.certified[victim]), "recovered": float(self.recovered[victim])}
        return super().columns(victim) | checks

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """As `Reconstruction.shapes`, and one value a victim for each check."""
        return super().shapes(leak) | {"certified": (len(leak),), "recovered": (len(leak),)}


@dataclass(frozen=True)
class PseudoData(Reconstructed):
    """Weighted points that act on the model as the private data do."""

    points: Float[Tensor, "victims points features"]
    targets: Float[Tensor, "victims points"]
    """Targets at the points: numbers, or classes."""
    weights: Float[Tensor, "victims points"]
    """How many private examples each stands for, from 0."""
    objective: Float[Tensor, "victims"]

    def columns(self, victim: int) -> dict[str, Any]:
        """Columns `points`, their number, and `sum_w`, the private examples that they stand for."""
        return {"points": self.weights.shape[1], "sum_w": float(self.weights[victim].sum())}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """Any number of points, with the protocol's features."""
        lead = tuple(self.points.shape[:2])
        return {"points": (len(leak), *lead[1:], *leak.protocol.shape), "targets": lead, "weights": lead}


@dataclass(frozen=True)
class Inputs(Reconstructed):
    """A block's inputs, found by an iterative solver."""

    values: Float[Tensor, "victims tokens width"]
    objective: Float[Tensor, "victims"]
    iterations: Int[Tensor, "victims"]
    converged: Bool[Tensor, "victims"]
    """Whether the solver met its own convergence criterion, which does not use the truth."""

    def columns(self, victim: int) -> dict[str, Any]:
        """Columns `iterations` and `converged` of the solver."""
        return {"iterations": int(self.iterations[victim]), "converged": bool(self.converged[victim])}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """The input's shape is the protocol's."""
        lead = (len(leak),)
        return {"values": (*lead, *leak.protocol.shape), "iterations": lead, "converged": lead}


@dataclass(frozen=True)
class Tokens(Reconstructed):
    """Texts, as token numbers."""

    ids: Int[Tensor, "victims batch tokens"]
    objective: Float[Tensor, "victims"]

    def columns(self, victim: int) -> dict[str, Any]:
        """Column `ids`: token numbers."""
        return {"ids": self.ids[victim].tolist()}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """Texts of the protocol's number of tokens."""
        return {"ids": (len(leak), leak.protocol.batch, *leak.protocol.shape)}


_Result = TypeVar("_Result", bound=Reconstructed, default=Reconstruction)


class Attack(ABC, Generic[_Result]):
    """Base class of all attacks: `attack(leak, seed=0) -> Reconstructed`, a `Reconstruction` of images by default.

    Class attributes:
        leaks: the kinds of leak it can work on.
        reconstructs: what it returns.
        needs_weights: whether the threat model has to know the weights.
    """

    leaks: ClassVar[tuple[type[Leak], ...]]
    reconstructs: ClassVar[type[Reconstructed]] = Reconstruction
    needs_weights: ClassVar[bool] = True

    @classmethod
    def suits(cls, leak: Leak) -> bool:
        """Whether it is the attack to try on this leak where none is named."""
        return False

    @property
    def name(self) -> str:
        """Its name in rows, on pictures and on the command line: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def distribution(self) -> Literal["uniform", "normal"]:
        """What the starting point is drawn from: U(0, 1) or N(0, 1); a wrapper has that of its first attack."""
        return next((part.distribution for part in self._parts().values()), "uniform")

    @property
    def starts(self) -> int:
        """Starting points for each victim; a wrapper has those of its first attack."""
        return next((part.starts for part in self._parts().values()), 1)

    def written(self) -> str:
        """As it is written on the command line, with what differs from its defaults."""
        said = []
        for known in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, known.name)
            made = known.default_factory
            if known.repr and value != (known.default if made is dataclasses.MISSING else made()):
                said.append(f"{known.name}={value.written() if isinstance(value, Attack) else repr(value)}")
        name = called(type(self), ATTACK_GROUP)
        return f"{name}({', '.join(said)})" if said else name

    @property
    def needs_auxiliary(self) -> bool:
        """Whether it, or an attack that it wraps, has to be trained on auxiliary pairs before it can be called."""
        return any(part.needs_auxiliary for part in self._parts().values())

    def fit(self, auxiliary: Auxiliary, seed: int = 0) -> Attack[_Result]:
        """This attack with each learner in it trained on these auxiliary pairs."""
        return dataclasses.replace(self, **{name: part.fit(auxiliary, seed) for name, part in self._parts().items()})  # type: ignore[type-var]

    def check_auxiliary(self, auxiliary_trainings: int) -> None:
        """Refuse auxiliary pairs along this many trainings where it or an attack that it wraps cannot learn from them.

        Raises:
            FedtapError: with the reason and what to use instead.
        """
        for part in self._parts().values():
            part.check_auxiliary(auxiliary_trainings)

    def untrained(self) -> FedtapError:
        """Why it cannot be tried where there are no auxiliary data, and what to do about it."""
        return FedtapError(
            f"{self.name} has to be trained first, and a saved leak brings no pairs: train it in a scenario "
            f"(`fedtap run git --attack '{self.written()}'`), then give what that leaves, --trained-attack PATH."
        )

    def learned(self) -> list[Learned]:
        """The trained attacks in it, itself among them."""
        return [learned for part in self._parts().values() for learned in part.learned()]

    def _parts(self) -> dict[str, Attack]:
        return {name: part for name, part in vars(self).items() if isinstance(part, Attack)}

    @property
    def adapts(self) -> bool:
        """Whether it, or an attack that it wraps, is adaptive: by the announced defence (its field `adaptive`), or by
        training on auxiliary pairs that are defended as the leak is. `unknown` says to what it cannot adapt."""
        return (
            bool(getattr(self, "adaptive", False))
            or self.needs_auxiliary
            or any(part.adapts for part in self._parts().values())
        )

    def knows(self, defence: Defence) -> bool:
        """Whether it takes into account all that this defence does to an reply, where it is announced."""
        return False

    def unknown(self, defence: str) -> tuple[str, ...]:
        """The parts of an announced defence that neither it nor an attack that it wraps takes into account.

        An attack that is trained on auxiliary pairs needs no such knowledge, since the pairs are defended as the leak
        is. A server's defence of its average comes after the reply was observed and does not count.
        """
        if self.needs_auxiliary:
            return ()
        known = [wrapped.unknown(defence) for wrapped in self._parts().values()]
        strange = [part for part in reply_parts(defence) if isinstance(part, str) or not self.knows(part)]
        return tuple(str(part) for part in strange if all(str(part) in missing for missing in known))

    @abstractmethod
    def reconstruct(self, leak: Leak, start: Tensor) -> _Result:
        """Rebuild what is behind `leak`, beginning at `start` (`starts` entries a victim, those of one in a row)."""

    def begin(self, leak: Leak, seed: int) -> Tensor:
        """A starting point for each entry: images, unless the attack overrides this."""
        return draw(leak, seed, self.distribution)

    @final
    def __call__(self, leak: Leak, *, seed: int = 0, start: Tensor | None = None) -> _Result:
        """Check the leak, draw the start where none is given, reconstruct, check the reconstruction.

        Raises:
            FedtapError: the leak is of a kind this attack cannot use, lacks the weights it needs, or is not sound;
                or what reconstruct returned is none, or of another shape.
        """
        self.accepts(leak)
        leak.check()
        if start is None:
            start = self.begin(leak.repeat(self.starts), seed).to(leak.device)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            found = self.reconstruct(leak, start)
        if not isinstance(found, Reconstructed):
            raise FedtapError(
                f"{self.name} returned a value of type {type(found).__name__} from reconstruct, and it says that it "
                f"gives back a {self.reconstructs.__name__}: return one."
            )
        try:
            return found.checked(leak)
        except AssertionError as error:
            raise FedtapError(
                f"What {self.name} returned is not of this leak ({error}): mend its reconstruct."
            ) from error

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
        if self.reconstructs is Reconstruction and len(leak.protocol.shape) != 3:
            raise FedtapError(
                f"{self.name} brings back images, and what {short(leak.protocol.model)!r} is fed are none: for tokens, "
                "use dager; give numbers from 0 to 1 as an image of one row, shape=(1, 1, N), "
                "with nn.Sequential(nn.Flatten(), model)."
            )
        if leak.protocol.optimiser == "adamw" and self.reconstructs is Reconstruction:
            raise FedtapError(
                f"{self.name} replays what clients do, and AdamW's decoupled weight decay is not among what it knows: "
                "say optimiser adam if there is no weight decay, or attack a step of sgd."
            )
        if self.needs_weights and leak.weights is None:
            curious = leak.protocol.threat_model == "curious_server"
            who = "whoever has this leak alone" if curious else f"the {leak.protocol.threat_model}"
            remedy = "put them into its file as weights/NAME" if curious else "attack what a curious_server observes"
            raise FedtapError(
                f"{self.name} compares gradients at the victim's weights, and {who} does not know them: {remedy}, or "
                "use an attack that does without (linear)."
            )
        if leak.weights is None and leak.protocol.weight_decay:
            raise FedtapError(
                f"Weight decay adds the weights to the gradient, and the {leak.protocol.threat_model} does not know "
                f"them, so {self.name} cannot take them off: use --threat-model curious_server."
            )


class Learner(Attack):
    """An attack that is trained on auxiliary pairs: `fit(auxiliary) -> Learned`.

    The subclass makes a module (`inverter`), trains it (`learn`) and uses it (`invert`). All that is learned is in the
    module's parameters and buffers, so that it can be saved without code.
    """

    leaks: ClassVar[tuple[type[Leak], ...]] = (GradientLeak,)
    needs_weights = False

    @property
    def needs_auxiliary(self) -> bool:
        """True."""
        return True

    @property
    def least(self) -> int:
        """Fewest auxiliary pairs from which it can learn."""
        return 2

    @abstractmethod
    def inverter(self, about: Provenance, network: nn.Module) -> nn.Module:
        """An untrained module for the leaks of this architecture (`network` is on the meta device).

        Raises:
            FedtapError: the architecture is none that this attack can learn to invert.
        """

    @abstractmethod
    def learn(self, inverter: nn.Module, auxiliary: Auxiliary, seed: int) -> None:
        """Train the module, in place. What is random comes from `seed`."""

    @abstractmethod
    def invert(self, inverter: nn.Module, leak: Leak, start: Images) -> Reconstruction:
        """Rebuild the images behind `leak` with the trained module."""

    @final
    def fit(self, auxiliary: Auxiliary, seed: int = 0) -> Learned:
        """Train on these auxiliary pairs; the four latest results are cached.

        Raises:
            FedtapError: there are too few pairs, or the architecture is none that this attack can learn to invert.
        """
        if len(auxiliary) < self.least:
            raise FedtapError(
                f"{self.name} needs at least {self.least:,} auxiliary pairs for {auxiliary.about.protocol.model} and "
                f"has {len(auxiliary):,}: raise --pairs."
            )
        return _learned(self, auxiliary, seed)

    @final
    def restored(self, about: Provenance, network: nn.Module, tensors: dict[str, Tensor]) -> Learned:
        """The trained attack that `fit` returned, from its saved tensors.

        Raises:
            RuntimeError: they are not those of this attack's module.
        """
        with torch.device("meta"):  # sizes are compared before any memory is taken
            bare = self.inverter(about, network)
        wanted, later = bare.state_dict(), _later(bare) - tensors.keys()
        for name in [name for name in wanted | tensors if name not in later]:
            ours, theirs = wanted.get(name), tensors.get(name)
            if ours is None or theirs is None:
                raise RuntimeError(f"{name} is not in both")
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not bool(theirs.isfinite().all()):
                raise RuntimeError(f"{name} is of another type or size, or not finite")
        inverter = self.inverter(about, network)
        inverter.load_state_dict({name: inverter.state_dict()[name] for name in later} | tensors)
        return Learned(self, about, inverter.eval().requires_grad_(False))

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        raise FedtapError(
            f"{self.name} is not trained, and without auxiliary pairs it cannot reconstruct: run it in a scenario, "
            "where the compromised client gives it pairs, or name a trained one, --trained-attack PATH."
        )


def _later(inverter: nn.Module) -> set[str]:
    """Names of the buffers that files of earlier versions lack; an untrained module's value says what held there."""
    found = {where: getattr(module, "later", ()) for where, module in inverter.named_modules()}
    return {f"{where}.{name}".removeprefix(".") for where, names in found.items() for name in names}


@lru_cache(maxsize=4)
def _learned(learner: Learner, auxiliary: Auxiliary, seed: int) -> Learned:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inverter = learner.inverter(auxiliary.about, auxiliary.network).to(auxiliary.device)
        learner.learn(inverter, auxiliary, seed)
    return Learned(learner, auxiliary.about, inverter.eval().requires_grad_(False))


@dataclass(frozen=True)
class Learned(Attack):
    """A trained learner."""

    leaks = (GradientLeak,)
    needs_weights = False

    learner: Learner
    """The learner before its training."""
    about: Provenance
    """What it was trained on: it attacks leaks of the same kind, and no others."""
    inverter: nn.Module = field(repr=False, compare=False)
    """The trained module."""

    @property
    def name(self) -> str:
        """The learner's name."""
        return self.learner.name

    @property
    def needs_auxiliary(self) -> bool:
        """False: it is trained."""
        return False

    def fit(self, auxiliary: Auxiliary, seed: int = 0) -> Learned:
        """Itself: it is trained once."""
        return self

    def unknown(self, defence: str) -> tuple[str, ...]:
        """None of the defence's parts where it was trained on pairs under that defence; all of them otherwise."""
        return () if defence == self.about.protocol.defence else tuple(map(str, reply_parts(defence)))

    def learned(self) -> list[Learned]:
        """Itself."""
        return [self]

    def written(self) -> str:
        """As the learner is written."""
        return self.learner.written()

    def accepts(self, leak: Leak) -> None:
        """Leaks of the architecture, the image size and the batch that it was trained on."""
        self.learner.accepts(leak)
        check_trained_on(self.name, self.about, leak)

    def save(self, path: Path) -> None:
        """Write the tensors to `path` (.safetensors) and then their description beside it (.json)."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.inverter.state_dict().items()}
        content = dump_safetensors(tensors)
        document = {
            "format": TRAINED_FORMAT,
            "attack": self.written(),
            "about": dataclasses.asdict(self.about),
            "digest": hashlib.blake2b(content, digest_size=8).hexdigest(),
        }
        write_atomically(path, content)
        write_atomically(path.with_suffix(".json"), json.dumps(document, indent=2).encode() + b"\n")

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        return self.learner.invert(self.inverter.to(leak.device), leak, start)


def reply_parts(defence: str) -> tuple[Defence | str, ...]:
    """The parts of a defence that shape a client's reply; what is not known here is one part, as it is written."""
    try:
        return tuple(part for part in described(defence) if part.hook != "server")
    except FedtapError:
        return (defence,)


def check_trained_on(name: str, about: Provenance, leak: Leak) -> None:
    """Refuse a leak of another kind than an attack was trained on; warn where only the defence differs.

    Raises:
        FedtapError: with what it was trained on and what the leak is.
    """
    ours, theirs = about.protocol, leak.protocol
    if other := [name for name in CONVENTIONS if getattr(ours, name) != getattr(theirs, name)]:
        said = ", ".join(f"{name} {getattr(ours, name)} and not {getattr(theirs, name)}" for name in other)
        raise FedtapError(
            f"{name} was trained on clients of {said}: use idlg, which replays what a client does, or "
            "train it on pairs of this leak's protocol."
        )
    for what in ("model", "shape", "classes", "batch"):
        if getattr(ours, what) != getattr(theirs, what):
            size = short("x".join(map(str, theirs.shape)), 20)
            raise FedtapError(
                f"{short(name, 30)} was trained on {short(about, 120)}, and this leak is of {short(theirs.model, 25)} "
                f"on {size} images in {theirs.classes} classes, batch {theirs.batch}: train it on pairs of that kind."
            )
    if ours.defence != theirs.defence:
        warnings.warn(
            f"{name} was trained under defence {short(ours.defence, 40)} and this leak's is "
            f"{short(theirs.defence, 40)}: it takes the defence's traces for the image's, so train "
            "it on pairs under this leak's defence.",
            stacklevel=3,
        )


def draw(leak: Leak, seed: int, distribution: Literal["uniform", "normal"]) -> Images:
    """A starting point for each entry, drawn from (seed, client, round, restart) alone."""
    shape = (leak.protocol.batch, *leak.protocol.shape)
    sample = torch.rand if distribution == "uniform" else torch.randn
    names = zip(leak.clients.tolist(), leak.rounds.tolist(), leak.restarts.tolist(), strict=True)
    return torch.stack([sample(shape, generator=generator(seed, *name)) for name in names])


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which Flower draws the noise of its defences, and restore it afterwards."""
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
