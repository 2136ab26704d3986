"""What theory allows: ε at a δ for Gaussian noise after a clip, and how often any attacker can succeed against it.

ε in closed form: Balle and Wang, ICML 2018, https://arxiv.org/abs/1805.06530; under Poisson sampling, Opacus's
accountant's. Reconstruction: Hayes, Mahloujifar and Balle, NeurIPS 2023, https://arxiv.org/abs/2302.07225, and the
older bound from Rényi divergences, Balle, Cherubin and Hayes, S&P 2022, https://arxiv.org/abs/2201.04845.

All of it is about real numbers and about the update alone. Floating point noise gives away a little more (Mironov, CCS
2012, https://doi.org/10.1145/2382196.2382264), and so does what travels beside the update: the number of examples above
all, by which FedAvg weighs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedtap.simulator.defences import gaussian
from fedtap.simulator.errors import FedtapError, unknown

PROTECTED = ("example", "client")
"""Whom a guarantee is about, and so what is clipped: each example's gradient, or a client's whole update."""

ADJACENCIES = {"add/remove": 1, "replace": 2}
"""What neighbours differ in: one is there or not (it adds nothing), or is another one; and the distance, in clips."""

SAMPLINGS = ("poisson", "shuffled", "fixed size")
"""How those that take part in a release are drawn."""


@dataclass(frozen=True)
class Guarantee:
    """(ε, δ)-differential privacy, and of what.

    Args:
        epsilon: in [0, inf]; inf is no guarantee.
        delta: in (0, 1).
        protects: one of PROTECTED.
        adjacency: one of ADJACENCIES.
        sensitivity: how far neighbours' releases lie apart without noise, at most (L2, in the gradient's units).
    """

    epsilon: float
    delta: float
    protects: str
    adjacency: str
    sensitivity: float

    def __str__(self) -> str:
        epsilon = "∞" if math.isinf(self.epsilon) else f"{self.epsilon:.4g}"
        clipped = "no clip" if math.isinf(self.sensitivity) else f"sensitivity {self.sensitivity:g}"
        whom = "an example" if self.protects == "example" else "a client"
        return f"ε = {epsilon} at δ = {self.delta:g} for {whom} ({self.adjacency}, {clipped})"


@dataclass(frozen=True)
class Gaussian:
    """Releases of a sum of clipped vectors with N(0, sigma²) on every entry, fresh in each.

    Args:
        sigma: standard deviation of the noise, in the gradient's units; 0 is no noise.
        clip: L2 norm to which each vector is clipped, in the same units; inf is no clip, and then ε is inf.
        protects: `example` if each example's gradient is clipped, `client` if a client's update is.
        adjacency: `add/remove` or `replace`.
        releases: how many, of the same data.
        rate: probability with which each takes part in a release; 1 is always.
        sampling: how that is drawn, where rate is below 1.

    Raises:
        FedtapError: a value out of range, or a sampling that no accountant here covers.
    """

    sigma: float
    clip: float
    protects: str
    adjacency: str
    releases: int = 1
    rate: float = 1.0
    sampling: str = "poisson"

    def __post_init__(self) -> None:
        _check_noise(self.sigma)
        _check_clip(self.clip)
        for kind, name, names in (
            ("unit of privacy", self.protects, PROTECTED),
            ("adjacency", self.adjacency, ADJACENCIES),
            ("sampling", self.sampling, SAMPLINGS),
        ):
            if name not in names:
                raise unknown(kind, name, names)
        if self.releases < 1:
            raise FedtapError(f"{self.releases} releases release nothing, so there is no ε: count 1 or more.")
        if not 0 < self.rate <= 1:
            raise FedtapError(f"A sampling rate of {self.rate:g} is no probability above 0: give one in (0, 1].")
        if self.rate < 1 and self.sampling != "poisson":
            raise FedtapError(
                f"The accountant covers Poisson sampling, and {self.sampling} batches are drawn otherwise, so its ε "
                "would be wrong: sample by Poisson, or claim no amplification, with a rate of 1."
            )
        if self.rate < 1 and self.adjacency != "add/remove":
            raise FedtapError(
                "The accountant covers Poisson sampling for add/remove alone, and here neighbours replace one "
                "another: use add/remove, or claim no amplification, with a rate of 1."
            )

    @property
    def sensitivity(self) -> float:
        """L2 distance of neighbours' sums, at most."""
        return self.clip * ADJACENCIES[self.adjacency]

    def guarantee(self, delta: float) -> Guarantee:
        """ε at this δ; exact where the rate is 1, else an upper bound within 0.02 of it.

        Raises:
            FedtapError: δ is not in (0, 1).
        """
        _check_delta(delta)
        if not self.sigma or math.isinf(self.clip):
            epsilon = math.inf
        elif self.rate == 1:  # k releases at distance Δ are one at distance √k Δ
            epsilon = gaussian.epsilon_of(math.sqrt(self.releases) * self.sensitivity / self.sigma, delta)
        else:
            epsilon = gaussian.sampled_epsilon(self.sigma / self.clip, self.rate, self.releases, delta)
        return Guarantee(epsilon, delta, self.protects, self.adjacency, self.sensitivity)

    def bound(self, kappa: float, draws: int = 100_000, seed: int = 0) -> float:
        """Probability, at most, with which an attacker succeeds that knows all but the one it seeks.

        sup {P_ν(E) : P_μ(E) ≤ κ}, μ the releases without the one sought and ν those with it (2302.07225): closed form
        where the rate is 1, else by Monte Carlo, and then too small with a probability of 0.001 at most. The one sought
        is held against its absence, so their distance is the clip, whatever the adjacency of ε.

        Args:
            kappa: the chance of a blind guess under the prior: the largest prior probability, over guesses, of what
                counts as that guess's success. 1/K for K equally likely candidates.
            draws: of the Monte Carlo.
            seed: of the Monte Carlo.

        Raises:
            FedtapError: κ is not in (0, 1].
        """
        _check_kappa(kappa)
        if not self.sigma or math.isinf(self.clip):
            return 1.0
        distance = self.clip / self.sigma
        if self.rate == 1:
            return gaussian.bound(math.sqrt(self.releases) * distance, kappa)
        return gaussian.sampled_bound(distance, self.rate, self.releases, kappa, draws, seed)

    def renyi_bound(self, kappa: float) -> float:
        """The older, looser bound on the same probability, by way of Rényi divergences; for a rate of 1.

        Raises:
            FedtapError: κ is not in (0, 1], or the rate is below 1.
        """
        _check_kappa(kappa)
        if self.rate < 1:
            raise FedtapError("The Rényi bound here does not cover sampling: use the Monte Carlo bound.")
        if not self.sigma or math.isinf(self.clip):
            return 1.0
        return gaussian.renyi_bound(math.sqrt(self.releases) * self.clip / self.sigma, kappa)


@runtime_checkable
class Accounted(Protocol):
    """What a defence says of its guarantee."""

    def bound(self, norm: float) -> float:
        """The L2 norm that it hands on at most of what has `norm` at most."""

    def release(self, clip: float, adjacency: str, releases: int, steps: int) -> Gaussian | None:
        """The mechanism by which its noise hides what was sent, of what has the norm `clip` at most; None where it adds
        none."""


def mechanism_of(parts: Sequence[Accounted], adjacency: str, releases: int = 1, steps: int = 1) -> Gaussian:
    """What a client's defences, done one after the other, guarantee: the client, or with DP-SGD each of its examples.

    What comes after the noise only handles what was sent anyway. Before it the clip counts, so long as nothing but
    what shortens stands between the two. A clip of a batch's update bounds what its client sends, not what
    one example adds to it, so whom it protects is the client. Noise that the server adds hides nothing from the server.

    Of DP-SGD the adjacency is always `replace`. The number of examples in a batch is public: the client says it, and
    the noise on their mean has it in its scale. Without one of them that scale would be another, and the ε of
    add/remove, which takes both for the same, would not hold.

    Args:
        parts: as on the command line, first to last.
        adjacency: of clients.
        releases: exchanges in which the client sends such an update of the same data.
        steps: local steps in each of them that an example takes part in, for DP-SGD.

    Raises:
        FedtapError: the noise is not Gaussian, which nothing here covers.
    """
    clip = math.inf
    for part in parts:
        release = part.release(clip, adjacency, releases, steps)
        if release is not None:
            return release
        clip = part.bound(clip)
    return Gaussian(0.0, clip, "client", adjacency, releases)


def noise_for(epsilon: float, delta: float, sensitivity: float) -> float:
    """The least standard deviation that gives one Gaussian release this ε at this δ, in the sensitivity's units.

    Raises:
        FedtapError: ε ≤ 0, δ outside (0, 1), or a sensitivity that is not a number above 0.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    if not 0 < sensitivity < math.inf:
        raise FedtapError(f"No noise hides a sensitivity of {sensitivity:g}: clip to a finite norm above 0.")
    return sensitivity / gaussian.distance_for(epsilon, delta)


def flower_local_dp(clipping_norm: float, sensitivity: float, epsilon: float, delta: float, adjacency: str) -> Gaussian:
    """What Flower's `LocalDpMod` of these arguments is, whatever they announce: a clipped update, and its noise.

    It takes σ = sensitivity √(2 log(1.25/δ)) / ε, which is proven for ε < 1 only and too little near 10, and a
    sensitivity of its own beside the clip, which need not be that of the clipped update. `guarantee` says what comes
    of it.

    Raises:
        FedtapError: a value out of range; Flower itself accepts ε = 0, and then adds infinite noise.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    _check_clip(clipping_norm)
    if not 0 <= sensitivity < math.inf:
        raise FedtapError(f"A sensitivity of {sensitivity:g} is no distance: give a number from 0.")
    sigma = sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    return Gaussian(sigma, clipping_norm, "client", adjacency)


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise FedtapError(f"No finite noise gives an ε of {epsilon:g}, or none is needed: give a number above 0.")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise FedtapError(
            f"δ is a probability above 0 and below 1, and {delta:g} is not: take one far below 1 / (number of clients "
            "or examples), such as 1e-5."
        )


def _check_clip(clip: float) -> None:
    if not clip > 0:
        raise FedtapError(f"A clip to norm {clip:g} leaves nothing to send: give a norm above 0.")


def _check_noise(sigma: float) -> None:
    if not 0 <= sigma < math.inf:
        raise FedtapError(f"Noise of standard deviation {sigma:g} cannot be drawn: give a number from 0.")


def _check_kappa(kappa: float) -> None:
    if not 0 < kappa <= 1:
        raise FedtapError(f"κ is the chance of a blind guess, and {kappa:g} is none: give a number in (0, 1].")
