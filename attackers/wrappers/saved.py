"""Saved: an attack that learned in an earlier run, read from its two files.

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
from fedtap.simulator.attack import FORMAT, Attack, Images, Learned, Learner, Reconstruction, answered, prepared
from fedtap.simulator.auxiliary import About
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import LARGEST_TENSORS, is_file, parse_tensors, read_bytes, read_json
from fedtap.simulator.leaks import GradientLeak, Leak


@dataclass(frozen=True)
class Saved(Attack):
    """The trained attack whose .safetensors file is at `path`."""

    leaks = (GradientLeak,)
    needs_weights = False

    path: str

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """That of the attack which was saved."""
        return _described(Path(self.path))[0].name

    @property
    def distribution(self) -> Literal["uniform", "normal"]:
        """The attack's own."""
        return _described(Path(self.path))[0].distribution

    @property
    def starts(self) -> int:
        """The attack's own."""
        return _described(Path(self.path))[0].starts

    def unknown(self, defence: str) -> tuple[str, ...]:
        """Nothing of the defence that it practised under; all of another one."""
        trained_under = _described(Path(self.path))[1].protocol.defence
        return () if defence == trained_under else tuple(map(str, answered(defence)))

    def accepts(self, leak: Leak) -> None:
        """What the attack accepts, of the kind that it practised on."""
        learner, about, _ = _described(Path(self.path))
        prepared(f"{learner.name} of {short(self.path, 40)}", about, leak)
        learner.accepts(leak)
        _restored(Path(self.path), leak.network)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        return _restored(Path(self.path), leak.network).reconstruct(leak, start)


def _described(path: Path) -> tuple[Learner, About, str]:
    """The attack that lies at `path`, its practice, and its tensors' digest."""
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not is_file(file) or file.suffix not in (".safetensors", ".json"):
            raise FedtapError(
                f"{short(file, 100)} is not there: a trained attack is two files, NAME.safetensors and NAME.json; "
                "give the path of the .safetensors file and keep both together."
            )
    try:
        document: dict[str, Any] = read_json(beside)
        if document["format"] != FORMAT:
            raise ValueError(f"format {short(document['format'])}, and this fedtap reads {FORMAT}")
        if not isinstance(document["about"], dict):
            raise TypeError("what it is about is no object")
        about, digest = About.of(document["about"]), str(document["digest"])
        learner = attackers.parse_strangers(str(document["attack"]))
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
