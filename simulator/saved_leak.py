"""The same loop for leaks from files: there is no truth here, so there are no scores."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedtap.simulator.attack import Attack, Reconstructed, Reconstruction
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.extraction import Extraction
from fedtap.simulator.federation.settings import THREATS
from fedtap.simulator.leaks import Leak, Protocol
from fedtap.simulator.report.columns import Column
from fedtap.simulator.report.folder import SCHEMA, Folder, check_folder
from fedtap.simulator.report.page import Page, write
from fedtap.simulator.report.papers import papers_of
from fedtap.simulator.report.pictures import Picture, png
from fedtap.simulator.run import doubts_of, environment, finite, hyperparameters, label_of, unexplained_of, unit_of
from fedtap.simulator.scenario import Row
from fedtap.simulator.wire.soundness import CAUSES, EXPLAINED

_PICTURES = 8
"""Victims whose pictures are shown, at most."""

ATTACK = "attack"
"""Name of a run that attacks a saved leak."""


class SavedLeaks(Mapping[str, Leak | FedtapError]):
    """Leaks by the names of their files, read as they are asked for: a folder may hold more than the memory does.

    An error stands for a file that could not be read.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Leak | FedtapError]) -> None:
        self._paths, self._read = {path.name: path for path in paths}, read
        self._last: tuple[str, Leak | FedtapError] | None = None

    def __getitem__(self, name: str) -> Leak | FedtapError:
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is read
            self._last = name, self._read(self._paths[name])
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def described_attack(
    leaks: Mapping[str, Leak | FedtapError],
    attacks_on: Callable[[Leak], Sequence[Attack]],
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """What run.json says of a run of these attacks on saved leaks."""
    known = hashlib.blake2b(digest_size=8)
    protocols, panel = [], dict[Attack, None]()
    for leak in leaks.values():  # one at a time, since a diffusion model's is several gigabytes
        if isinstance(leak, Leak):
            known.update(leak.packed())
            protocols.append(finite(dataclasses.asdict(leak.protocol)))
            panel |= dict.fromkeys(attacks_on(leak))
    about = {
        "schema": SCHEMA,
        "name": ATTACK,
        "question": f"What is in {_source(leaks)}?",
        "settings": [*protocols, *map(hyperparameters, panel)],
        "leak": known.hexdigest(),
    }
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
    """Attack leaks of which there is no truth; `out` holds the reconstructions, pictures, and rows without scores.

    Args:
        leaks: by name; an error stands for one that could not be read, and is told in its row.
        attacks_on: what is tried on a leak.
        overwrite: replace a run with other settings that `out` holds.

    Raises:
        FedtapError: no attack can use any of the leaks, or `out` cannot be written.
    """
    about = described_attack(leaks, attacks_on, device, seed)
    check_folder(out, about, overwrite=overwrite)
    failed: dict[str, FedtapError] = {}
    units: list[tuple[str, Attack, FedtapError | None]] = []
    protocols, kinds = dict[Protocol, None](), dict[str, None]()
    for name, leak in leaks.items():
        if isinstance(leak, FedtapError):
            failed[name] = leak
            continue
        units += [(name, attack, _refusal(leak, attack)) for attack in attacks_on(leak)]
        protocols[leak.protocol] = kinds[leak.kind] = None
    refused = [why_not for _, _, why_not in units]
    if all(refused):
        raise [*filter(None, refused), *failed.values()][0]
    panel = list(dict.fromkeys(attack for _, attack, _ in units))
    source = _source(leaks)
    folder = Folder(out, about, overwrite=overwrite)
    pictures: dict[Any, Picture] = {}
    folder.add([{"leak": name, "attack": None, "error": str(error)} for name, error in failed.items()])
    doubted: dict[str, list[str | None]] = {}
    for order, (name, attack, why_not) in enumerate(units):
        leak = leaks[name]
        if isinstance(leak, FedtapError):  # its file was there before
            folder.add([{"leak": name, "attack": None, "error": str(leak)}])
            continue
        if name not in doubted:
            doubted = {name: doubts_of(leak)}
        many = {"leak": name} if len(leaks) > 1 else {}
        common: Row = {**many, "attack": label_of(attack, panel), "model": leak.protocol.model}
        last: Row = {"settings": hyperparameters(attack), "unit": unit_of(str(order), attack)}
        victims = list(zip(leak.clients.tolist(), leak.rounds.tolist(), strict=True))
        began = time.perf_counter()
        try:
            if why_not:
                raise why_not
            found: Reconstructed = attack(there := leak.to(device), seed=seed)
        except FedtapError as error:
            told = {"error": str(error), **last}
            folder.add([common | {"client": client, "round": rnd} | told for client, rnd in victims])
            continue
        last = {"seconds": (time.perf_counter() - began) / len(leak), **last}
        left, found = unexplained_of(there, found), found.on_cpu()
        folder.keep(str(last["unit"]), found)
        rows = []
        for victim, (client, rnd) in enumerate(victims):
            objective = finite(float(found.objective[victim]))
            row = common | {"client": client, "round": rnd} | found.columns(victim) | {"objective": objective}
            row |= {"unexplained": left[victim], "doubts": doubted[name][victim]}
            if isinstance(found, Reconstruction | Extraction):
                file = f"pictures/{last['unit']}-victim_{victim}.png"
                folder.write(file, png(found.images[victim]))
                row |= {"picture": file}
                key = (name, victim)
                if key not in pictures and len(pictures) < _PICTURES:
                    title = f"client {client}, round {rnd}"
                    pictures[key] = Picture(f"{name}, {title}" if many else title, None, {}, None)
                if key in pictures:
                    pictures[key].reconstructions[common["attack"]] = (found.images[victim], None)
            rows.append(row | last | ({} if objective is not None else {"error": DIVERGED}))
        folder.add(rows)
    folder.describe(finished=True)
    page = Page(
        title=f"What is in {source}?",
        question=f"Which data have this {' or '.join(kinds)}? There is no truth to score against: look, read the "
        "objective, and of gradients how much a reconstruction leaves unexplained.",
        threat="\n".join(
            dict.fromkeys(THREATS.get(p.threat_model, f"Its threat model was {p.threat_model}.") for p in protocols)
        ),
        settings={
            field.name: " or ".join(dict.fromkeys(str(getattr(protocol, field.name)) for protocol in protocols))
            for field in dataclasses.fields(Protocol)
        },
        environment=folder.about["versions"] | {"device": folder.about["device"]},
        columns=columns_of_found(folder.rows),
        pictures=[*pictures.values()],
        papers=papers_of(panel),
        notes=["Reconstructions are in reconstructions/, images also in pictures/."],
    )
    write(folder.path, page, folder.rows)
    return folder.rows


_FOUND = (
    Column("objective", "the attack's own, lower is better", over="rows"),
    Column("sum_w", "private examples that the points stand for", over="rows"),
    Column("caption", "under which samples are drawn", over="rows"),
    Column("seconds", "for each victim", over="rows"),
    Column(
        "unexplained",
        f"share of the gradient that the reconstruction does not cause; over {EXPLAINED:g} it is {CAUSES}",
        over="rows",
    ),
    Column("error", over="rows", page=True),
    *(Column(name, over="hidden") for name in ("model", "settings", "unit", "ids")),
)


def columns_of_found(rows: Sequence[Row]) -> tuple[Column, ...]:
    """A column for each value that attacks on saved leaks gave, whatever they reconstruct; an error stands last."""
    known = {column.name: column for column in _FOUND}
    names = dict.fromkeys(name for row in rows for name in row if name != "error")
    return (*(known.get(name, Column(name, over="rows")) for name in names), known["error"])


def told_of_found(rows: Sequence[Row], where: Path) -> list[str]:
    """A sentence for each attack on gradients: its labels, whether the gradients are explained, where the pictures are.

    Args:
        where: the run's folder.
    """
    said = []
    for attack in dict.fromkeys(row["attack"] for row in rows if row.get("attack")):
        found = [row for row in rows if row.get("attack") == attack and row.get("unexplained") is not None]
        if not found:
            continue
        explained = [row for row in found if row["unexplained"] <= EXPLAINED]
        if len(found) == 1:
            (row,) = found
            share = f"{row['unexplained']:.2g} of it is left"
            what = "explains the gradient" if explained else f"does not explain the gradient: {CAUSES}"
            labels = ", ".join(map(str, row["labels"])) if row.get("labels") else "none"
            said.append(f"{attack}: labels {labels}; what it brought back {what} ({share}).")
        else:
            rest = "" if len(explained) == len(found) else f"; the others: {CAUSES}"
            said.append(f"{attack}: {len(explained)} of {len(found)} gradients are explained{rest}.")
    pictures = [str(where / row["picture"]) for row in rows if row.get("picture")]
    if len(pictures) > 1:
        said.append(f"Pictures: {where / 'pictures'}")
    return said + [f"Picture: {path}" for path in pictures if len(pictures) == 1]


DIVERGED = "the attack diverged: its objective is no finite number"


def _refusal(leak: Leak, attack: Attack) -> FedtapError | None:
    """Why the attack cannot be tried on this leak; None where it can."""
    try:
        attack.accepts(leak)
    except FedtapError as error:
        return error
    if not attack.needs_auxiliary:
        return None
    return attack.untrained()
