"""Play scenarios from end to end: rounds → leaks → guesses → scores → rows → report."""

from __future__ import annotations

import dataclasses
import platform
import re
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor, nn

from simulator import report, scores
from simulator.attack import Attack, Reconstruction
from simulator.errors import FedtapError
from simulator.federation import Heard, clients_on, play
from simulator.leaks import Leak, stack
from simulator.output import Folder, Row, left_by_us
from simulator.progress import progress
from simulator.scenario import PrivateData, Scenario, private_data

PICTURES = 8
"""Victims shown in the strip and on the page."""


def device_named(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1` …; an empty name means cuda if there is one.

    Raises:
        FedtapError: this machine has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise FedtapError(
            f"Device {name!r} is not to be had here ({str(error).splitlines()[0]}): use --device cpu."
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
) -> list[Row]:
    """Play each part over its grid and attack what was heard; `out` holds what a run leaves.

    Raises:
        FedtapError: a part cannot be played, or one of its attacks cannot use its leaks.
    """
    left_by_us(out, parts[0].name)  # refuse a folder that is not ours before an hour is spent
    folder: Folder | None = None
    pictures: dict[Any, report.Picture] = {}
    for number, part in enumerate(progress(parts, "scenario")):
        grid = grid_for(part)
        private = private_data(part, data_root, clients_on(grid, part))
        heard = play(part, grid, private, number)
        leak = stack([heard.leaks[name] for name in private.names() if name in heard.leaks]) if heard.leaks else None
        if leak is not None:
            for attack in part.attacks:
                attack.accepts(leak)
        folder = folder or Folder(out, _about(parts, device), resume)
        if leak is not None:
            folder.leak(f"part_{number}", leak)
        _attack(parts, number, leak, heard, private, folder, pictures, device)
    assert folder is not None
    folder.describe(finished=True)
    return folder.rows


def _attack(
    parts: Sequence[Scenario],
    number: int,
    leak: Leak | None,
    heard: Heard,
    private: PrivateData,
    folder: Folder,
    pictures: dict[Any, report.Picture],
    device: torch.device,
) -> None:
    """Every attack of one part: rows, pictures, and a report of what is finished so far."""
    part = parts[number]
    floor = scores.blind(private.world.public.batch(torch.arange(len(private.world.public)))[0])
    truths = [private(*name) for name in private.names() if name in heard.leaks]
    blinds = _blind_scores(floor, truths)
    missing = [name for name in private.names() if name not in heard.leaks]
    for order, attack in enumerate(part.attacks):
        unit = _unit(f"part_{number}-{order}", attack)
        done = folder.kept(unit) if any(row["unit"] == unit for row in folder.rows) else None
        if leak is not None and done is None:
            began = time.perf_counter()
            guess = attack(leak.to(device), seed=part.seed)
            seconds = (time.perf_counter() - began) / len(leak)
        elif done is not None:
            guess = done
        common = _common(part, unit, attack)
        rows: list[Row] = [
            common | {"client": client, "round": rnd, "error": heard.why_missing(client, rnd)}
            for client, rnd in missing
        ]
        if leak is not None:
            guess = _on_cpu(guess)
            scored = scores.score_all(guess.images, guess.labels, *_stacked(truths))
            names = list(zip(leak.clients.tolist(), leak.rounds.tolist(), strict=True))
            for victim, ((client, rnd), score) in enumerate(zip(names, scored, strict=True)):
                shown = guess.images[victim][score["matching"]]
                _picture(pictures, part, client, rnd, truths[victim][0], attack, shown, score["psnr"], floor)
                if done is None:
                    values = {name: score[name] for name in SCORES}  # type: ignore[literal-required]
                    values |= {note: score[note] for note in NOTES if score[note]}  # type: ignore[literal-required]
                    rows.append(
                        common
                        | {"client": client, "round": rnd, **values}
                        | {"psnr_blind": blinds[victim], "accuracy": heard.accuracy}
                        | {"objective": _finite(float(guess.objective[victim])), "seconds": seconds, "error": None}
                    )
            if done is None:
                folder.keep(unit, guess)
        if done is None:
            folder.rows = [row for row in folder.rows if row["unit"] != unit]
            folder.add(rows)
        _report(folder, parts, leak, list(pictures.values()))


NOTES = ("ssim_note", "lpips_note")
SCORES = ("mse", "psnr", "ssim", "lpips", "label_correct", "recovered")


def _common(part: Scenario, unit: str, attack: Attack) -> Row:
    return {
        "scenario": part.name,
        **dict(part.swept),
        "attack": _label(attack, part.attacks),
        "defence": "none",
        "world": part.world,
        "model": part.model,
        "listener": part.listener,
        "batch": part.batch,
        "steps": part.steps,
        "seed": part.seed,
        **dict.fromkeys((*SCORES, "psnr_blind", "accuracy", "objective", "seconds")),
        "settings": repr(attack),
        "unit": unit,
    }


def _blind_scores(floor: Tensor, truths: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(scores.psnr(scores.mse(floor.expand_as(images), images)).mean()) for images, _ in truths]


def _stacked(truths: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([images for images, _ in truths]), torch.stack([labels for _, labels in truths])


def _on_cpu(guess: Reconstruction) -> Reconstruction:
    return Reconstruction(guess.images.cpu(), guess.labels.cpu(), guess.objective.cpu())


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _picture(
    pictures: dict[Any, report.Picture],
    part: Scenario,
    client: int,
    rnd: int,
    truth: Tensor,
    attack: Attack,
    guess: Tensor,
    psnr: float | None,
    floor: Tensor,
) -> None:
    """Add a guess to its victim's picture. Parts that attack the same victim share one."""
    key = (part.world, part.batch, part.steps, part.swept, client, rnd)
    if key not in pictures:
        here = sum(known[:-2] == key[:-2] for known in pictures)
        if here >= (PICTURES if not part.swept else 2) or len(pictures) >= 2 * PICTURES:
            return
        said = ", ".join(f"{knob} {value}" for knob, value in part.swept)
        title = f"client {client}" + (f", round {rnd}" if rnd > 1 else "") + (f", {said}" if said else "")
        pictures[key] = report.Picture(title, truth, {}, floor.expand_as(truth))
    pictures[key].guesses[f"{_label(attack, part.attacks)} on {part.model}"] = (guess, psnr)


def _unit(where: str, attack: Attack) -> str:
    """Name of an attack's files: its place in the run, and its name."""
    return f"{where}-{re.sub('[^a-z0-9_]+', '_', attack.name.lower()).strip('_')}"


def _label(attack: Attack, panel: Sequence[Attack]) -> str:
    """Its name; with its settings where the panel has two of that name."""
    return attack.name if sum(other.name == attack.name for other in panel) == 1 else repr(attack)


def _about(parts: Sequence[Scenario], device: torch.device) -> dict[str, Any]:
    first = parts[0]
    scenario = {"name": first.name, "scenario": [repr(part) for part in parts], "question": first.question}
    return scenario | {"seed": first.seed} | _environment(device)


def _environment(device: torch.device) -> dict[str, Any]:
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
}

BATCHNORM = (
    "This model has BatchNorm in training mode: its batch's own statistics normalise each image, so the gradient of "
    "one image depends on the others, and says nothing of what the normalisation removed: the layers' means and scales."
)


def _threat(part: Scenario, network: nn.Module | None) -> str:
    update = "its gradient" if part.steps == 1 else f"the sum of {part.steps} local steps"
    said = [
        THREATS[part.listener],
        f"Each honest client sends its weights after training on {part.batch} private image(s); their difference to "
        f"the weights it was sent is {update}. No defence. The attacker is never shown a label or a pixel.",
        "Beside the honest clients, one client is compromised: the adversary reads its channel and can feed it.",
    ]
    if network is not None and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        said.append(BATCHNORM)
    return "\n".join(said)


def _report(folder: Folder, parts: Sequence[Scenario], leak: Leak | None, pictures: list[report.Picture]) -> None:
    """strip.png and report.html of all that is finished so far."""
    part = parts[0]
    settings = {
        name: str(value)
        for name, value in dataclasses.asdict(part).items()
        if name not in ("name", "question", "attacks", "swept") and name not in dict(part.swept)
    }
    attacks = dict.fromkeys(f"{row['attack']} on {row['model']}: {row['settings']}" for row in folder.rows)
    about = report.About(
        scenario=part.name,
        question=part.question,
        threat=_threat(part, leak.network if leak is not None else None),
        settings=settings | {"attacks": "\n".join(attacks)},
        environment=folder.about["versions"] | {"device": folder.about["device"], "started": folder.about["started"]},
    )
    report.write(folder.path, about, folder.rows, pictures)


ATTACK = "attack"
"""Name of a run that attacks a saved leak."""


def attack_saved(
    leak: Leak, attacks: Sequence[Attack], out: Path, *, device: torch.device, seed: int, source: str
) -> list[Row]:
    """Attack a leak of which there is no truth; `out` holds the guesses, and rows with objectives but no scores.

    Raises:
        FedtapError: an attack cannot use this leak, or `out` cannot be written.
    """
    left_by_us(out, ATTACK)
    for attack in attacks:
        attack.accepts(leak)
    protocol = leak.protocol
    about = {"name": ATTACK, "scenario": [repr(protocol), *map(repr, attacks)], "question": f"What is in {source}?"}
    folder = Folder(out, {**about, "seed": seed, **_environment(device)})
    pictures = [
        report.Picture(f"client {client}, round {rnd}", None, {}, None)
        for client, rnd in zip(leak.clients.tolist()[:PICTURES], leak.rounds.tolist(), strict=False)
    ]
    for order, attack in enumerate(attacks):
        began = time.perf_counter()
        guess = _on_cpu(attack(leak.to(device), seed=seed))
        seconds = (time.perf_counter() - began) / len(leak)
        unit = _unit(str(order), attack)
        folder.keep(unit, guess)
        for victim, picture in enumerate(pictures):
            picture.guesses[_label(attack, attacks)] = (guess.images[victim], None)
        folder.add(
            [
                {
                    "attack": _label(attack, attacks),
                    "model": protocol.model,
                    "client": client,
                    "round": rnd,
                    "labels": guess.labels[victim].tolist(),
                    "objective": _finite(float(guess.objective[victim])),
                    "seconds": seconds,
                    "settings": repr(attack),
                    "unit": unit,
                }
                for victim, (client, rnd) in enumerate(zip(leak.clients.tolist(), leak.rounds.tolist(), strict=True))
            ]
        )
    folder.describe(finished=True)
    page = report.About(
        scenario=f"What is in {source}?",
        question="Which images have this gradient? There is no truth to score against: look, and read the objective.",
        threat=THREATS.get(protocol.listener, f"The leak says its listener was: {protocol.listener}."),
        settings={name: str(value) for name, value in dataclasses.asdict(protocol).items()},
        environment=folder.about["versions"] | {"device": folder.about["device"]},
    )
    report.write(out, page, folder.rows, pictures)
    return folder.rows
