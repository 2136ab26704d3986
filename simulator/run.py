"""Play scenarios from end to end: rounds → leaks → guesses → scores → rows → report."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from simulator import report, scores
from simulator.attack import Attack, Reconstruction
from simulator.errors import FedtapError
from simulator.federation import Heard, clients_on, play
from simulator.leaks import Leak, stack
from simulator.output import Folder, Row
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
        raise FedtapError(f"Device {name!r} is not to be had here ({str(error).splitlines()[0]}): use --device cpu.") from error
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
            leak.save(out / f"leaks/part_{number}.safetensors")
        _attack(part, number, leak, heard, private, folder, pictures, device)
    assert folder is not None
    folder.describe(finished=True)
    _report(folder, parts, list(pictures.values()))
    return folder.rows


def _attack(
    part: Scenario,
    number: int,
    leak: Leak | None,
    heard: Heard,
    private: PrivateData,
    folder: Folder,
    pictures: dict[Any, report.Picture],
    device: torch.device,
) -> None:
    """Every attack of one part: rows, pictures, and a report of what is finished so far."""
    floor = scores.blind(private.world.public.batch(torch.arange(len(private.world.public)))[0])
    truths = [private(*name) for name in private.names() if name in heard.leaks]
    blinds = _blind_scores(floor, truths)
    missing = [name for name in private.names() if name not in heard.leaks]
    for order, attack in enumerate(part.attacks):
        unit = f"part_{number}-{order}-{attack.name}"
        done = folder.kept(unit) if any(row["unit"] == unit for row in folder.rows) else None
        if leak is not None and done is None:
            began = time.perf_counter()
            guess = attack(leak.to(device), seed=part.seed)
            seconds = (time.perf_counter() - began) / len(leak)
        elif done is not None:
            guess = done
        common = _common(part, unit, attack)
        rows: list[Row] = [
            common | {"client": client, "round": rnd, "error": heard.why_missing(client, rnd)} for client, rnd in missing
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
                    values |= {"lpips_note": score["lpips_note"]} if score["lpips_note"] else {}
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
        _report(folder, [part], list(pictures.values()))


SCORES = ("mse", "psnr", "ssim", "lpips", "label_correct", "recovered")


def _common(part: Scenario, unit: str, attack: Attack) -> Row:
    return {
        "scenario": part.name,
        **dict(part.swept),
        "attack": attack.name,
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
    pictures[key].guesses[f"{attack.name} on {part.model}"] = (guess, psnr)


def _about(parts: Sequence[Scenario], device: torch.device) -> dict[str, Any]:
    return {
        "scenario": [repr(part) for part in parts],
        "question": parts[0].question,
        "seed": parts[0].seed,
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


def _report(folder: Folder, parts: Sequence[Scenario], pictures: list[report.Picture]) -> None:
    ...
