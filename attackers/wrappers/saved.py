"""Saved: an attack that was trained in an earlier run, read from its two files.

A wrapper without a paper. The files are NAME.safetensors and NAME.json, as a run leaves them in `attackers/`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fedtap import attackers
from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import (
    TRAINED_FORMAT,
    Attack,
    Images,
    Learned,
    Learner,
    Reconstruction,
    check_trained_on,
    reply_parts,
)
from fedtap.simulator.auxiliary import Provenance
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import LARGEST_TENSORS, is_file, parse_tensors, read_bytes, read_json
from fedtap.simulator.leaks import GradientLeak, Leak


@dataclass(frozen=True)
class Saved(Attack):
    """The trained attack whose .safetensors file is at `path`."""

    leaks = (GradientLeak,)
    needs_weights = False

    path: str
    """The .safetensors file; its .json lies beside it."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """Name of the saved attack."""
        return _described(Path(self.path))[0].name

    @property
    def distribution(self) -> Literal["uniform", "normal"]:
        """That of the saved attack."""
        return _described(Path(self.path))[0].distribution

    @property
    def starts(self) -> int:
        """That of the saved attack."""
        return _described(Path(self.path))[0].starts

    def unknown(self, defence: str) -> tuple[str, ...]:
        """None of the defence's parts where it was trained on pairs under that defence; all of them otherwise."""
        trained_under = _described(Path(self.path))[1].protocol.defence
        return () if defence == trained_under else tuple(map(str, reply_parts(defence)))

    def accepts(self, leak: Leak) -> None:
        """What the attack accepts, among leaks of the kind that it was trained on."""
        learner, about, _ = _described(Path(self.path))
        check_trained_on(f"{learner.name} of {short(self.path, 40)}", about, leak)
        learner.accepts(leak)
        _restored(Path(self.path), leak.network)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        return _restored(Path(self.path), leak.network).reconstruct(leak, start)


def _described(path: Path) -> tuple[Learner, Provenance, str]:
    """The attack that is saved at `path`, the provenance of its auxiliary pairs, and its tensors' digest."""
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not is_file(file) or file.suffix not in (".safetensors", ".json"):
            raise FedtapError(
                f"{short(file, 100)} is not there: a trained attack is two files, NAME.safetensors and NAME.json; "
                "give the path of the .safetensors file and keep both together."
            )
    try:
        document: dict[str, Any] = read_json(beside)
        if document["format"] != TRAINED_FORMAT:
            raise ValueError(f"format {short(document['format'])}, and this fedtap reads {TRAINED_FORMAT}")
        if not isinstance(document["about"], dict):
            raise TypeError("about is no object")
        about, digest = Provenance.of(document["about"]), str(document["digest"])
        learner = attackers.parse_saved(str(document["attack"]))
        if not isinstance(learner, Learner):
            raise ValueError(f"{learner.name} does not learn")
        return learner, about, digest
    except (ValueError, KeyError, TypeError, FedtapError) as error:
        raise FedtapError(
            f"{short(beside, 80)} describes no trained attack ({type(error).__name__}: {short(error, 120)}): save it "
            "again with `fedtap run`."
        ) from error


@lru_cache(maxsize=4)
def _restored(path: Path, network: nn.Module) -> Learned:
    learner, about, digest = _described(path)
    content = read_bytes(path, LARGEST_TENSORS)
    # the digest is in the .json, written last: both files are of one save
    if hashlib.blake2b(content, digest_size=8).hexdigest() != digest:
        raise FedtapError(
            f"{short(path, 100)} is not the file that its .json describes, so one of them was cut short or replaced: "
            "save the attack again with `fedtap run`."
        )
    try:
        return learner.restored(about, network, parse_tensors(content, path))
    except RuntimeError as error:
        raise FedtapError(
            f"{short(path)} does not hold what {learner.name} learns for {short(about.protocol.model, 30)} "
            f"({short(error, 70)}): the model or fedtap has changed since it was saved, so train it again."
        ) from error
