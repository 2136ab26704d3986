"""The audit of an app: it is played, each exchange is judged, what suits is attacked; all found is written at once."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message

from fedtap.scenarios.audit.app import FlowerApp, flower_app, mods_of, reconfigured
from fedtap.scenarios.audit.attacks import Ranges, attackable, attacked, best_explained, note_inputs, suitable
from fedtap.scenarios.audit.changes import (
    EPSILONS,
    Change,
    ReportedMetrics,
    changed_client,
    changes_of,
    hidden,
    metric_told,
    summed,
)
from fedtap.scenarios.audit.engines import NO_ATTACK_ON_ENGINES, EnginePlay, FoundOnEngine
from fedtap.scenarios.audit.judging import judged_and_noted
from fedtap.scenarios.audit.observe import ROOM, LocalTraining
from fedtap.scenarios.audit.play import play_app
from fedtap.scenarios.audit.privacy import planned_rounds, privacy_of
from fedtap.scenarios.audit.process import seconds_left
from fedtap.scenarios.audit.report import audit_page, junit, risk_of
from fedtap.scenarios.audit.single import single_steps
from fedtap.scenarios.audit.stand_in import NOT_ASKED, standing_in
from fedtap.scenarios.audit.verdict import NOISED, RAW, AuditedExchange, judged
from fedtap.scenarios.audit.wrapped import Wrapping
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import write_atomically
from fedtap.simulator.report.pictures import Picture
from fedtap.simulator.run import environment, finite
from fedtap.simulator.scores import LEVELS
from fedtap.simulator.wire.grid import SERVER_NODE

AUDIT_SCHEMA = 1
"""Version of audit.json."""

_PLAYED = 0.5
"""Share of the time after which no round is begun, so that attacks have the rest."""

_ATTACKED = 2
"""Exchanges that are attacked, at most: those of the fewest inputs, and of the earliest rounds among them."""

_SINGLE = 4
"""Inputs on each of which a single step is attacked, at most."""

_AS_IT_IS, _ALONE_UNTIL = 0.45, 0.7
"""Shares of the time for attacks after which those on the app as it is end, and those on single steps; changes have the
rest."""

_SHORT: dict[Any, str] = {epsilon: f"clip and noise, ε = {epsilon:g}" for epsilon in EPSILONS}
"""ε of a change -> how a picture names it."""

_EVERY = 1.0
"""Seconds between two writings while the app is played."""


NEVER_TRIED = (
    "attacks that are trained on auxiliary data first",
    "a server that departs from its own app: other weights, other messages",
    "several rounds put together",
    "metrics and numbers of examples that clients report",
    "the model at the end, and whoever it is given to",
)
"""What no audit here tries, whatever the app is."""


@dataclass(frozen=True)
class AuditSettings:
    """What is audited, and how."""

    path: Path
    """Folder of the app."""
    out: Path
    """Folder for audit.json and report.html."""
    nodes: int = 2
    """Clients."""
    rounds: int = 2
    """Rounds that are played, at most."""
    overrides: tuple[str, ...] = ()
    """`key=value` for the app's run config."""
    data: Path | None = None
    """A folder of images, an .npz or a .csv in the place of what the app would fetch; None for the app's own."""
    minutes: float = 10.0
    """Time for all of it."""
    started: float = 0.0
    """When that time began, as time.time() tells it; 0 for now."""
    seed: int = 0
    """Of the attacks' starting points."""
    engine: str = ""
    """`simulation` or `deployment`, Flower's own, where nothing is attacked; empty for this process."""
    home: Path | None = None
    """Folder for what Flower's engines keep, FLWR_HOME, which nobody else uses."""

    def command(self) -> str:
        """What repeats the audit, in the folder of the app."""
        said = ["fedtap", "audit", ".", "--nodes", self.nodes, "--rounds", self.rounds, "--minutes", self.minutes]
        said += [word for override in self.overrides for word in ("--set", override)]
        said += ["--data", self.data.name] if self.data else []
        said += ["--engine", self.engine] if self.engine else []
        return shlex.join(map(str, [*said, "--seed", self.seed]))

    @staticmethod
    def of(text: str) -> AuditSettings:
        """From JSON, the argument of a process."""
        given = json.loads(text)
        paths = {name: Path(given[name]) for name in ("path", "out", "data", "home") if given.get(name)}
        return AuditSettings(**{**given, **paths, "overrides": tuple(given["overrides"])})


@dataclass
class Audit:
    """An audit under way."""

    settings: AuditSettings
    """What is audited."""
    app: FlowerApp | None = None
    """The app, once it is loaded."""
    exchanges: list[dict[str, Any]] = field(default_factory=list)
    """As audit.json has them."""
    single: list[dict[str, Any]] = field(default_factory=list)
    """Attacks on single steps on single inputs, one dict an input."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What would change it, one dict a change."""
    privacy: dict[str, Any] | None = None
    """What the first noise that was seen is worth."""
    not_tested: list[str] = field(default_factory=list)
    """What was not tried, and why."""
    error: str | None = None
    """Why the app could not be audited, or not to the end."""
    finished: bool = False
    """Whether nothing more comes."""
    messages: Counter[str] = field(default_factory=Counter)
    """Kind of message -> replies."""
    failures: Counter[str] = field(default_factory=Counter)
    """Sentence of an error that clients replied with -> how often."""
    _seen: list[AuditedExchange] = field(default_factory=list)
    _metrics: ReportedMetrics = field(default_factory=ReportedMetrics)
    _round: list[AuditedExchange] = field(default_factory=list)
    _alone: list[AuditedExchange] = field(default_factory=list)
    _shapes: list[tuple[int, ...] | None] = field(default_factory=list)
    _places: list[int] = field(default_factory=list)
    _ranges: Ranges = field(default_factory=dict)
    _pictures: list[Picture] = field(default_factory=list)
    _written: float = 0.0

    def run(self) -> None:
        """Load, play, judge, attack.

        Raises:
            FedtapError: the app cannot be audited; what was found by then is written.
        """
        try:
            self.write()
            now, seconds = time.monotonic(), seconds_left(self.settings.started, 60 * self.settings.minutes)
            end = now + seconds
            ended = self._play(now + _PLAYED * seconds, end)
            self._check()
            self.write()
            now = time.monotonic()
            self._attack(now + _AS_IT_IS * (end - now))
            self._attack_single(now + _ALONE_UNTIL * (end - now))
            self._measure_changes(end)
            if ended is not None:
                raise ended
        except FedtapError as error:
            self.error = str(error)
            raise
        finally:
            self.finished = True
            self.write()

    def _play(self, until: float, end: float) -> FedtapError | None:
        """Load and play the app; why it ended, where it had begun and did not come to its end.

        Args:
            until: value of time.monotonic() after which no round is begun.
            end: that at which another engine's processes are ended.

        Raises:
            FedtapError: it did not begin.
        """
        with standing_in(self.settings.data, self.settings.nodes) as asked:
            self.app = flower_app(self.settings.path, self.settings.overrides)
            try:
                if self.settings.engine:
                    late = self._play_on_engine(self.app, until, end, asked)
                else:
                    late = play_app(self.app, self.settings.nodes, self.settings.rounds, until, self._hear)
            except FedtapError as error:
                if not self._seen:
                    raise
                return error
        if self.settings.data:
            self.not_tested += asked or [NOT_ASKED]
        if late:
            self.not_tested.append("further rounds, for which there was no time: raise --minutes")
        return None

    def _play_on_engine(self, app: FlowerApp, until: float, end: float, asked: list[str]) -> bool:
        """Let one of Flower's engines play the app; whether time was over before as many rounds were played.

        Args:
            asked: what the app asked for and got local data for; what it asks its engine for is added.

        Raises:
            FedtapError: it did not come to its end.
        """
        settings, found = self.settings, FoundOnEngine(self.settings.out / "exchanges")
        if settings.home is None:
            raise FedtapError(
                f"--engine {settings.engine} needs a folder for Flower's files: start it by `fedtap audit`."
            )
        self.not_tested.append(NO_ATTACK_ON_ENGINES)
        data = str(settings.data) if settings.data else None
        about = Wrapping(*app.components, str(found.folder), data, settings.nodes, settings.rounds, until)
        play = EnginePlay(settings.engine, settings.path, settings.home, about, settings.overrides, end)

        def hear() -> None:
            self.exchanges = [one["exchange"] | {"input_range": None, "attacks": []} for one in found.exchanges]
            self._shapes = [None if one["shape"] is None else tuple(one["shape"]) for one in found.exchanges]
            self._ranges, self.messages, self.failures = found.ranges, found.messages, found.failures
            if time.monotonic() > self._written + _EVERY:
                self.write()

        play.play(found, hear)
        asked += [one for one in found.asked if one not in asked]
        return found.late

    def _hear(self, message: Message, reply: Message, training: LocalTraining, rnd: int) -> None:
        """Judge one exchange; nothing is raised into the app."""
        self.messages[message.metadata.message_type] += 1
        if reply.has_error():
            self.failures[short(reply.error.reason, 200)] += 1
            return
        self._metrics.note(message, reply, rnd)
        client = message.metadata.dst_node_id - SERVER_NODE - 1
        found = judged_and_noted(message, reply, training, client, rnd, self._ranges)
        if found is None:
            return
        exchange, shape = found
        self._shapes.append(shape)
        if exchange.verdict == NOISED and self.privacy is None:
            assert self.app is not None
            rounds = planned_rounds(self.app.run_config, self.settings.rounds)
            self.privacy = privacy_of(training, exchange.noise, rounds, mods_of(self.app.client))
        self.exchanges.append(exchange.told() | {"input_range": None, "attacks": []})
        kept = sum(one.training.size for one in self._seen)
        if exchange.attackable and (not kept or kept + exchange.training.size <= ROOM):
            self._seen.append(exchange)
            self._places.append(len(self.exchanges) - 1)
        elif exchange.attackable:
            self._untried("their inputs are more than is kept in memory", exchange.verdict)
        elif exchange.verdict != RAW:
            self._untried(exchange.hindrance or exchange.reason, exchange.verdict)
        if time.monotonic() > self._written + _EVERY:
            self.write()

    def _untried(self, reason: str, verdict: str) -> None:
        told = f"attacks on exchanges whose verdict is {verdict}: {reason}"
        if re.sub(r"\d", "", told) not in [re.sub(r"\d", "", before) for before in self.not_tested]:
            self.not_tested.append(told)

    def _check(self) -> None:
        """Refuse an app in which nothing happened.

        Raises:
            FedtapError: all clients failed, or none trained or sent anything.
        """
        moved = [one for one in self.exchanges if one["steps"] or "trained nothing" not in one["reason"]]
        if moved:
            return
        if self.failures:
            reason = self.failures.most_common(1)[0][0]
            raise FedtapError(
                f"Every client failed ({short(reason, 160)}): see that `flwr run` plays the app here, data included."
            )
        raise FedtapError(
            "The app trained nothing: no client sent weights that differ from those it was sent, so there is nothing "
            "to audit; give it more rounds or data, --rounds or --set."
        )

    def _attack(self, until: float) -> None:
        """Attack what was understood, in the order of the fewest inputs."""

        def inputs(exchange: AuditedExchange) -> tuple[int, int]:
            return sum(batch.count for batch in exchange.training.batches), exchange.round

        order = sorted(range(len(self._seen)), key=lambda place: inputs(self._seen[place]))
        if len(order) > _ATTACKED:
            self.not_tested.append(f"{len(order) - _ATTACKED} further exchanges like those that were attacked")
        first = min((one.round for one in self._seen), default=0)
        self._round = [one for one in self._seen if one.round == first]
        order = order[:_ATTACKED]
        self._seen = [self._seen[place] for place in order]
        self._places = [self._places[place] for place in order]
        for number, (exchange, place) in enumerate(zip(self._seen, self._places, strict=True)):
            now = time.monotonic()
            title = f"client {exchange.client}, round {exchange.round}"
            self._attack_one(exchange, self.exchanges[place], now + (until - now) / (len(order) - number), title)
            self.write()

    def _attack_single(self, until: float) -> None:
        """Attack single steps on single inputs of the first exchange, where the app's own is more than that."""
        if not self._seen or self._seen[0].hindrance:
            return
        exchange = self._seen[0]
        best = best_explained(self.exchanges[self._places[0]]["attacks"])
        if best and set(best["levels"]) == {LEVELS[2]}:  # nothing hides them
            return
        if len(exchange.training.steps) == len(exchange.training.batches) == 1:
            (batch,) = exchange.training.batches
            if batch.count == 1:
                return
        try:
            alone = single_steps(exchange, _SINGLE)
        except Exception as error:  # the app's model may raise whatever it likes
            self.not_tested.append(f"a single step on a single input: {short(error, 300)}")
            return
        self._alone = alone
        for number, one in enumerate(alone):
            now = time.monotonic()
            told: dict[str, Any] = {"client": one.client, "round": one.round, "input": number, "attacks": []}
            title = f"client {one.client}, one step on input {number} alone"
            self._attack_one(one, told, now + (until - now) / (len(alone) - number), title)
            if told["attacks"]:
                self.single.append(told)
            self.write()

    def _measure_changes(self, until: float) -> None:
        """Attack what other ways to run the app would send, and play it with them to see what they cost."""
        if not self._seen or self._seen[0].hindrance or self.app is None:
            return
        exchange = self._seen[0]
        exposed = self._alone[0] if self._alone else exchange  # at its most exposed, where that was attacked
        rounds = planned_rounds(self.app.run_config, self.settings.rounds)
        tried, untried = changes_of(self.app, exchange, rounds)
        self.not_tested += untried
        of_sum = {"change": f"secure aggregation: the server reads the mean of {len(self._round)} clients"}
        try:
            self._attack_change(of_sum, summed(self._round), until, len(tried) + 1)
            self.changes.append(of_sum)
        except FedtapError as error:
            self.not_tested.append(str(error))
        for number, change in enumerate(tried):
            now = time.monotonic()
            end = now + (until - now) / (len(tried) - number)
            told: dict[str, Any] = {"change": change.told, "epsilon": change.epsilon, "attacks": []}
            self.changes.append(told)
            try:
                if change.defence:
                    told["single"] = exposed is not exchange
                    self._attack_change(told, hidden(exposed, change, self.settings.seed), end, 2)
                self._play_changed(change, told, exchange, end)
            except FedtapError as error:
                told["error"] = str(error)
            self.write()

    def _attack_change(self, told: dict[str, Any], exchange: AuditedExchange, until: float, parts: int) -> None:
        """Attack an exchange as a change makes it, within the first of so many parts of the time that is left."""
        now = time.monotonic()
        told |= {"client": exchange.client, "round": exchange.round, "attacks": []}
        title = f"client {exchange.client}, {_SHORT.get(told.get('epsilon'), told['change'].partition(':')[0])}"
        self._attack_one(exchange, told, now + (until - now) / parts, title)

    def _play_changed(self, change: Change, told: dict[str, Any], like: AuditedExchange, until: float) -> None:
        """Play the app with the change: what its clients report then, and, of a changed run config, attack it.

        Raises:
            FedtapError: the app does not play with it.
        """
        assert self.app is not None
        overrides = (*self.settings.overrides, *change.overrides)
        client = changed_client(self.app, change, like, self.settings.seed)
        app = reconfigured(self.app, self.settings.path, overrides, client)
        metrics, found = ReportedMetrics(), list[AuditedExchange]()

        def seen(message: Message, reply: Message, training: LocalTraining, rnd: int) -> None:
            metrics.note(message, reply, rnd)
            if change.overrides and not found and not reply.has_error():
                one = judged(message, reply, training, message.metadata.dst_node_id - SERVER_NODE - 1, rnd)
                if one is not None and one.attackable:
                    note_inputs(self._ranges, one)
                    found.append(one)

        with standing_in(self.settings.data, self.settings.nodes):
            play_app(app, self.settings.nodes, self.settings.rounds, until, seen)
        told |= metric_told(self._metrics, metrics)
        if found:
            self._attack_change(told, found[0], until, 1)

    def _attack_one(self, exchange: AuditedExchange, told: dict[str, Any], until: float, title: str) -> None:
        try:
            target = attackable(exchange, self._ranges)
        except Exception as error:  # the app's model may raise whatever it likes
            kind = "" if isinstance(error, FedtapError) else f"{type(error).__name__}: "
            self._untried(f"{kind}{short(error, 300)}", exchange.verdict)
            return
        blind = self._ranges[target.leak.protocol.shape].blind(exchange.client)
        picture = Picture(title, target.images, {}, blind)
        attacks, refusals = suitable(target.leak)
        for refusal in refusals:
            self._untried(refusal, exchange.verdict)
        if attacks and target.assumed:
            told["assumed"] = target.assumed
        for row in attacked(target, attacks, blind, self.settings.seed, until):
            found = row.pop("found", None)
            told["attacks"].append(row)
            if found is not None:
                label = row["attack"].partition("(")[0]
                picture.reconstructions[label] = (found, row["psnr"])
                picture.levels[label] = row["levels"]
        if picture.reconstructions and target.images.shape[2] > 1:  # a table's row is no picture
            self._pictures.append(picture)
        best = best_explained(told["attacks"])
        for row in told["attacks"]:
            row["chosen"] = row is best

    def document(self) -> dict[str, Any]:
        """What audit.json holds."""
        app = self.app
        for told, shape in zip(self.exchanges, self._shapes, strict=True):  # each exchange may widen a range
            told["input_range"] = None if shape is None else list(map(list, self._ranges[shape].ends()))
        return {
            "schema": AUDIT_SCHEMA,
            "app": {
                "name": app.name if app else self.settings.path.name,
                "version": app.version if app else None,
                "run_config": dict(app.run_config) if app else {},
                "nodes": self.settings.nodes,
                "rounds": self.settings.rounds,
                "messages": dict(self.messages),
                "failures": dict(self.failures),
                "files": app.digest if app else None,
            },
            "repeat": self.settings.command(),
            "risk": risk_of(self.exchanges, app.name if app else self.settings.path.name),
            "exchanges": self.exchanges,
            "single_steps": self.single,
            "changes": self.changes,
            "privacy": self.privacy,
            "not_tested": [*self.not_tested, *NEVER_TRIED],
            "seed": self.settings.seed,
            "minutes": self.settings.minutes,
            **environment(torch.device("cpu")),
            "finished": self.finished,
            "error": self.error,
        }

    def write(self) -> None:
        """audit.json, report.html and junit.xml of what is known by now."""
        write_audit(self.settings.out, self.document(), self._pictures)
        self._written = time.monotonic()


def write_audit(out: Path, document: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> None:
    """audit.json, report.html and junit.xml in this folder.

    Raises:
        FedtapError: the folder cannot be written.
    """
    write_atomically(out / "audit.json", json.dumps(finite(document), indent=1).encode() + b"\n")
    write_atomically(out / "report.html", audit_page(document, pictures).encode())
    write_atomically(out / "junit.xml", junit(document))
