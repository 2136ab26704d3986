"""Studies: scenarios about leaks other than the gradients of images.

A study asks its clients in messages of its own, over any Flower Grid with a tap on it, and gives rows with columns of
its own. It is as much a frozen value as a `Scenario` is, and planned, swept and played like one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtap.simulator.errors import ClientError, FedtapError, short
from fedtap.simulator.leaks import Leak
from fedtap.simulator.progress import progress
from fedtap.simulator.report.columns import Column
from fedtap.simulator.report.folder import Folder, Row, judged
from fedtap.simulator.report.page import Page, write
from fedtap.simulator.report.pictures import Picture
from fedtap.simulator.run import described_run
from fedtap.simulator.wire.records import reading, tensors_of
from fedtap.simulator.wire.roll import call, check_name
from fedtap.simulator.wire.wiretap import PATIENCE, Wiretap

Made = TypeVar("Made")


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
        columns: all that its rows measure, in this order; what else a row holds is a setting, shown where it varies.
        threat: who listens, and what they know.
    """

    columns: ClassVar[tuple[Column, ...]]
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
    grid: Grid,
    kind: str,
    content: RecordDict,
    part: int,
    tell: Callable[[int], RecordDict] | None = None,
    failed: dict[int, str] | None = None,
) -> list[Exchange]:
    """Send an order to every node, and overhear the answers, in the order of the clients' partitions.

    Args:
        kind: the message type, such as `train.posterior`.
        content: the order, in which the part's number is noted.
        part: the study's place in the run's plan, by which clients know what is played.
        tell: of the client's number, what it is told besides.
        failed: client -> why there is no answer of it, filled in here; None where the study needs all of them.

    Raises:
        ClientError: a client fails, and the study needs all of them, or there is no answer at all.
    """
    heard: dict[int, Exchange] = {}
    reasons: dict[int, object] = {}
    who = call(grid)

    def ear(order: Message, answer: Message) -> None:
        client = who.client(order)
        if answer.has_error():
            reasons[client] = answer.error.reason
            return
        try:
            with reading(client):
                check_name(answer.content, client)
                for record in answer.content.array_records.values():
                    tensors_of(record)
        except FedtapError as error:
            reasons[client] = f"FedtapError: {error}"
            return
        heard[client] = Exchange(client, order.content, answer.content)

    orders = []
    for client, node in who.nodes.items():
        told = dict(content) | dict(tell(client) if tell else {}) | {"config": ConfigRecord({"part": part})}
        orders.append(Message(RecordDict(told), node, kind))
    Wiretap(grid, ear).send_and_receive(orders, timeout=PATIENCE)
    absent = " ".join(who.strangers.values()) or f"it did not answer to {kind}: see that all SuperNodes run"
    for client in range(len(orders) + len(who.strangers)):
        if client not in heard:
            reasons.setdefault(client, absent)
    without(reasons, failed, len(heard))
    return [heard[client] for client in sorted(heard)]


def without(reasons: Mapping[int, object], failed: dict[int, str] | None, left: int) -> None:
    """Go on without some clients, entering in `failed` why, where a study may.

    Args:
        reasons: client -> what was said of its failure.
        left: clients that did not fail.

    Raises:
        ClientError: the study needs all of them (`failed` is None), or none is left.
    """
    if reasons and (failed is None or not left):
        raise client_failed(reasons[min(reasons)])
    if failed is not None:
        for client, reason in reasons.items():
            failed[client] = f"Client {client} failed: {_own(reason) or short(reason, 200)}"


def read(
    heard: Sequence[Exchange], make: Callable[[Exchange], Made], failed: dict[int, str] | None = None
) -> list[Made]:
    """What `make` gives for each exchange; a client of which it gives nothing has failed, as in `ask`.

    Raises:
        ClientError: as `ask` does.
    """
    made, reasons = [], dict[int, object]()
    for one in heard:
        try:
            with reading(one.client):
                made.append(make(one))
        except FedtapError as error:
            reasons[one.client] = f"FedtapError: {error}"
    without(reasons, failed, len(made))
    return made


def rows_of_failed(failed: Mapping[int, str], common: Row) -> list[Row]:
    """A row for each client that failed, with the reason."""
    return [common | {"client": client, "error": why} for client, why in sorted(failed.items())]


def client_failed(reason: object) -> ClientError:
    """What a client says of its failure; its own sentence where it refused with one."""
    own = _own(reason)
    return ClientError(own or f"A client failed, so there is no stack to attack: {short(reason, 200)}")


def _own(reason: object) -> str:
    """The sentence of ours in it, if there is one."""
    own = OWN.search(str(reason))
    return short(own[1], 300) if own else ""


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
    overwrite: bool = False,
) -> list[Row]:
    """Play each part over its grid; `out` holds run.json, rows.jsonl, leaks/, report.html, and strip.png if it may.

    Args:
        overwrite: replace a run with other settings that `out` holds.

    Raises:
        FedtapError: `out` holds something else, or a part cannot be played.
    """
    first = parts[0]
    about = described_run(parts, device)
    judged(out, about, overwrite=overwrite)
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
        folder = folder or Folder(out, about, overwrite=overwrite)
        if outcome.leak is not None:
            folder.leak(f"part_{number}", outcome.leak)
        told = {"scenario": part.name, **{knob: getattr(part, knob, value) for knob, value in part.swept}}
        folder.add([_finite(told | dict(row) | {"seed": part.seed}) for row in outcome.rows])
        where = ", ".join(f"{knob.replace('_', ' ')} {value}" for knob, value in part.swept)
        charts |= {f"{heading}{f' ({where})' if where else ''}": chart for heading, chart in outcome.charts.items()}
        pictures += outcome.pictures
        sound = [row for row in folder.rows if not isinstance(row.get("error"), str)]  # in some, a number
        drawn = dict(first.charts(sound)) if sound else {}
        page = _page(folder, parts, drawn | charts, pictures, finished=number == len(parts) - 1)
        write(folder.path, page, folder.rows)
    assert folder is not None
    folder.finish()
    return folder.rows


def _page(
    folder: Folder, parts: Sequence[Study], charts: Mapping[str, str], pictures: Sequence[Picture], *, finished: bool
) -> Page:
    first = parts[0]
    return Page(
        title=first.name,
        question=first.question,
        threat=first.threat,
        settings={
            field.name: " or ".join(dict.fromkeys(str(getattr(part, field.name)) for part in parts))
            for field in dataclasses.fields(first)
            if field.name not in ("name", "question", "swept")
        },
        environment=folder.about["versions"] | {"device": folder.about["device"], "started": folder.about["started"]},
        finished=finished,
        columns=first.columns,
        charts=charts,
        pictures=pictures,
    )
