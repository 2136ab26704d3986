"""How much of the private images was extracted: here they meet, beside images that nobody tuned on.

Any two pictures of one thing are alike, so each similarity to private images stands beside that to held-out images of
the same kind; the gap between the two is the leak. Similarities are cosines of a copy-detection encoder's features.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from fedtap.scenarios.checkpoints.extraction_report import beside
from fedtap.scenarios.checkpoints.subjects import Subjects, pretraining_images
from fedtap.simulator.attack import generator
from fedtap.simulator.extraction import Extraction
from fedtap.simulator.files import is_file, read_tensors, write_atomically
from fedtap.simulator.models.copy_detection import Encoder, Encodings, encoder, similarity
from fedtap.simulator.models.diffusion import all_threads
from fedtap.simulator.models.packages import cache
from fedtap.simulator.report.pictures import Picture
from fedtap.simulator.run import finite
from fedtap.simulator.scenario import Row, Scored, Trial

if TYPE_CHECKING:
    from fedtap.scenarios.checkpoints.extraction import Extracting

ROUNDED_AWAY = 1e-6
"""Similarities that differ by no more are equal, up to rounding."""

PAPERS_TAU, TAU = 0.6, {"efficientnet_lite0": 0.8}
"""Similarity from which on two images count as copies: the paper's, with SSCD, and another of an encoder for which
unrelated photographs have a cosine of 0.45 and copies from 0.64 to 0.97."""


def extraction_scored(setting: Extracting, trial: Trial) -> Scored:
    """A row and pictures for each victim."""
    found = trial.reconstruction
    assert isinstance(found, Extraction)
    subjects, encode = setting.subjects(trial.session.data_root), encoder(setting.encoder)
    private_of, held_out_of, others = _encoded(subjects, encode)
    before = _pretraining(trial.session.data_root, setting.pretraining, found.images.shape[-1], encode)
    rows: list[Row] = []
    pictures: dict[object, Picture] = {}
    sections: dict[str, str] = {}
    for place, (victim, number) in enumerate(trial.observed.names):
        clients = setting.behind(victim)
        private = torch.cat([subjects.private[client] for client in clients])
        held_out = torch.cat([subjects.held_out[client] for client in clients])
        named = dict.fromkeys(subjects.named[client] for client in clients)
        ours, away = (torch.cat([of[client] for client in clients]) for of in (private_of, held_out_of))
        extracted, samples = encode(found.images[place]), encode(found.samples[place].float() / 255)
        blind = others[torch.randperm(len(others), generator=generator(setting.seed, "blind"))[: len(private)]]
        row: Row = {"client": victim, "round": number, "private_set": ", ".join(named)} | found.columns(place)
        row |= compared(extracted, ours, away, others, setting.tau or TAU.get(encode.name, PAPERS_TAU))
        row |= {f"{name}_samples": value for name, value in _nearest(samples, ours, away, others).items()}
        row |= {
            "identified": identified_share(samples, ours, torch.cat([away, others, before])),
            "similarity_blind": float(highest(ours, blind).mean()),
            "caption_found": row.get("caption") == setting.caption,
            "contrast": float(found.images[place].flatten(1).std(1).mean()),
            "encoder": encode.name,
        }
        row["gap_samples"] = row["training_samples"] - row["held_out_samples"]
        rows.append(finite(row | {"objective": float(found.objective[place]), "error": None}))
        at, away_at = similarity(extracted, ours), similarity(extracted, away)
        title = f"client {victim}" if setting.rounds == 1 else f"client {victim}, round {number}"
        pictures[trial.session.number, victim, number] = Picture(
            f"{title}, {row['private_set']}", private, {trial.label: (found.images[place][at.argmax(0)], None)}, None
        )
        heading = f"Extracted images of {title}"
        sections[heading] = beside(
            found.images[place], private[at.argmax(1)], at.amax(1), held_out[away_at.argmax(1)], away_at.amax(1)
        )
    return Scored(rows, pictures, sections)


def compared(
    extracted: Encodings, private: Encodings, held_out: Encodings, others: Encodings, tau: float
) -> dict[str, float]:
    """AS, the mean over private images of the similarity to the highest extracted one; A-ESR, the share of them at
    which it is `tau` at least; and AS of held-out images and of others (Wu, Zhang, Wu, ICML 2025, section 5)."""
    means = _nearest(extracted, private, held_out, others)
    return {f"similarity_{name}": value for name, value in means.items()} | {
        "gap": means["training"] - means["held_out"],
        "extracted": float((highest(private, extracted) >= tau).double().mean()),
    }


def _nearest(drawn: Encodings, private: Encodings, held_out: Encodings, others: Encodings) -> dict[str, float]:
    sides = {"training": private, "held_out": held_out, "others": others}
    return {name: float(highest(side, drawn).mean()) for name, side in sides.items()}


def highest(images: Encodings, among: Encodings) -> Float[Tensor, "images"]:
    """Of each image, the similarity to the highest of some others."""
    return similarity(images, among).amax(1)


def identified_share(samples: Encodings, private: Encodings, rest: Encodings) -> float:
    """The share of samples that are nearer to a private image than to any of the rest."""
    return float((highest(samples, private) > highest(samples, rest) + ROUNDED_AWAY).double().mean())


@lru_cache(maxsize=2)
def _encoded(subjects: Subjects, encode: Encoder) -> tuple[dict[int, Encodings], dict[int, Encodings], Encodings]:
    """Each client's private images and held-out ones, and the others."""
    with all_threads():  # hundreds of images take a minute, and every attack of a run is held against the same
        private, held_out = (
            {client: encode(images) for client, images in side.items()}
            for side in (subjects.private, subjects.held_out)
        )
        return private, held_out, encode(subjects.others)


@lru_cache(maxsize=2)
def _pretraining(data_root: Path, names: str, size: int, encode: Encoder) -> Encodings:
    images = pretraining_images(data_root, names, size)
    if not len(images):
        return encode(torch.zeros(1, 3, size, size))[:0]
    held = [images, *encode.network.state_dict().values()]
    known = hashlib.blake2b(b"".join(tensor.contiguous().numpy().tobytes() for tensor in held), digest_size=8)
    file = cache() / f"features-{known.hexdigest()}.safetensors"  # tens of thousands of images take minutes
    if not is_file(file):
        with all_threads():
            write_atomically(file, save({"features": encode(images)}))
    return read_tensors(file)["features"]
