"""What a mechanism promises: (ε, δ), for whom, against which neighbours, over how many rounds; and what that needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedtap.simulator.auditing.epsilon_bounds import epsilon_of_distance
from fedtap.simulator.defences import gaussian
from fedtap.simulator.defences.accountant import ADJACENCIES, Gaussian, noise_for
from fedtap.simulator.errors import FedtapError

UNITS = ("client", "example")
"""Whom a promise may be about."""

NEIGHBOURS = {"add_remove": "add/remove", "replacement": "replace"}
"""`--adjacency` -> its name in the accountant."""

_ATTRIBUTES = {
    "epsilon": ("epsilon", "target_epsilon", "eps"),
    "delta": ("delta", "target_delta"),
    "clip": ("clipping_norm", "max_grad_norm", "clip", "clip_norm"),
    "sensitivity": ("sensitivity",),
}
"""What a mechanism's own attributes may be called."""


@dataclass(frozen=True)
class Promise:
    """(ε, δ)-differential privacy of all rounds together.

    Raises:
        FedtapError: a value is out of range.
    """

    epsilon: float
    """Above 0, of all rounds."""
    delta: float
    """From 0 and below 1; 0 is pure differential privacy, which no Gaussian noise gives."""
    clip: float | None = None
    """L2 norm to which an update is clipped; None where none is named."""
    sensitivity: float | None = None
    """The distance of neighbours that the mechanism itself is told of; None where it is told none."""
    unit: str = "client"
    """One of UNITS."""
    adjacency: str = "add_remove"
    """One of NEIGHBOURS."""
    rounds: int = 1
    """Releases about the same unit, which the mechanism makes one by one."""
    rate: float = 1.0
    """Probability with which a unit is in a round, drawn by Poisson sampling that no observer sees; 1 is always."""
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name of a value -> where it was read."""

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise FedtapError(f"--epsilon {self.epsilon:g} promises nothing that can be tested: give a number above 0.")
        if not 0 <= self.delta < 1:
            raise FedtapError(f"--delta {self.delta:g} is no probability below 1: give one such as 1e-5.")
        for name, value in (("clip", self.clip), ("sensitivity", self.sensitivity)):
            if value is not None and not 0 < value < math.inf:
                raise FedtapError(f"--{name} {value:g} is no length above 0: give the L2 norm that the mechanism uses.")
        if self.unit not in UNITS:
            raise FedtapError(f"--unit {self.unit} is neither client nor example: give one of them.")
        if self.adjacency not in NEIGHBOURS:
            raise FedtapError(f"--adjacency {self.adjacency} is neither add_remove nor replacement: give one of them.")
        if self.rounds < 1:
            raise FedtapError(f"--rounds {self.rounds} releases nothing: give 1 or more.")
        if not 0 < self.rate <= 1:
            raise FedtapError(f"--rate {self.rate:g} is no probability above 0: give the share of units in a round.")
        if self.rate < 1 and self.adjacency == "replacement":
            raise FedtapError(
                "--rate below 1 is Poisson sampling, which the accountant covers for add/remove alone: use add_remove, "
                "or claim no amplification, with a rate of 1."
            )

    @property
    def distances(self) -> int:
        """How many clips neighbours lie apart, at most."""
        return ADJACENCIES[NEIGHBOURS[self.adjacency]]

    @property
    def announced(self) -> float | None:
        """The distance of neighbours in one release that the promise speaks of; None where it speaks of none."""
        if self.sensitivity is not None:
            return self.sensitivity
        return None if self.clip is None else self.clip * self.distances

    @property
    def length(self) -> float:
        """A length of an update by which inputs are scaled: the clip where there is one."""
        return self.clip or self.sensitivity or 1.0

    @property
    def distance(self) -> float:
        """μ: neighbours' distance in one release over the noise's deviation, at most, for Gaussian noise."""
        if self.rate < 1:
            return (
                gaussian.sampled_distances(self.epsilon, self.delta, self.rate, self.rounds)[0] if self.delta else 0.0
            )
        return gaussian.distance_for(self.epsilon, self.delta) / math.sqrt(self.rounds) if self.delta else 0.0

    @property
    def alone(self) -> tuple[float, float, int]:
        """ε and δ of so many releases that all have the unit in them, which the promise allows at most.

        Under sampling it is one: (1 - q) P + q Q ≤ e^ε P + δ says Q ≤ (1 + (e^ε - 1) / q) P + δ / q.
        """
        if self.rate == 1:
            return self.epsilon, self.delta, self.rounds
        return math.log1p(math.expm1(self.epsilon) / self.rate), min(self.delta / self.rate, 1 - 1e-12), 1

    def sigma(self, sensitivity: float, rounds: int | None = None) -> float:
        """The deviation of Gaussian noise in each round that the promise needs at this distance of neighbours.

        Args:
            rounds: in the place of the promise's.
        """
        rounds = rounds or self.rounds
        if not self.delta:
            return math.inf
        if self.rate < 1:
            return sensitivity / gaussian.sampled_distances(self.epsilon, self.delta, self.rate, rounds)[1]
        return noise_for(self.epsilon, self.delta, sensitivity * math.sqrt(rounds))

    def epsilon_of(self, distance: float) -> float:
        """ε of all rounds, at least, of Gaussian releases at this distance of neighbours over the deviation."""
        if self.rate < 1 and self.delta and 0 < distance < math.inf:
            return gaussian.sampled_limits(1 / distance, self.rate, self.rounds, self.delta)[0]
        return epsilon_of_distance(math.sqrt(self.rounds) * distance, self.delta)

    def told(self) -> dict[str, Any]:
        """As audit_dp.json has it."""
        needed = self.sigma(self.announced) if self.announced else None
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": self.unit,
            "adjacency": self.adjacency,
            "clip": self.clip,
            "sensitivity": self.sensitivity,
            "rounds": self.rounds,
            "rate": self.rate,
            "composition": self._composition,
            "epsilon_of_one_round": self.of_one_round,
            "sigma_needed": needed,
            "source": dict(self.source),
        }

    @property
    def _composition(self) -> str:
        releases = f"{self.rounds} release{'s' * (self.rounds > 1)}"
        if self.rate == 1:
            return f"{releases} of the same {self.unit}, without sampling"
        return f"{releases}, each {self.unit} in each with probability {self.rate:g} (Poisson sampling)"

    @property
    def of_one_round(self) -> float | None:
        """ε of one round where noise is Gaussian and just enough for all of them; None where no Gaussian noise is."""
        if self.delta and self.rate < 1:
            return gaussian.sampled_limits(1 / self.distance, self.rate, 1, self.delta)[1]
        return gaussian.epsilon_of(self.distance, self.delta) if self.delta else None


def promise_of(said: Mapping[str, Any], mechanism: Mapping[str, Any]) -> Promise:
    """From what the command line says, and what it does not say from the mechanism's own attributes.

    Args:
        said: option -> value; None where it was not given.
        mechanism: option -> value, as `promised_by` reads it.

    Raises:
        FedtapError: ε or δ is in neither.
    """
    values = {name: value for name, value in said.items() if value is not None}
    source = {name: f"--{name}" for name in values}
    for name, value in mechanism.items():
        if name not in values:
            values[name], source[name] = value, "the mechanism's own attributes"
    if missing := [f"--{name}" for name in ("epsilon", "delta") if name not in values]:
        raise FedtapError(
            f"The promise cannot be read, since neither the command nor the mechanism says {' and '.join(missing)}: "
            "give what was promised."
        )
    return Promise(**values, source=source)


def promised_by(mechanism: object) -> dict[str, float]:
    """What a mechanism's attributes say of its promise."""
    found = {}
    for name, attributes in _ATTRIBUTES.items():
        for attribute in attributes:
            value = getattr(mechanism, attribute, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[name] = float(value)
                break
    return found


def promised_by_multiplier(multiplier: float, clip: float, unit: str, said: Mapping[str, Any]) -> dict[str, float]:
    """The clip, and ε at the δ that is said, of all rounds, for Gaussian noise of `multiplier` clips.

    Args:
        unit: `client` or `example`.
        said: option -> value of the promise, None where it was not given.
    """
    found = {"clip": clip}
    if said.get("delta"):
        adjacency = NEIGHBOURS.get(str(said.get("adjacency") or "add_remove"), "add/remove")
        release = Gaussian(
            multiplier * clip, clip, unit, adjacency, int(said.get("rounds") or 1), float(said.get("rate") or 1)
        )
        found["epsilon"] = release.guarantee(float(said["delta"])).epsilon
    return found
