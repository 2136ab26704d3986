"""The auxiliary pairs of an image federation: public images, and what the compromised client makes of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from fedtap.simulator.attack import generator
from fedtap.simulator.auxiliary import Auxiliary, Provenance, digest, digest_of
from fedtap.simulator.federation.rounds import auxiliary
from fedtap.simulator.federation.settings import PAIRS, Federation, ImageObserved
from fedtap.simulator.models.registry import build
from fedtap.simulator.progress import progress
from fedtap.simulator.scenario import Session
from fedtap.simulator.wire.records import tensors_of


def auxiliary_pairs(setting: Federation, session: Session, observed: ImageObserved) -> Auxiliary:
    """The setting's auxiliary pairs: those of its folder, or observed now and kept there."""
    private, heard = observed.private, observed.heard
    part, dataset = setting, private.dataset
    wanted, batch = part.pairs or min(private.most_pairs, PAIRS), part.batch * part.summed
    images, labels = dataset.auxiliary.batch(torch.arange(wanted * batch) % len(dataset.auxiliary))
    mirrored = torch.arange(len(images)) >= len(dataset.auxiliary)
    images[mirrored] = images[mirrored].flip(3)
    if part.auxiliary_labels == "random":
        # of all classes, also of those whose images the adversary lacks; one draw for all seeds, so that fewer pairs
        # have the labels of the first of more, and a folder of pairs serves every seed
        labels = torch.randint(len(dataset.classes), labels.shape, generator=generator("auxiliary labels"))
    protocol = dataclasses.replace(part.protocol(dataset), local_steps=1)
    known = {
        **tensors_of(heard.auxiliary_weights(part.auxiliary_at)),
        "examples": dataset.auxiliary.images,
        "classes": dataset.auxiliary.labels,
    }
    plain = not part.auxiliary_trainings
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
    root = Path(part.auxiliary) if part.auxiliary else session.out / "auxiliary"
    folder = root / digest_of(same)
    found = Auxiliary.saved(folder, build, about)
    if found is not None and len(found) >= wanted:
        return found.first(wanted)
    batches = (images.view(wanted, batch, *dataset.shape), labels.view(wanted, batch))
    found_now = auxiliary(session.grid, part, private, heard, *batches, session.number, session.device)
    skeleton = build(part.architecture, dataset.shape, len(dataset.classes))
    return Auxiliary.record(folder, about, skeleton, progress(found_now, "auxiliary"))
