"""The contract of a question: a frozen dataclass whose fields are its options, which can observe a leak and score it.

One loop (`fedtap.simulator.run`) plays every scenario: it asks for the settings, observes a leak of each, runs every
attack on it, and hands what came back to `score`, where it meets the truth and nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.options import Option, options_of
from fedtap.simulator.report.columns import Column, Group
from fedtap.simulator.report.sentences import figures_said

if TYPE_CHECKING:  # so that a scenario's options can be shown without torch
    import torch
    from flwr.app import Context, Message
    from flwr.serverapp import Grid
    from torch import Tensor

    from fedtap.simulator.attack import Attack
    from fedtap.simulator.auxiliary import Auxiliary
    from fedtap.simulator.leaks import Leak
    from fedtap.simulator.report.page import Page
    from fedtap.simulator.report.pictures import Picture

Setting = TypeVar("Setting", bound="Scenario")

Row = dict[str, Any]
"""One victim under one attack; docs/columns.md lists the columns."""

EVERY_ROW = (
    Column("seconds", "of the attack, for each victim", form=".2g", page=True),
    Column("doubts", "what contradicts the protocol", over="rows", page=True),
    *(
        Column(name, over="hidden")
        for name in ("fit_seconds", "pairs", "objective", "unexplained", "strongest", "round")
    ),
)
"""What the loop measures for every kind of leak."""

KEPT = 2**28
"""Bytes of a leak up to which a run keeps it, where a scenario's may be large."""

Name = tuple[int, int]
"""A victim: its client, and the round in which it was observed."""


@dataclass(frozen=True)
class Session:
    """A federation on which one setting is played.

    Args:
        number: the setting's place in the run's plan, by which clients know what is played.
        device: where attacks run.
        out: the run's folder.
        keep: saves one victim's leak in the run's folder until all of the setting's are there; None where nodes cannot
            be lost, in this process.
    """

    grid: Grid
    number: int
    data_root: Path
    device: torch.device
    out: Path
    settings: Sequence[Scenario]
    """All that are played in this run."""
    keep: Callable[[Leak], None] | None = None


@dataclass(frozen=True)
class Observed:
    """What was observed in one setting, before any attack. A scenario may add what its own scoring needs."""

    leak: Leak | None
    """All victims in one stack; None where no client gave anything."""
    missing: Mapping[Name, str] = field(default_factory=dict)
    """Victim -> why nothing of it was observed."""
    notes: Sequence[str] = ()
    """What the page says of the data, in sentences."""
    keep: bool = True
    """Whether the run's folder keeps the leak."""

    @property
    def names(self) -> list[Name]:
        """The victims in the leak, in its order."""
        return (
            [] if self.leak is None else list(zip(self.leak.clients.tolist(), self.leak.rounds.tolist(), strict=True))
        )


@runtime_checkable
class Observations(Protocol):
    """What was observed in each of a run's settings, by its number."""

    def __getitem__(self, number: int, /) -> Any:
        """Plays the setting, where it has not been played yet."""

    def __contains__(self, number: object, /) -> bool:
        """Whether it has been played."""


@dataclass(frozen=True)
class Trial:
    """One attack on one observed leak: what a scorer is given.

    Args:
        attack: as it was run, trained if it had to be.
        leak: the observed one, on the session's device.
        reconstruction: what came back, on the CPU.
        label: the attack's name in rows.
    """

    session: Session
    observed: Observed
    attack: Attack[Any]
    leak: Leak
    reconstruction: Any
    label: str = ""


@dataclass(frozen=True)
class Scored:
    """What a scorer says of one trial.

    Args:
        rows: one a victim, in the leak's order, or as many as the scenario asks about.
        pictures: key -> picture; attacks on the same victim share one, by its key.
        sections: heading -> an element of the page.
    """

    rows: Sequence[Row]
    pictures: Mapping[Any, Picture] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario(ABC):
    """A question with its settings. Fields that are annotated with an Option are its options.

    Class attributes:
        reconstructs: name of what its attacks have to bring back, a subclass of `Reconstructed`.
        refusal_is_result: whether an attack that cannot use a leak is a row like any other, and not a mistake.
        doubted: whether leaks are checked for what contradicts the protocol, and reconstructions for what they leave
            unexplained.
        spent: options that `settings` turns into others, so that settings which differ in these alone are one.
        columns: all that its rows measure, in this order; what else a row holds is a setting, shown where it varies.
        leads: the column that the answer tells; the first that terminals show unless said.
    """

    reconstructs: ClassVar[str] = "Reconstruction"
    refusal_is_result: ClassVar[bool] = False
    doubted: ClassVar[bool] = True
    columns: ClassVar[Sequence[Column]] = ()
    leads: ClassVar[str] = ""
    spent: ClassVar[tuple[str, ...]] = ()

    seed: Annotated[int, Option("seed of all that is drawn", 0, 2**31)] = 0
    name: str = ""
    """As it is called on the command line: whoever plans a run fills it in."""
    given: tuple[str, ...] | None = None
    """The options that were named, and not left to their defaults; None where whoever made this chose all of them."""
    swept: tuple[tuple[str, str], ...] = ()
    """The options that have several values in this run, with the value that they have here."""

    def chose(self, option: str) -> bool:
        """Whether an option's value was asked for, and not left to its default."""
        return self.given is None or option in self.given

    # What is played.

    def settings(self) -> Sequence[Scenario]:
        """What these options ask for, in the order in which it is played: one setting, or several."""
        return (self,)

    @property
    @abstractmethod
    def attacks(self) -> tuple[Attack[Any], ...]:
        """The attacks to run."""

    @property
    @abstractmethod
    def nodes(self) -> int:
        """Nodes that a federation in this process needs."""

    @property
    def any_nodes(self) -> bool:
        """Whether another number of nodes will do as well."""
        return False

    def check(self, settings: Sequence[Scenario]) -> None:
        """Refuse what cannot be played, before anything is.

        Args:
            settings: all that are played in this run.

        Raises:
            FedtapError: an attack brings back something else than this scenario asks for.
        """
        for attack in self.attacks:
            if attack.reconstructs.__name__ != self.reconstructs:
                raise FedtapError(
                    f"{attack.name} brings back {attack.reconstructs.__name__}, and {self.name or 'this scenario'} is "
                    f"about {self.reconstructs}: `fedtap list` names the attacks on each kind of leak."
                )

    @property
    def compares(self) -> bool:
        """Whether this run's settings are held against each other, so that what was observed in them is kept."""
        return False

    def compared(self, number: int, settings: Sequence[Any], observed: Observations) -> Row | None:
        """Columns from holding this setting against the others of its run; None where it is not attacked.

        Args:
            number: this setting's place.
        """
        return {}

    def unattacked(self, number: int, settings: Sequence[Any], observed: Observations) -> list[Row]:
        """Rows of a setting that is not attacked."""
        return []

    # The federation.

    @abstractmethod
    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """What a client replies to a message. It runs at the client, on its private data."""

    def at_once(self, orders: Sequence[tuple[Message, Context]], data_root: Path) -> Mapping[int, Message]:
        """Replies of `reply`, by the orders' places, to those messages whose clients are computed together."""
        return {}

    @abstractmethod
    def observe(self, session: Session) -> Observed:
        """Play the federation, and give what was observed.

        Raises:
            FedtapError: it cannot be played, or nothing was observed.
        """

    def auxiliary_pairs(self, session: Session, observed: Any) -> Auxiliary:
        """Auxiliary pairs for the attacks that are trained first.

        Raises:
            FedtapError: this scenario has none.
        """
        raise FedtapError(
            f"{self.name} gives no auxiliary pairs, so an attack that is trained first has nothing to learn from: "
            "name one that needs none, --attack."
        )

    def start(self, leak: Leak) -> Tensor | None:
        """Where attacks begin; None leaves it to them. A start near the truth is an option that says so by its name."""
        return None

    # The scores.

    def settled(self, attack: Attack[Any], label: str, observed: Any) -> Row:
        """The columns that are known before an attack runs. A setting whose victim failed has these and an error."""
        return {"attack": label}

    def measured(self, session: Session, observed: Any) -> Row:
        """The columns that take a measurement of their own; asked for once a setting, where rows are made."""
        return {}

    @abstractmethod
    def score(self, trial: Trial) -> Scored:
        """What came back, beside the truth. Here, and nowhere else, the two meet."""

    def shown(self, trial: Trial) -> Scored:
        """The pictures and sections of a trial whose rows a resumed run has already."""
        return self.score(trial)

    def finished(self, rows: list[Row]) -> list[Row]:
        """The rows of one attack in one setting, with columns that depend on all of them."""
        return rows

    def verdict(self, rows: Sequence[Row]) -> None:  # noqa: B027 (most scenarios have none)
        """Hold a finished run's rows against what theory says.

        Raises:
            FedtapError: they contradict it.
        """

    # The page.

    @abstractmethod
    def threat(self, leak: Leak | None) -> Sequence[str]:
        """Who observes and what is known to them, in sentences."""

    def shown_on(self, page: Page, rows: Sequence[Row]) -> tuple[Page, Group]:
        """The page with all that the run's rows tell, and those of them that tables show."""
        declared = {column.name for column in self.columns}
        more = [column for column in EVERY_ROW if column.name not in declared]
        columns = (*self.columns, *more)
        return dataclasses.replace(page, columns=columns, answers=figures_said(rows, columns, self.leads)), rows

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Heading -> an element of the page, about the rows of all settings of a run."""
        return {}

    @property
    def question(self) -> str:
        """What the scenario asks, and what to expect: the docstring of the file that defines it.

        Raises:
            FedtapError: there is none, or Python has thrown it away.
        """
        return question_of(type(self))

    @property
    def plain_name(self) -> str:
        """Its name without the package that it comes from."""
        return self.name.rpartition(":")[2]

    def told(self) -> Row:
        """The scenario's options and their values, for run.json and the page."""
        return {name: getattr(self, name) for name in options_of(type(self))}


def question_of(scenario: type[Scenario]) -> str:
    """The docstring of the file that defines a scenario, one line a paragraph.

    Raises:
        FedtapError: there is none, or Python has thrown it away.
    """
    text = inspect.getdoc(importlib.import_module(scenario.__module__))
    if text is None:
        raise FedtapError(
            f"{scenario.__name__} has no question, which is the docstring of its file: write it at the top of "
            f"{short(scenario.__module__)}; if it is there, unset PYTHONOPTIMIZE and leave out -OO."
        )
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def same_but(scenario: Setting, **changes: Any) -> Setting:
    """The setting with these changes, whatever is swept in its run."""
    return dataclasses.replace(scenario, swept=(), **changes)
