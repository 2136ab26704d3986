"""Studies: scenarios about leaks other than the gradients of images.

A study asks its clients in messages of its own, over any Flower Grid with a tap on it, and gives rows with columns of
its own. It is as much a frozen value as a `Scenario` is, and planned, swept and played like one.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from simulator import study_report
from simulator.errors import FedtapError
from simulator.leaks import Leak
from simulator.output import Folder, Row, left_by_us
from simulator.progress import progress
from simulator.report import Picture
from simulator.run import environment
from simulator.wiretap import Wiretap, partition_of


@dataclass(frozen=True)
class Outcome:
    """What became of a study's part."""

    rows: Sequence[Row]
    leak: Leak | None = None
    """What was heard, all victims in one stack."""
    charts: Mapping[str, str] = field(default_factory=dict)
    """Heading -> an element of the page: an SVG, or a table."""
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Study(ABC):
    """One question, with these settings. Subclasses add their knobs, all with defaults.

    Class attributes:
        columns: those of its rows that its tables show, in this order.
        settings: those of them whose numbers say what was played, so that no median is taken over them.
        legend: what they mean, in a line.
        threat: who listens, and what they know.
    """

    columns: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]] = ()
    legend: ClassVar[str]
    threat: ClassVar[str]

    name: str = ""
    """Name and question are those of the scenario's file: whoever plans a run fills them in."""
    question: str = ""
    seed: int = 0
    swept: tuple[tuple[str, str], ...] = ()
    """The knobs that have several values in this run, with the value they have here."""

    @property
    @abstractmethod
    def clients(self) -> int:
        """Nodes that it needs, all of them clients whose data are private."""

    @abstractmethod
    def answer(self, order: Message, client: int, data_root: Path) -> Message:
        """What a client says to an order: it runs at the client, on its private data."""

    @abstractmethod
    def play(self, grid: Grid, part: int, device: torch.device, data_root: Path) -> Outcome:
        """Ask, listen, attack and score. `part` is its place in the run's plan, which orders name (see `ask`).

        Raises:
            FedtapError: it cannot be played.
        """

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Heading -> an element of the page, about the rows of all parts of a run; none unless a study says so."""
        return {}


@dataclass(frozen=True)
class Exchange:
    """An order and its answer, as the tap heard them."""

    client: int
    order: RecordDict
    answer: RecordDict


def ask(
    grid: Grid, kind: str, content: RecordDict, part: int, tell: Callable[[int], RecordDict] | None = None
) -> list[Exchange]:
    """Send an order to every node, and overhear the answers, in the order of the clients' partitions.

    Args:
        kind: the message type, such as `train.posterior`.
        content: the order, in which the part's number is noted.
        part: the study's place in the run's plan, by which clients know what is played.
        tell: of the node's place in the grid, what it is told besides.

    Raises:
        FedtapError: a client fails.
    """
    heard: list[Exchange] = []

    def ear(order: Message, answer: Message) -> None:
        if answer.has_error():
            return
        heard.append(Exchange(partition_of(answer), order.content, answer.content))

    orders = []
    for place, node in enumerate(grid.get_node_ids()):
        told = RecordDict(dict(content) | dict(tell(place) if tell else {}) | {"config": ConfigRecord({"part": part})})
        orders.append(Message(told, node, kind))
    failed = [answer.error.reason for answer in Wiretap(grid, ear).send_and_receive(orders) if answer.has_error()]
    if failed:
        raise client_failed(failed[0])
    if len(heard) < len(orders):
        missing = f"{len(orders) - len(heard)} of {len(orders)} clients did not answer"
        raise FedtapError(f"{missing} to {kind}, so there is no stack to attack: see that all SuperNodes run.")
    return heard


def client_failed(reason: object) -> FedtapError:
    """What a client says of its failure; its own sentence where it refused with one."""
    own = OWN.search(str(reason))
    return FedtapError(own[1] if own else f"A client failed, so there is no stack to attack: {reason}")


OWN = re.compile(r"FedtapError: (.*?)(?: \(line \d+ of \w+\))?$", re.DOTALL)
"""A sentence of ours in what an engine says of a client; the grid in this process adds the line."""


def _finite(value: Any) -> Any:
    """None in the place of each number that JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_studies(
    parts: Sequence[Study],
    grid_for: Callable[[Study], Grid],
    out: Path,
    *,
    device: torch.device,
    data_root: Path,
) -> list[Row]:
    """Play each part over its grid; `out` holds run.json, rows.jsonl, leaks/, report.html, and strip.png if it may.

    Raises:
        FedtapError: `out` holds something else, or a part cannot be played.
    """
    first = parts[0]
    left_by_us(out, first.name)
    about: dict[str, Any] = {"name": first.name, "scenario": list(map(repr, parts)), "question": first.question}
    folder: Folder | None = None
    charts: dict[str, str] = {}
    pictures: list[Picture] = []
    for number, part in enumerate(progress(parts, "scenario")):
        grid = grid_for(part)
        if (nodes := len(list(grid.get_node_ids()))) != part.clients:
            raise FedtapError(
                f"The federation has {nodes} nodes, and {part.name} needs {part.clients}: start as many SuperNodes."
            )
        outcome = part.play(grid, number, device, data_root)
        folder = folder or Folder(out, about | {"seed": first.seed} | environment(device))
        if outcome.leak is not None:
            folder.leak(f"part_{number}", outcome.leak)
        told = {"scenario": part.name, **{knob: getattr(part, knob, value) for knob, value in part.swept}}
        folder.add([_finite(told | dict(row) | {"seed": part.seed}) for row in outcome.rows])
        where = ", ".join(f"{knob.replace('_', ' ')} {value}" for knob, value in part.swept)
        charts |= {f"{heading}{f' ({where})' if where else ''}": chart for heading, chart in outcome.charts.items()}
        pictures += outcome.pictures
        finished = number == len(parts) - 1
        study_report.write(folder, parts, dict(first.charts(folder.rows)) | charts, pictures, finished=finished)
    assert folder is not None
    folder.describe(finished=True)
    return folder.rows
