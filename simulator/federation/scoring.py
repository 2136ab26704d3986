"""Scores of an image federation: here reconstructions meet the images behind them, victim by victim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedtap.simulator import scores
from fedtap.simulator.attack import Attack, CertifiedReconstruction, reply_parts
from fedtap.simulator.defences.layers import batchnorms
from fedtap.simulator.federation.guarantees import promised
from fedtap.simulator.federation.settings import SECURE, THREATS, Federation, ImageObserved
from fedtap.simulator.leaks import Leak, float_buffers
from fedtap.simulator.report.pictures import Picture
from fedtap.simulator.scenario import Row, Scored, Trial

_PICTURES = 8
"""Victims shown in the strip and on the page."""

SWEPT_PICTURES = 2
"""Victims of each setting that are shown where there are several settings."""

SHIFTS = ("auxiliary_classes", "auxiliary_labels", "target_dataset", "target_classes", "others")
"""Settings by which practice, victims and those beside them may differ; a row has those that are not as usual."""

_SCORES = ("mse", "psnr", "ssim", "lpips", "label_correct", "recovered")
IMAGES = ("recognisable", "identical", "levels", "psnr_images")
NOTES = ("ssim_note", "lpips_note")
TIMED = ("pairs", "fit_seconds", "seconds")
JUDGED = ("unexplained", "doubts")
TOLD = ("levels", "psnr_images", "psnr_blind_images", "doubts")
"""Those of the columns below that hold lists or text."""
MEASURED = (
    *_SCORES,
    *IMAGES,
    "psnr_blind",
    "psnr_blind_images",
    "accuracy",
    "drift_norm",
    "objective",
    *JUDGED,
    *TIMED,
)


def settled(setting: Federation, attack: Attack, label: str, observed: ImageObserved) -> Row:
    """The columns that are known before the attack runs, and None in the place of every score."""
    row: Row = {
        "attack": label,
        **adaptation(attack, setting.defence),
        "defence": setting.defence,
        "dataset": setting.dataset,
        **{name: getattr(setting, name) for name in SHIFTS if getattr(setting, name) != getattr(Federation, name)},
        "model": setting.model,
        "threat_model": setting.threat_model,
        **({"clients": setting.clients, "others": setting.others} if setting.threat_model == SECURE else {}),
        "batch": setting.batch,
        "local_steps": setting.local_steps,
        **dict.fromkeys(MEASURED),
        **dict.fromkeys(("overhead", "strongest", "upper_bound_psnr")),
        **promised(setting, observed.private.clients),
    }
    if "not_covered" in row and observed.leak is not None and float_buffers(observed.leak.network):
        row["not_covered"] += ", BatchNorm's statistics"
    return row


def score_images(setting: Federation, trial: Trial) -> Scored:
    """Rows and pictures of one attack's reconstructions."""
    observed, found = trial.observed, trial.reconstruction
    assert isinstance(observed, ImageObserved)
    images, labels = (torch.stack(side) for side in zip(*observed.truths, strict=True))
    scored = scores.score_all(found.images, found.labels, images, labels, trial.session.device)
    rows = [
        {
            "client": client,
            "round": rnd,
            **{name: score[name] for name in _SCORES},  # type: ignore[literal-required]
            **{note: score[note] for note in NOTES if score[note]},  # type: ignore[literal-required]
            "upper_bound_psnr": _best([each[victim].cpu() for each in found.candidates], truth),
            **{name: score[name] for name in IMAGES},  # type: ignore[literal-required]
            **_blind(observed.baseline, truth),
            "accuracy": observed.heard.accuracy,
            "drift_norm": observed.heard.drift_norm[client, rnd],
            "objective": _finite(float(objective)),
            **({"certified": bool(found.certified[victim])} if isinstance(found, CertifiedReconstruction) else {}),
            "error": None,
        }
        for victim, ((client, rnd), score, truth, objective) in enumerate(
            zip(observed.names, scored, images, found.objective, strict=True)
        )
    ]
    return Scored(rows, _pictures(setting, trial, rows))


def _pictures(setting: Federation, trial: Trial, rows: Sequence[Row]) -> dict[Any, Picture]:
    """The first victims' pictures, by whose they are: settings that attack the same victims share them."""
    observed = trial.observed
    assert isinstance(observed, ImageObserved)
    shifts = tuple(
        (name, getattr(setting, name)) for name in SHIFTS if getattr(setting, name) != getattr(Federation, name)
    )
    swept = tuple((name, getattr(setting, name, value)) for name, value in setting.swept)
    said = "".join(f", {name.replace('_', ' ')} {value}" for name, value in (*swept, *shifts))
    pictures = {}
    for victim, (client, rnd) in enumerate(observed.names[: SWEPT_PICTURES if setting.swept else _PICTURES]):
        truth = observed.truths[victim][0]
        found = trial.reconstruction.images[victim].nan_to_num()
        found = found[scores.match(found, truth)]
        who = "sum" if setting.summed > 1 else f"client {client}"
        column = f"{trial.label} on {setting.model}"
        psnr = float(scores.psnr(scores.mse(found, truth).mean()))
        picture = Picture(
            who + (f", round {rnd}" if rnd > 1 else "") + said,
            truth,
            {column: (found, psnr)},
            observed.baseline.expand_as(truth),
            {} if setting.success_db else {column: rows[victim]["levels"] or ()},
        )
        pictures[setting.dataset, setting.batch, setting.local_steps, swept, shifts, client, rnd] = picture
    return pictures


def _blind(baseline: Tensor, truth: Tensor) -> Row:
    """The blind guess's PSNR: of each of the victim's images, and their mean."""
    decibels = scores.psnr(scores.mse(baseline.expand_as(truth), truth))
    return {"psnr_blind": float(decibels.mean()), "psnr_blind_images": [round(each, 2) for each in decibels.tolist()]}


def _best(candidates: Sequence[Tensor], truth: Tensor) -> float | None:
    """PSNR of the candidate nearest to the truth: an upper bound, since no attacker can tell; None where none is."""
    ordered = (found[scores.match(found, truth)] for found in map(torch.nan_to_num, candidates))
    return max((float(scores.psnr(scores.mse(found, truth)).mean()) for found in ordered), default=None)


def adaptation(attack: Attack, defence: str) -> Row:
    """Whether the attack takes the whole of an announced defence into account, and if it sets out to, why not.

    Where there is nothing to know, an attack counts as adapted that would be if there were.
    """
    missing = attack.unknown(defence)
    note = {"adaptive_note": f"does not know {'+'.join(missing)}"} if missing and attack.adapts else {}
    return {"adaptive": not missing and (attack.adapts or bool(reply_parts(defence))), **note}


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


BATCHNORM = (
    "This model has BatchNorm in training mode: its batch's own statistics normalise each image, so the gradient of "
    "one image depends on the others, and says nothing of what the normalisation removed: the layers' means and scales."
)


SIMULATED = (
    "What a defence draws comes from the run's seed, so that the run can be repeated; the attacker does not use that. "
    "A real client's noise must come from its operating system, as with mod_of. "
)


def threat(setting: Federation, leak: Leak | None) -> list[str]:
    """Who observes, what is known to them, and what clients do, in sentences."""
    said = [
        THREATS[setting.threat_model],
        f"Each honest client trains on {setting.batch} private image(s) for {setting.local_steps} local step(s) and "
        "sends its weights; their difference to the weights it was sent is its gradient, or the sum of several. "
        f"Defence: {setting.defence}. " + (SIMULATED if setting.defence != "none" else "") + "The attacker is never "
        "shown a label or a pixel.",
        "Beside the honest clients, one client is compromised: the adversary reads its channel and can feed it.",
    ]
    if leak is not None and leak.protocol.batchnorm == "train" and batchnorms(leak.network):
        said.append(BATCHNORM)
    return said
