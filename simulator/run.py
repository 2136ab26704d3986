"""The one loop: each setting of a scenario is observed, every attack runs on what was observed, and rows come out."""

from __future__ import annotations

import dataclasses
import platform
import re
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from fedtap.simulator.attack import Attack, Reconstructed, Reconstruction
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import ClientError, DamagedError, FedtapError, short
from fedtap.simulator.film import Film, filming
from fedtap.simulator.leaks import Leak
from fedtap.simulator.options import command_line, options_of
from fedtap.simulator.progress import progress
from fedtap.simulator.report.film import film_html, gif
from fedtap.simulator.report.folder import SCHEMA, Folder, check_folder
from fedtap.simulator.report.page import Page, write
from fedtap.simulator.report.papers import papers_of
from fedtap.simulator.report.pictures import Picture
from fedtap.simulator.scenario import Name, Observed, Row, Scenario, Scored, Session, Trial
from fedtap.simulator.wire.soundness import doubts, unexplained, warned

_PICTURES = 16
"""Victims whose pictures a page shows, at most."""


def device_named(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1` …; an empty name means cuda if there is one.

    Raises:
        FedtapError: this machine has no such device.
    """
    if not re.fullmatch(r"(cpu|cuda(:\d+)?)?", name):
        raise FedtapError(
            f"{short(name)!r} is no device on which fedtap computes: give cpu, cuda, or cuda:N for the GPU of number N."
        )
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise FedtapError(
            f"Device {short(name)!r} is not to be had here ({short(error, 120)}): use --device cpu."
        ) from error
    # A gradient is matched to seven digits: TF32's three would drown it.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return device


def run(
    settings: Sequence[Scenario],
    grid_for: Callable[[Scenario], Grid],
    out: Path,
    *,
    device: torch.device,
    data_root: Path,
    resume: bool = False,
    overwrite: bool = False,
    only: Collection[int] | None = None,
    film: bool = False,
) -> list[Row]:
    """Observe each setting over its grid, and attack what was observed; `out` holds what a run leaves.

    Args:
        only: the settings' places that are played, where it is not all: `out` then holds what a stopped run leaves.
        film: whether iterative attacks are filmed, for the page and for films/.
        resume: go on with the run that `out` holds; its finished attacks are not made again.
        overwrite: replace a run with other settings that `out` holds.

    Raises:
        FedtapError: a setting cannot be played, an attack cannot use its leak, or `out` holds something else.
    """
    about = described_run(settings, device)
    check_folder(out, about, resume=resume, overwrite=overwrite)  # before an hour is spent
    for setting in settings:
        setting.check(settings)
    return _Run(settings, grid_for, out, about, device, data_root, resume, overwrite, film).played(only)


class _Run:
    """A run under way: its settings, what was observed in them, and what the page shows by now."""

    def __init__(
        self,
        settings: Sequence[Scenario],
        grid_for: Callable[[Scenario], Grid],
        out: Path,
        about: dict[str, Any],
        device: torch.device,
        data_root: Path,
        resume: bool,
        overwrite: bool,
        film: bool,
    ) -> None:
        self.film = film
        self.settings, self.grid_for, self.out, self.about = settings, grid_for, out, about
        self.device, self.data_root, self.resume, self.overwrite = device, data_root, resume, overwrite
        self.folder: Folder | None = None
        self.pictures: dict[Any, Picture] = {}
        self.sections: dict[str, str] = {}
        self.notes: dict[str, None] = {}
        self.threats: dict[str, None] = {}
        self._observed: dict[int, tuple[Session, Any]] = {}

    def played(self, only: Collection[int] | None) -> list[Row]:
        """Play every setting, or those of these numbers; the rows."""
        for number, setting in enumerate(progress(self.settings, "setting")):
            if only is not None and number not in only:
                continue
            last = only is None and number == len(self.settings) - 1
            more = setting.compared(number, self.settings, self)
            if more is None:
                rows = setting.unattacked(number, self.settings, self)
                self._folder().replace(f"part_{number}", [self._named(setting, row, f"part_{number}") for row in rows])
            else:
                self._attacked(setting, number, more)
            self._folder().settled(f"part_{number}")
            if not setting.compares:
                self._observed.pop(number, None)
            self._write(finished=last)
        folder = self._folder()
        if only is None:
            folder.finish()
        return folder.rows

    def __getitem__(self, number: int) -> Any:
        """What was observed in a setting, which is played when it is first asked for."""
        return self._session(number)[1]

    def __contains__(self, number: object) -> bool:
        """Whether a setting has been played."""
        return number in self._observed

    def _session(self, number: int) -> tuple[Session, Any]:
        if number not in self._observed:
            grid = self.grid_for(self.settings[number])
            elsewhere = not getattr(grid, "instant", False)
            keep = (lambda leak: self._folder().observed(f"part_{number}", leak)) if elsewhere else None
            session = Session(grid, number, self.data_root, self.device, self.out, self.settings, keep)
            self._observed[number] = session, self.settings[number].observe(session)
        return self._observed[number]

    def _folder(self) -> Folder:
        """The run's folder, made when there is something to write into it."""
        if self.folder is None:
            self.folder = Folder(self.out, self.about, self.resume, self.overwrite)
        return self.folder

    def _named(self, setting: Scenario, row: Row, unit: str) -> Row:
        """A row with whose it is."""
        swept = {name: getattr(setting, name, value) for name, value in setting.swept}
        return {"scenario": setting.name, **swept, **row, "seed": setting.seed, "unit": unit}

    def _attacked(self, setting: Scenario, number: int, more: Row) -> None:
        session, observed = self._session(number)
        self.notes |= dict.fromkeys(observed.notes)
        leak: Leak | None = observed.leak
        self.threats |= dict.fromkeys(setting.threat(leak))
        doubted: list[str | None] = []
        if leak is not None:
            if not setting.refusal_is_result:
                for attack in setting.attacks:
                    attack.accepts(leak)
            doubted = doubts_of(leak) if setting.doubted else []
            if observed.keep:
                self._folder().leak(f"part_{number}", leak)
        for order, attack in enumerate(setting.attacks):
            self._attack(setting, session, observed, more, doubted, order, attack)
            if order < len(setting.attacks) - 1:
                self._write(finished=False)

    def _attack(
        self,
        setting: Scenario,
        session: Session,
        observed: Observed,
        compared: Row,
        doubted: Sequence[str | None],
        order: int,
        attack: Attack[Any],
    ) -> None:
        """One attack's rows, in the folder; from the folder, where a resumed run has them already."""
        folder = self._folder()
        unit, label = unit_of(f"part_{session.number}-{order}", attack), label_of(attack, setting.attacks)
        settled = setting.settled(attack, label, observed) | {"settings": hyperparameters(attack)}
        before = folder.done(unit)
        if before is not None:
            kept = None if observed.leak is None else folder.kept(unit, attack, observed.leak)
            if kept is not None or all(is_failure(row) for row in before):
                folder.replace(unit, before)
                if kept is not None and observed.leak is not None:
                    trial = Trial(session, observed, attack, observed.leak.to(session.device), kept, label)
                    self._show(setting, setting.shown(trial), label)
                    self._show_film(setting, unit, label, None)
                return

        common = settled | setting.measured(session, observed) | compared

        def failed(names: Mapping[Name, str], more: Row) -> list[Row]:
            return [common | more | {"client": one, "round": rnd, "error": why} for (one, rnd), why in names.items()]

        rows = failed(observed.missing, {})
        if observed.leak is not None:
            timing: Row = {}
            try:
                ready = attack
                if attack.needs_auxiliary:
                    ready = self._trained(setting, session, observed, order, attack, timing)
                if setting.refusal_is_result:
                    ready.accepts(observed.leak)
            except DamagedError:
                raise
            except FedtapError as error:  # no pairs came, or they teach nothing: a result, as any other
                if not (setting.refusal_is_result or timing or isinstance(error, ClientError)):
                    raise
                rows += failed(dict.fromkeys(observed.names, str(error)), timing)
            else:
                leak = observed.leak.to(session.device)
                began = time.perf_counter()
                try:
                    with filming() if self.film else nullcontext() as film:
                        found = ready(leak, seed=setting.seed, start=setting.start(leak))
                except FedtapError as error:  # of what it finds only as it works
                    if not setting.refusal_is_result:
                        raise
                    rows += failed(dict.fromkeys(observed.names, str(error)), timing)
                else:
                    timing["seconds"] = (time.perf_counter() - began) / len(leak)
                    left = unexplained_of(leak, found) if setting.doubted else []
                    found = found.on_cpu()
                    scored = setting.score(Trial(session, observed, ready, leak, found, label))
                    rows += [common | timing | row for row in _judged(scored.rows, found, left, doubted)]
                    folder.keep(unit, found)
                    self._show(setting, scored, label)
                    if film is not None and film.frames:
                        truths = getattr(observed, "truths", None)
                        folder.write(f"films/{unit}.gif", gif(film, truths[0][0] if truths else None))
                        self._show_film(setting, unit, label, film)
        folder.complete(unit, [self._named(setting, row, unit) for row in setting.finished(rows)])

    def _trained(
        self, setting: Scenario, session: Session, observed: Observed, order: int, attack: Attack[Any], timing: Row
    ) -> Attack[Any]:
        """The attack, trained on the setting's auxiliary pairs; what was learned is in the folder."""
        pairs = dataclasses.replace(setting.auxiliary_pairs(session, observed), device=str(session.device))
        timing["pairs"] = len(pairs)
        began = time.perf_counter()
        ready = attack.fit(pairs, setting.seed)
        timing["fit_seconds"] = time.perf_counter() - began
        for number, learned in enumerate(ready.learned()):
            where = f"part_{session.number}-{order}" + (f"-{number}" if number else "")
            learned.save(self._folder().path / f"trained_attacks/{unit_of(where, learned)}.safetensors")
        return ready

    def _show(self, setting: Scenario, scored: Scored, label: str) -> None:
        """Add a trial's pictures and sections to the page. Settings that attack the same victims share their
        pictures; a section says of which setting it is, and of which attack where there are several."""
        for key, picture in scored.pictures.items():
            if key in self.pictures:
                self.pictures[key].reconstructions.update(picture.reconstructions)
                self.pictures[key].levels.update(picture.levels)
            elif len(self.pictures) < _PICTURES:
                self.pictures[key] = picture
        said = [f"{name.replace('_', ' ')} {value}" for name, value in setting.swept]
        where = ", ".join(said + [label] * (len(setting.attacks) > 1))
        self.sections |= {f"{head}{f' ({where})' if where else ''}": one for head, one in scored.sections.items()}

    def _show_film(self, setting: Scenario, unit: str, label: str, film: Film | None) -> None:
        """Add to the page what was filmed of an attack, in this run or in the one that is resumed."""
        path = self._folder().path / f"films/{unit}.gif"
        if self.film and path.is_file():
            where = ", ".join(f"{name} {getattr(setting, name, value)}" for name, value in setting.swept)
            heading = f"Film of {label}{f' ({where})' if where else ''}"
            self.sections[heading] = film_html(path.read_bytes(), label, film)

    def _write(self, *, finished: bool) -> None:
        """strip.png and report.html of all that is done by now."""
        folder, first = self._folder(), self.settings[0]
        options = options_of(type(first))
        sound = [row for row in folder.rows if not is_failure(row)]
        swept = dict(first.swept)
        told: dict[str, dict[str, None]] = {}
        for setting in self.settings:
            for name, value in setting.told().items():
                told.setdefault(name, {})[str(value)] = None
        page = Page(
            title=first.name,
            question=first.question,
            threat="\n".join([*self.threats, *self.notes]),
            settings={name: " or ".join(values) for name, values in told.items() if name not in swept},
            environment=folder.about["versions"]
            | {"device": folder.about["device"], "started": folder.about["started"]},
            finished=finished,
            charts=(dict(first.charts(sound)) if sound else {}) | self.sections,
            pictures=list(self.pictures.values()),
            defaults={name: str(known.values[0]) for name, known in options.items() if len(known.values) == 1},
            command=folder.about["command"],
            papers=papers_of(attack for setting in self.settings for attack in setting.attacks)
            | papers_of(part for setting in self.settings for part in described(getattr(setting, "defence", "none"))),
        )
        write(folder.path, *first.shown_on(page, folder.rows))


def _judged(
    rows: Sequence[Row], found: Reconstructed, left: Sequence[float | None], doubted: Sequence[str | None]
) -> list[Row]:
    """Rows of one victim each, with what speaks against them: what is left unexplained, and what contradicts the
    protocol."""
    if not left or len(rows) != len(left):
        return list(rows)
    makers = getattr(found, "made_by", ()) or [None] * len(rows)
    more = [
        {"unexplained": share, "doubts": doubt, "strongest": made_by}
        for share, doubt, made_by in zip(left, doubted, makers, strict=True)
    ]
    return [
        row | {name: value for name, value in one.items() if name in row or value is not None}
        for row, one in zip(rows, more, strict=True)
    ]


def is_failure(row: Row) -> bool:
    """Whether the row says why its victim was not attacked; in some scenarios' rows `error` is a relative error."""
    return isinstance(row.get("error"), str)


def unexplained_of(leak: Leak, found: Reconstructed) -> list[float | None]:
    """Of each victim, the share of its gradient that a reconstruction leaves unexplained, at the weights that it
    estimates, if it does; None where the share is not known."""
    if not isinstance(found, Reconstruction):
        return [None] * len(leak)
    if found.weights is not None:
        leak = leak.at(found.weights)
    shares = unexplained(leak, found.images, found.labels)
    return [None] * len(leak) if shares is None else [finite(share) for share in shares.tolist()]


def doubts_of(leak: Leak) -> list[str | None]:
    """Of each victim, what contradicts the protocol, which is also warned of."""
    found = doubts(leak)
    for line in warned(leak, found):
        warnings.warn(line, stacklevel=3)
    return [" ".join(sentences) or None for sentences in found]


def finite(value: Any) -> Any:
    """The value, with None in the place of each number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def hyperparameters(attack: Attack[Any]) -> Row:
    """An attack's name and all of its fields, as JSON holds them."""
    fields = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack) if field.repr}  # type: ignore[arg-type]
    return {"attack": attack.name} | {
        name: hyperparameters(value)
        if isinstance(value, Attack)
        else value
        if isinstance(value, int | float | str | bool | None)
        else str(value)
        for name, value in fields.items()
    }


def unit_of(where: str, attack: Attack[Any]) -> str:
    """Name of an attack's files: its place in the run, and its name, of which a file system may take only so much."""
    return f"{where}-{re.sub('[^a-z0-9_]+', '_', attack.name.lower()).strip('_')[:60]}"


def label_of(attack: Attack[Any], attacks: Sequence[Attack[Any]]) -> str:
    """An attack's name; as it is written on the command line where there are two of that name."""
    return attack.name if sum(other.name == attack.name for other in attacks) == 1 else attack.written()


def described_run(settings: Sequence[Scenario], device: torch.device) -> dict[str, Any]:
    """What run.json says of a run of these settings."""
    first = settings[0]
    return {
        "schema": SCHEMA,
        "name": first.name,
        "question": first.question,
        "command": command_of(settings),
        "settings": [{"scenario": type(setting).__name__} | finite(setting.told()) for setting in settings],
        "seed": first.seed,
    } | environment(device)


def command_of(settings: Sequence[Scenario]) -> str:
    """The command line that plays these settings: with the options that were given, or, of settings that no command
    line made, with those that are not at their defaults."""
    first = settings[0]
    options = options_of(type(first))
    values: dict[str, list[Any]] = {}
    for name in options:  # a setting of another kind may lack it
        found = [getattr(setting, name) for setting in settings if hasattr(setting, name)]
        values[name] = list({str(value): value for value in found}.values())
    given = [name for name in options if first.given is None and values[name] != list(options[name].values)]
    given += [name for name in first.given or () if name in options]
    return command_line(first.name, {name: values[name] for name in given}, options)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and time, for run.json and the page."""
    return {
        "device": device_name(device),
        "versions": {
            "fedtap": version("fedtap"),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "flwr", "numpy", "scikit-image", "lpips")},
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU's kind and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
