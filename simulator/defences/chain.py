"""Defences: what a client does to its gradient before it sends it, as `clip(1.0)+noise(0.01)`, done left to right."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtap.simulator.defences.hooks import Chain, Named, StepDefence, UpdateDefence
from fedtap.simulator.defences.notation import described
from fedtap.simulator.defences.steps import DPSGD, Soteria
from fedtap.simulator.defences.updates import Clip, Laplace, LocalDP, Noise, Prune, Quantise, Sign

DEFENCES: dict[str, type[Named]] = {
    kind.name: kind for kind in (DPSGD, Soteria, Clip, Noise, Laplace, Prune, Sign, Quantise, LocalDP)
}
"""Name on the command line -> defence."""


@dataclass(frozen=True)
class Defences:
    """All that a client does, by where it acts."""

    step: StepDefence | None = None
    update: Chain = field(default_factory=Chain)


def parse(text: str) -> Defences:
    """Those of the defences as written on the command line that are the clients' own; `none` is none.

    Raises:
        FedtapError: no such defence, or a value out of range.
    """
    made = [DEFENCES[part.name](*part.values) for part in described(text) if part.name in DEFENCES]
    return Defences(
        step=next((one for one in made if isinstance(one, StepDefence)), None),
        update=Chain(tuple(one for one in made if isinstance(one, UpdateDefence))),
    )
