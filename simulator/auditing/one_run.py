"""What the scores of canary clients of one run tell of ε: each canary was in or out by a fair coin.

Two bounds are taken, each wrong with half the probability that is allowed. The first takes scores for Gaussian, with
one variance (2302.03098). The second guesses which canaries were in, and holds the number of right guesses against what
a Gaussian mechanism allows (2410.22235), whatever the scores' distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtap.simulator.auditing.epsilon_bounds import UNBOUNDED, of_f_dp_one_run, of_gaussian_one_run

_SHARES_GUESSED = (1.0, 0.5, 0.25, 0.125)
"""Shares of the canaries on which is guessed: those whose scores are farthest from the middle."""


@dataclass(frozen=True)
class CanaryBound:
    """A lower bound on ε for a client under add/remove, of all rounds together."""

    epsilon: float
    """The larger one of the two below; UNBOUNDED where scores tell canaries apart without doubt."""
    delta: float
    """δ at which it holds."""
    alpha: float
    """Probability with which it is above the true ε, at most."""
    gaussian: float
    """From scores that are taken for Gaussian."""
    guessed: float
    """From guesses on some of the canaries."""
    canaries: int
    """All of them."""
    included: int
    """Those that took part."""

    def __str__(self) -> str:
        what = "no bound" if self.epsilon >= UNBOUNDED else f"ε ≥ {self.epsilon:.3g}"
        told = f"{self.included} of {self.canaries} canary clients took part"
        return f"{what} at δ = {self.delta:g} for a client (add/remove, {1 - self.alpha:.4g} sure; {told})"


def bound_of_canaries(
    scores: np.ndarray, included: np.ndarray, others: np.ndarray, alpha: float, delta: float
) -> CanaryBound:
    """The bound that these scores show.

    Args:
        scores: of each canary, higher where the model moved along its direction.
        included: of each canary, whether it took part.
        others: scores of directions that no client had.
        alpha: probability with which the bound is above ε, at most.
        delta: in (0, 1).
    """
    present, absent = scores[included], np.concatenate([scores[~included], others])
    gaussian = of_gaussian_one_run(present.tolist(), absent.tolist(), alpha / 2, delta)
    # the scores' mean lies halfway between those that are in and those that are out, and is found without the coins
    apart = scores - scores.mean()
    order = np.argsort(-np.abs(apart))
    right = ((apart > 0) == included)[order]
    guessed = 0.0
    for share in _SHARES_GUESSED:
        guesses = max(int(share * len(scores)), 1)
        doubt = alpha / 2 / len(_SHARES_GUESSED)
        guessed = max(guessed, of_f_dp_one_run(len(scores), guesses, int(right[:guesses].sum()), doubt, delta))
    best = max(gaussian, guessed)
    return CanaryBound(best, delta, alpha, gaussian, guessed, len(scores), int(included.sum()))
