"""Play scenarios from end to end: rounds → leaks → guesses → scores → rows → report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedtap.simulator import scores
from fedtap.simulator.attack import Attack, Reconstructed, Reconstruction, generator, reply_parts
from fedtap.simulator.auxiliary import Auxiliary, Provenance, digest, digest_of
from fedtap.simulator.defences.accountant import mechanism_of
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import ClientError, DamagedError, FedtapError, short
from fedtap.simulator.federation.equal_loss import nearest, strengths_of, undefended
from fedtap.simulator.federation.rounds import Heard, auxiliary, clients_on, play
from fedtap.simulator.federation.settings import PrivateData, Scenario, private_data
from fedtap.simulator.leaks import Leak, Protocol, float_buffers, stack
from fedtap.simulator.models.registry import build
from fedtap.simulator.progress import progress
from fedtap.simulator.report import page as report
from fedtap.simulator.report import study_report
from fedtap.simulator.report.folder import Folder, Row, judged
from fedtap.simulator.report.outcomes import outcome
from fedtap.simulator.wire.records import tensors_of
from fedtap.simulator.wire.soundness import doubts, unexplained, warned
from fedtap.simulator.wire.threat_models import SECURE

PICTURES = 8
"""Victims shown in the strip and on the page."""

PAIRS = 10_000
"""Auxiliary pairs where the scenario names no number and the dataset has as many, mirror images included."""


def device_named(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1` …; an empty name means cuda if there is one.

    Raises:
        FedtapError: this machine has no such device.
    """
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
    parts: Sequence[Scenario],
    grid_for: Callable[[Scenario], Grid],
    out: Path,
    *,
    device: torch.device,
    data_root: Path,
    resume: bool = False,
    overwrite: bool = False,
    overhead: Callable[[Scenario, PrivateData], float | None] = lambda part, private: None,
) -> list[Row]:
    """Play each part over its grid and attack what was heard; `out` holds what a run leaves.

    Args:
        resume: go on with the run that `out` holds; its finished attacks are not made again.
        overwrite: replace a run with other settings that `out` holds.
        overhead: measures how many times as long an exchange takes a client with a part's defence as without.

    Raises:
        FedtapError: a part cannot be played, one of its attacks cannot use its leaks, or `out` holds something else.
    """
    about = described_run(parts, device)
    judged(out, about, resume=resume, overwrite=overwrite)  # before an hour is spent
    for part in parts:
        promised(part)
        for attack in part.attacks:
            attack.check_auxiliary(part.auxiliary_trainings)
        if part.accuracy_loss:
            undefended(parts, part)
    folder: Folder | None = None
    pictures: dict[Any, report.Picture] = {}
    leak: Leak | None = None
    notes: dict[str, None] = {}
    trainings = Trainings(parts, grid_for, data_root)
    for number, part in enumerate(progress(parts, "scenario")):
        unit = f"part_{number}"
        found = part.alone(parts)
        if found is not None or not trainings.attacked(number):
            folder = folder or Folder(out, about, resume, overwrite)
            folder.replace(
                unit, [row | {"unit": unit} for row in (trainings.tried(number) if found is None else found)]
            )
            if found is not None or part is parts[-1]:
                _report(folder, parts, leak, list(pictures.values()), notes, finished=part is parts[-1])
            continue
        grid, private, heard = trainings.played(number)
        fewer = ""
        if private.scenario.victims < part.victims:
            fewer = f"{part.dataset} has images for {private.scenario.victims} victims and not for {part.victims}."
            warnings.warn(fewer, stacklevel=2)
        notes |= dict.fromkeys(filter(None, (private.dataset.note, fewer)))
        leak = stack([heard.leaks[name] for name in private.names() if name in heard.leaks]) if heard.leaks else None
        if leak is not None:
            for attack in part.attacks:
                attack.accepts(leak)
            _warn(leak)
        folder = folder or Folder(out, about, resume, overwrite)
        if leak is not None:
            folder.leak(unit, leak)
        played = Played(part, number, private, heard, leak, out, grid, overhead, trainings.lost(number))
        for order, attack in enumerate(part.attacks):
            guess = _attack(played, order, attack, folder, device)
            if guess is not None:
                _show(pictures, played, attack, guess, folder.rows)
            done = part is parts[-1] and order == len(part.attacks) - 1
            _report(folder, parts, leak, list(pictures.values()), notes, finished=done)
    assert folder is not None
    folder.finish()
    return folder.rows


class Trainings:
    """A run's parts, played: each when it is asked for, and once where others are held against it."""

    def __init__(self, parts: Sequence[Scenario], grid_for: Callable[[Scenario], Grid], data_root: Path) -> None:
        self.parts, self.grid_for, self.data_root = parts, grid_for, data_root
        self._kept: dict[int, tuple[Grid, PrivateData, Heard]] = {}

    def played(self, number: int) -> tuple[Grid, PrivateData, Heard]:
        """The part's grid, who held what, and what was heard."""
        if number in self._kept:
            return self._kept[number]
        part = self.parts[number]
        grid = self.grid_for(part)
        private = private_data(part, self.data_root, clients_on(grid, part))
        made = grid, private, play(part, grid, private, number)
        if part.accuracy_loss:
            self._kept[number] = made
        return made

    def attacked(self, number: int) -> bool:
        """Whether this part is attacked: always, or if its defence comes nearest to the loss that is agreed on."""
        part = self.parts[number]
        if not part.accuracy_loss or part.defence == "none":
            return True
        others = strengths_of(self.parts, part)
        return number == nearest(others, lambda one: self._lost(one, "held_out"), part.accuracy_loss)

    def tried(self, number: int) -> list[Row]:
        """Of a part that is not attacked the one row, if it was trained."""
        if number not in self._kept:
            return []
        part, heard = self.parts[number], self._kept[number][2]
        told = {"defence": part.defence, "dataset": part.dataset, "model": part.model, "seed": part.seed}
        return [{"scenario": part.name, **told, "accuracy": heard.accuracy, **self.lost(number)}]

    def lost(self, number: int) -> Row:
        """What the part's defence costs, on public and on test images; nothing where no loss is agreed on."""
        if not self.parts[number].accuracy_loss:
            return {}
        held_out = self.played(number)[2].held_out
        return {"held_out": held_out, "accuracy_lost": self._lost(number, "accuracy")}

    def _lost(self, number: int, which: str) -> float:
        """Of `accuracy` or `held_out`."""
        other = undefended(self.parts, self.parts[number])
        before, after = (getattr(self.played(one)[2], which) for one in (other, number))
        return before - after  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Played:
    """A part of a run after its rounds: what was heard, and what the scorer knows of it."""

    part: Scenario
    number: int
    private: PrivateData
    heard: Heard
    leak: Leak | None
    out: Path
    grid: Grid
    measure: Callable[[Scenario, PrivateData], float | None]
    lost: Row

    @cached_property
    def overhead(self) -> float | None:
        """What the defence costs a client: measured once, where rows are made."""
        return self.measure(self.part, self.private)

    @cached_property
    def auxiliary(self) -> Auxiliary:
        """The part's auxiliary pairs: those of its folder, or heard now and kept there."""
        part, dataset = self.part, self.private.dataset
        wanted, batch = part.pairs or min(self.private.most_pairs, PAIRS), part.batch * part.summed
        images, labels = dataset.auxiliary.batch(torch.arange(wanted * batch) % len(dataset.auxiliary))
        mirrored = torch.arange(len(images)) >= len(dataset.auxiliary)
        images[mirrored] = images[mirrored].flip(3)
        if part.auxiliary_labels == "random":  # of all classes, also of those whose images the adversary lacks
            draw = generator(part.seed, "practice labels")
            labels = torch.randint(len(dataset.classes), labels.shape, generator=draw)
        protocol = dataclasses.replace(part.protocol(dataset), local_steps=1)
        known = {
            **tensors_of(self.heard.auxiliary_weights(part.auxiliary_at)),
            "examples": dataset.auxiliary.images,
            "classes": dataset.auxiliary.labels,
        }
        plain = not part.auxiliary_trainings and part.auxiliary_labels == "own"
        if part.defence != "none" or not plain:  # then what is drawn depends on the seed
            known["seed"] = torch.tensor(part.seed)
        about = Provenance(
            protocol,
            part.dataset,
            wanted,
            part.auxiliary_source,
            part.auxiliary_trainings,
            digest=digest(known),
            labels=part.auxiliary_labels,
        )
        same = dataclasses.replace(about, pairs=0) if plain else about  # of plain pairs the first ones will do
        root = Path(part.auxiliary) if part.auxiliary else self.out / "auxiliary"
        folder = root / digest_of(same)
        found = Auxiliary.saved(folder, build, about)
        if found is not None and len(found) >= wanted:
            return found.first(wanted)
        batches = (images.view(wanted, batch, *dataset.shape), labels.view(wanted, batch))
        heard = auxiliary(self.grid, part, self.private, self.heard, *batches, part=self.number)
        skeleton = build(part.architecture, dataset.shape, len(dataset.classes))
        return Auxiliary.record(folder, about, skeleton, progress(heard, "auxiliary"))

    @cached_property
    def doubts(self) -> list[str | None]:
        """Of each victim in the leak, what contradicts the protocol."""
        return _joined(doubts(self.leak)) if self.leak is not None else []

    @cached_property
    def truths(self) -> list[tuple[Tensor, Tensor]]:
        """Images and labels of each victim in the leak."""
        return [self.private.behind(*name) for name in self.private.names() if name in self.heard.leaks]

    @cached_property
    def floor(self) -> Tensor:
        """The blind guess: one image."""
        public = self.private.dataset.auxiliary
        return scores.blind(public.batch(torch.arange(len(public)))[0])


def _attack(played: Played, order: int, attack: Attack, folder: Folder, device: torch.device) -> Reconstruction | None:
    """One attack's guess, and its rows in the folder; both from the folder where a resumed run has them already."""
    unit = _unit(f"part_{played.number}-{order}", attack)
    settled = _common(played.part, unit, attack, played.private.clients)
    if "not_covered" in settled and played.leak is not None and float_buffers(played.leak.network):
        settled["not_covered"] += ", BatchNorm's statistics"
    before = folder.before.get(unit, [])
    if _complete(played, settled, before):
        kept = None if played.leak is None else folder.kept(unit, played.leak)
        if kept is not None or all(row["error"] for row in before):
            folder.replace(unit, before)
            return kept
    common = settled | {"overhead": played.overhead} | played.lost
    missing = [name for name in played.private.names() if name not in played.heard.leaks]
    rows: list[Row] = [
        common | {"client": client, "round": rnd, "error": played.heard.why_missing(client, rnd)}
        for client, rnd in missing
    ]
    guess = None
    if played.leak is not None:
        ready, timing = attack, {}
        if attack.needs_auxiliary:
            told: Row = {}
            try:
                pairs = dataclasses.replace(played.auxiliary, device=str(device))
                began, told = time.perf_counter(), {"pairs": len(pairs)}
                ready = attack.fit(pairs, played.part.seed)
            except DamagedError:
                raise
            except FedtapError as error:  # there are no pairs, or it cannot learn from these: a result, like any other
                if not told and not isinstance(error, ClientError):
                    raise
                names = zip(played.leak.clients.tolist(), played.leak.rounds.tolist(), strict=True)
                failed = common | told | {"error": str(error)}
                rows += [failed | {"client": client, "round": rnd} for client, rnd in names]
                folder.replace(unit, rows)
                return None
            timing = {"pairs": len(pairs), "fit_seconds": time.perf_counter() - began}
            for number, learned in enumerate(ready.learned()):
                where = f"part_{played.number}-{order}" + (f"-{number}" if number else "")
                learned.save(folder.path / f"trained_attacks/{_unit(where, learned)}.safetensors")
            ready.accepts(played.leak)
        began = time.perf_counter()
        leak = played.leak.to(device)
        guess = ready(leak, seed=played.part.seed)
        timing["seconds"] = (time.perf_counter() - began) / len(leak)
        left, guess = _left(leak, guess), guess.on_cpu()
        makers = guess.made_by or [None] * len(played.leak)
        rows += [
            common | timing | row | {"unexplained": share, "doubts": doubt, "strongest": made_by}
            for row, share, doubt, made_by in zip(_scored(played, guess), left, played.doubts, makers, strict=True)
        ]
        folder.keep(unit, guess)
    if played.part.delta is not None and played.part.success_db is not None:
        share = success_of(rows)
        rows = [row | share for row in rows]
    folder.replace(unit, rows)
    return guess


def _complete(played: Played, told: Row, rows: Sequence[Row]) -> bool:
    """Whether a resumed run has of each victim one row of this attack, with an error where nothing was heard.

    Args:
        told: the columns that are known before the attack; None in the place of what is measured.
    """
    victims = sorted((row["client"], row["round"]) for row in rows)
    known = json.loads(json.dumps(told))
    if victims != sorted(played.private.names()) or any(
        known.keys() - row.keys() or any(row[name] != value for name, value in known.items() if value is not None)
        for row in rows
    ):
        return False
    for row in rows:
        heard, error = (row["client"], row["round"]) in played.heard.leaks, row["error"]
        if (heard and error and row["pairs"] is None) or (not heard and not error):  # if heard, only to learn may fail
            return False
        if any(not isinstance(row[name], int | float | None) for name in MEASURED if name not in TOLD) or (
            not error and any(row[name] is None for name in ("recovered", "psnr_blind"))
        ):
            return False
    return True


def _scored(played: Played, guess: Reconstruction) -> list[Row]:
    """What is said of each victim in the leak: here the guess meets the truth."""
    assert played.leak is not None
    images, labels = (torch.stack(side) for side in zip(*played.truths, strict=True))
    scored = scores.score_all(guess.images, guess.labels, images, labels)
    return [
        {
            "client": client,
            "round": rnd,
            **{name: score[name] for name in SCORES},  # type: ignore[literal-required]
            **{note: score[note] for note in NOTES if score[note]},  # type: ignore[literal-required]
            "upper_bound_psnr": _best([each[victim].cpu() for each in guess.candidates], truth),
            **{name: score[name] for name in IMAGES},  # type: ignore[literal-required]
            **_blind(played.floor, truth),
            "accuracy": played.heard.accuracy,
            "drift_norm": played.heard.drift_norm[client, rnd],
            "objective": _finite(float(objective)),
            "error": None,
        }
        for victim, (client, rnd, score, truth, objective) in enumerate(
            zip(played.leak.clients.tolist(), played.leak.rounds.tolist(), scored, images, guess.objective, strict=True)
        )
    ]


def _blind(floor: Tensor, truth: Tensor) -> Row:
    """The blind guess's PSNR: of each of the victim's images, and their mean."""
    decibels = scores.psnr(scores.mse(floor.expand_as(truth), truth))
    return {"psnr_blind": float(decibels.mean()), "psnr_blind_images": [round(each, 2) for each in decibels.tolist()]}


def _best(candidates: Sequence[Tensor], truth: Tensor) -> float | None:
    """PSNR of the candidate nearest to the truth: an upper bound, since no attacker can tell; None where none is."""
    ordered = (found[scores.match(found, truth)] for found in map(torch.nan_to_num, candidates))
    return max((float(scores.psnr(scores.mse(found, truth)).mean()) for found in ordered), default=None)


SHIFTS = ("auxiliary_classes", "auxiliary_labels", "target_dataset", "target_classes", "others")
"""Settings by which practice, victims and those beside them may differ; a row has those that are not as usual."""

SCORES = ("mse", "psnr", "ssim", "lpips", "label_correct", "recovered")
IMAGES = ("recognisable", "identical", "levels", "psnr_images")
NOTES = ("ssim_note", "lpips_note")
TIMED = ("pairs", "fit_seconds", "seconds")
JUDGED = ("unexplained", "doubts")
TOLD = ("levels", "psnr_images", "psnr_blind_images", "doubts")
"""Those of the columns below that hold lists or text."""
MEASURED = (*SCORES, *IMAGES, "psnr_blind", "psnr_blind_images", "accuracy", "drift_norm", "objective", *JUDGED, *TIMED)


def _common(part: Scenario, unit: str, attack: Attack, clients: int) -> Row:
    return {
        "scenario": part.name,
        **{knob: getattr(part, knob, value) for knob, value in part.swept},
        "attack": _label(attack, part.attacks),
        **adaptation(attack, part.defence),
        "defence": part.defence,
        "dataset": part.dataset,
        **{knob: getattr(part, knob) for knob in SHIFTS if getattr(part, knob) != getattr(Scenario, knob)},
        "model": part.model,
        "threat_model": part.threat_model,
        **({"clients": part.clients, "others": part.others} if part.threat_model == SECURE else {}),
        "batch": part.batch,
        "local_steps": part.local_steps,
        "seed": part.seed,
        **dict.fromkeys(MEASURED),
        **dict.fromkeys(("overhead", "strongest", "upper_bound_psnr")),
        **promised(part, clients),
        "settings": repr(attack),
        "unit": unit,
    }


def adaptation(attack: Attack, defence: str) -> Row:
    """Whether the attack takes the whole of an announced defence into account, and if it sets out to, why not.

    Where there is nothing to know, an attack counts as adapted that would be if there were.
    """
    missing = attack.unknown(defence)
    note = {"adaptive_note": f"does not know {'+'.join(missing)}"} if missing and attack.adapts else {}
    return {"adaptive": not missing and (attack.adapts or bool(reply_parts(defence))), **note}


ADJACENCY = "add/remove"
"""Of the rows' ε for a client: one that is not there sends noise alone. An example of DP-SGD's is replaced."""

UNCOVERED = "number of examples, partition"
"""What travels beside every update in the clear, so that no ε covers it."""


def promised(part: Scenario, clients: int = 0) -> Row:
    """What the part's defence guarantees: ε of a victim's attacked exchanges, and of all in which a client takes part.

    Nothing where the part names no δ.

    Args:
        clients: honest ones on the grid; 0 means as many as the part names, or one a victim.

    Raises:
        FedtapError: no accountant here covers the defence.
    """
    if part.delta is None:
        return {}
    rounds = part.rounds + part.attacked_rounds(
        clients or part.clients or part.victims
    )  # a client answers in all of them
    defences = described(part.defence)
    try:
        once, ever = (
            mechanism_of(defences, ADJACENCY, releases, part.local_steps) for releases in (part.repeats, rounds)
        )
    except FedtapError as error:
        if part.success_db is not None:
            raise
        return {"epsilon": None, "epsilon_note": str(error), "delta": part.delta}
    guarantee = dataclasses.asdict(once.guarantee(part.delta))
    note = {} if math.isfinite(guarantee["epsilon"]) else {"epsilon_note": UNPROTECTED}
    guarantee["epsilon"] = float(f"{guarantee['epsilon']:.9g}")  # as it was asked for, where it was
    return {
        **{name: value if value != math.inf else None for name, value in guarantee.items()},
        **note,
        "epsilon_all": _finite(ever.guarantee(part.delta).epsilon),
        "releases": rounds,
        "sigma": once.sigma,
        "not_covered": UNCOVERED + (", drift norm" if part.local_samples else ""),
        **(dict.fromkeys(SUCCESS) | {"success_db": part.success_db} if part.success_db is not None else {}),
    }


SUCCESS = ("success_db", "success", "success_low", "success_high", "bound")
UNPROTECTED = "ε = ∞: it takes a clip, and noise after it"


def success_of(rows: Sequence[Row]) -> Row:
    """The share of an attack's images that came back, with Clopper and Pearson's 95 % interval.

    There is no bound beside it: nobody knows with what probability these images could have been guessed.
    """
    found = outcome(rows)
    if not found.images:
        return {}
    low, high = found.interval
    return {"success": found.share, "success_low": low, "success_high": high}


def _left(leak: Leak, guess: Reconstructed) -> list[float | None]:
    """Of each victim, the share of its gradient that a guess leaves unexplained; None where it cannot be told."""
    shares = unexplained(leak, guess.images, guess.labels) if isinstance(guess, Reconstruction) else None
    return [None] * len(leak) if shares is None else [_finite(share) for share in shares.tolist()]


def _warn(leak: Leak) -> list[list[str]]:
    """Say what is doubted of a leak, and return it."""
    found = doubts(leak)
    for line in warned(leak, found):
        warnings.warn(line, stacklevel=3)
    return found


def _joined(found: Sequence[Sequence[str]]) -> list[str | None]:
    return [" ".join(sentences) or None for sentences in found]


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _show(
    pictures: dict[Any, report.Picture], played: Played, attack: Attack, guess: Reconstruction, rows: Sequence[Row]
) -> None:
    """Add a guess to its victims' pictures. Parts that attack the same victims share them."""
    part, unit = played.part, _unit(f"part_{played.number}-{played.part.attacks.index(attack)}", attack)
    levels = {(row["client"], row["round"]): row.get("levels") for row in rows if row["unit"] == unit}
    shifts = tuple((knob, getattr(part, knob)) for knob in SHIFTS if getattr(part, knob) != getattr(Scenario, knob))
    swept = tuple((knob, getattr(part, knob, value)) for knob, value in part.swept)
    said = "".join(f", {knob.replace('_', ' ')} {value}" for knob, value in (*swept, *shifts))
    assert played.leak is not None
    for victim in range(min(len(played.leak), 2 if part.swept else PICTURES)):
        client, rnd = int(played.leak.clients[victim]), int(played.leak.rounds[victim])
        truth = played.truths[victim][0]
        found = guess.images[victim].nan_to_num()
        found = found[scores.match(found, truth)]
        key = (part.dataset, part.batch, part.local_steps, swept, shifts, client, rnd)
        if key not in pictures and len(pictures) < 2 * PICTURES:
            who = "sum" if part.summed > 1 else f"client {client}"
            title = who + (f", round {rnd}" if rnd > 1 else "") + said
            pictures[key] = report.Picture(title, truth, {}, played.floor.expand_as(truth))
        if key in pictures:
            psnr = float(scores.psnr(scores.mse(found, truth).mean()))
            column = f"{_label(attack, part.attacks)} on {part.model}"
            pictures[key].guesses[column] = (found, psnr)
            if not part.success_db:
                pictures[key].levels[column] = levels.get((client, rnd)) or ()


def _unit(where: str, attack: Attack) -> str:
    """Name of an attack's files: its place in the run, and its name, of which a file system may take only so much."""
    return f"{where}-{re.sub('[^a-z0-9_]+', '_', attack.name.lower()).strip('_')[:60]}"


def _label(attack: Attack, panel: Sequence[Attack]) -> str:
    """Its name; as it is written on the command line where the panel has two of that name."""
    return attack.name if sum(other.name == attack.name for other in panel) == 1 else attack.written()


def described_run(parts: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """What run.json says of a run of these parts: scenarios or studies, whose reprs hold all of their settings."""
    first = parts[0]
    scenario = {"name": first.name, "scenario": [repr(part) for part in parts], "question": first.question}
    return scenario | {"seed": first.seed} | environment(device)


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


THREATS = {
    "curious_server": "A curious server follows the protocol and keeps what it hears. It knows the weights it sent.",
    "eavesdropper": "An eavesdropper sees what each client sends, and knows the architecture but not the weights.",
    SECURE: "A server behind secure aggregation knows the weights it sent, and hears of each round the sum of what its "
    "clients send; from that it takes what its compromised client sends, and what it is told by others that collude.",
}

BATCHNORM = (
    "This model has BatchNorm in training mode: its batch's own statistics normalise each image, so the gradient of "
    "one image depends on the others, and says nothing of what the normalisation removed: the layers' means and scales."
)


SIMULATED = (
    "What a defence draws comes from the run's seed, so that the run can be repeated; the attacker does not use that. "
    "A real client's noise must come from its operating system, as with mod_of. "
)


def _threat(parts: Sequence[Scenario], network: nn.Module | None) -> str:
    batches, steps = ({getattr(part, knob) for part in parts} for knob in ("batch", "local_steps"))
    images, local = (" or ".join(map(str, sorted(values))) for values in (batches, steps))
    said = [
        *dict.fromkeys(THREATS[part.threat_model] for part in parts),
        f"Each honest client trains on {images} private image(s) for {local} local step(s) and sends its weights; "
        "their difference to the weights it was sent is its gradient, or the sum of several. "
        f"Defence: {' or '.join(dict.fromkeys(part.defence for part in parts))}. "
        + (SIMULATED if any(part.defence != "none" for part in parts) else "")
        + "The attacker is never shown a label or a pixel.",
        "Beside the honest clients, one client is compromised: the adversary reads its channel and can feed it.",
    ]
    if network is not None and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        said.append(BATCHNORM)
    return "\n".join(said)


def _report(
    folder: Folder,
    parts: Sequence[Scenario],
    leak: Leak | None,
    pictures: list[report.Picture],
    notes: Iterable[str],
    *,
    finished: bool,
) -> None:
    """strip.png and report.html of all that is finished so far."""
    parts = [part for part in parts if part.attacks]
    part = parts[0]
    settings = {
        field.name: " or ".join(dict.fromkeys(str(getattr(one, field.name)) for one in parts))
        for field in dataclasses.fields(Scenario)
        if field.name not in ("name", "question", "attacks", "swept") and field.name not in dict(part.swept)
    }
    attacks = dict.fromkeys(
        f"{row['attack']} on {row['model']}: {row['settings']}" for row in folder.rows if "attack" in row
    )
    about = report.About(
        scenario=part.name,
        question=part.question,
        threat="\n".join([_threat(parts, leak.network if leak is not None else None), *notes]),
        settings=settings | {"attacks": "\n".join(attacks)},
        environment=folder.about["versions"] | {"device": folder.about["device"], "started": folder.about["started"]},
        finished=finished,
    )
    report.write(folder.path, about, folder.rows, pictures)


ATTACK = "attack"
"""Name of a run that attacks a saved leak."""


def described_attack(
    leaks: Mapping[str, Leak | FedtapError],
    attacks_on: Callable[[Leak], Sequence[Attack]],
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """What run.json says of a run of these attacks on saved leaks."""
    sound = [leak for leak in leaks.values() if isinstance(leak, Leak)]
    known = hashlib.blake2b(b"".join(leak.packed() for leak in sound), digest_size=8).hexdigest()
    panel = dict.fromkeys(attack for leak in sound for attack in attacks_on(leak))
    scenario = [*(repr(leak.protocol) for leak in sound), *map(repr, panel)]
    about = {"name": ATTACK, "scenario": scenario, "leak": known, "question": f"What is in {_source(leaks)}?"}
    return {**about, "seed": seed, **environment(device)}


def _source(leaks: Mapping[str, Leak | FedtapError]) -> str:
    return next(iter(leaks)) if len(leaks) == 1 else f"{len(leaks)} leaks"


def attack_saved(
    leaks: Mapping[str, Leak | FedtapError],
    attacks_on: Callable[[Leak], Sequence[Attack]],
    out: Path,
    *,
    device: torch.device,
    seed: int,
    overwrite: bool = False,
) -> list[Row]:
    """Attack leaks of which there is no truth; `out` holds the guesses, pictures, and rows without scores.

    Args:
        leaks: by name; an error stands for one that could not be read, and is told in its row.
        attacks_on: what is tried on a leak.
        overwrite: replace a run with other settings that `out` holds.

    Raises:
        FedtapError: no attack can use any of the leaks, or `out` cannot be written.
    """
    about = described_attack(leaks, attacks_on, device, seed)
    judged(out, about, overwrite=overwrite)
    failed = {name: leak for name, leak in leaks.items() if isinstance(leak, FedtapError)}
    tried = {name: (leak, attacks_on(leak)) for name, leak in leaks.items() if not isinstance(leak, FedtapError)}
    units = [(name, leak, attack) for name, (leak, attacks) in tried.items() for attack in attacks]
    refused = [_refusal(leak, attack) for _, leak, attack in units]
    if all(refused):
        raise [*filter(None, refused), *failed.values()][0]
    panel = list(dict.fromkeys(attack for _, attacks in tried.values() for attack in attacks))
    source = _source(leaks)
    folder = Folder(out, about, overwrite=overwrite)
    pictures: dict[Any, report.Picture] = {}
    folder.add([{"leak": name, "attack": None, "error": str(error)} for name, error in failed.items()])
    doubted = {name: _joined(_warn(leak)) for name, (leak, _) in tried.items()}
    for order, ((name, leak, attack), why_not) in enumerate(zip(units, refused, strict=True)):
        many = {"leak": name} if len(leaks) > 1 else {}
        common: Row = {**many, "attack": _label(attack, panel), "model": leak.protocol.model}
        last: Row = {"settings": repr(attack), "unit": _unit(str(order), attack)}
        victims = list(zip(leak.clients.tolist(), leak.rounds.tolist(), strict=True))
        began = time.perf_counter()
        try:
            if why_not:
                raise why_not
            guess: Reconstructed = attack(there := leak.to(device), seed=seed)
        except FedtapError as error:
            told = {"error": str(error), **last}
            folder.add([common | {"client": client, "round": rnd} | told for client, rnd in victims])
            continue
        last = {"seconds": (time.perf_counter() - began) / len(leak), **last}
        left, guess = _left(there, guess), guess.on_cpu()
        folder.keep(str(last["unit"]), guess)
        rows = []
        for victim, (client, rnd) in enumerate(victims):
            objective = _finite(float(guess.objective[victim]))
            row = common | {"client": client, "round": rnd} | guess.columns(victim) | {"objective": objective}
            row |= {"unexplained": left[victim], "doubts": doubted[name][victim]}
            if isinstance(guess, Reconstruction):
                file = f"pictures/{last['unit']}-victim_{victim}.png"
                folder.write(file, report.png(guess.images[victim]))
                row |= {"picture": file}
                key = (name, victim)
                if key not in pictures and len(pictures) < PICTURES:
                    title = f"client {client}, round {rnd}"
                    pictures[key] = report.Picture(f"{name}, {title}" if many else title, None, {}, None)
                if key in pictures:
                    pictures[key].guesses[common["attack"]] = (guess.images[victim], None)
            rows.append(row | last | ({} if objective is not None else {"error": DIVERGED}))
        folder.add(rows)
    folder.describe(finished=True)
    protocols = dict.fromkeys(leak.protocol for leak, _ in tried.values())
    kinds = " or ".join(dict.fromkeys(leak.kind for leak, _ in tried.values()))
    page = report.About(
        scenario=f"What is in {source}?",
        question=f"Which data have this {kinds}? There is no truth to score against: look, read the objective, and of "
        "gradients how much a guess leaves unexplained.",
        threat="\n".join(
            dict.fromkeys(THREATS.get(p.threat_model, f"Its listener was: {p.threat_model}.") for p in protocols)
        ),
        settings={
            field.name: " or ".join(dict.fromkeys(str(getattr(protocol, field.name)) for protocol in protocols))
            for field in dataclasses.fields(Protocol)
        },
        environment=folder.about["versions"] | {"device": folder.about["device"]},
    )
    if pictures:
        folder.write("strip.png", report.strip([*pictures.values()]))
    folder.write("report.html", study_report.saved(page, folder.rows, [*pictures.values()]).encode())
    return folder.rows


DIVERGED = "the attack diverged: its objective is no finite number"


def _refusal(leak: Leak, attack: Attack) -> FedtapError | None:
    """Why the attack cannot be tried on this leak; None where it can."""
    try:
        attack.accepts(leak)
    except FedtapError as error:
        return error
    if not attack.needs_auxiliary:
        return None
    return FedtapError(
        f"{attack.name} has to practise first, and a saved leak brings no pairs: train it in a scenario "
        f"(`fedtap run git --attack '{attack.written()}'`), then give what that leaves, --trained-attack PATH."
    )
