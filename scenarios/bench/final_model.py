"""What does the final model alone tell of ε? `python -m fedtap.scenarios.bench.final_model`.

Ten rounds of a federation, each with canary clients as long as the clip, and Gaussian noise that is just enough for the
promised ε of all rounds. An observer of the final model alone scores every canary by the model's part along its
direction. Each way to a lower bound on ε is told as a share of ε, on average over some runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fedtap.simulator.auditing.epsilon_bounds import of_f_dp_one_run, of_gaussian_one_run, of_gaussian_trials
from fedtap.simulator.defences import gaussian

_DELTA, _DOUBT, _ROUNDS_OF_IT, _RUNS = 1e-5, 1e-3, 10, 5

_SHARES_TRIED = (0.5, 0.25, 0.1, 0.03, 0.01)
"""Shares of the canaries on which is guessed, each with its part of the doubt."""

Scores = tuple[np.ndarray, np.ndarray]
"""Of each canary, its score in deviations of the noise, and whether it was in."""


def orthogonal(epsilon: float, canaries: int, draw: np.random.Generator) -> Scores:
    """Canaries in directions of their own, each in by a fair coin."""
    included = draw.random(canaries) < 0.5
    return draw.standard_normal(canaries) + gaussian.distance_for(epsilon, _DELTA) * included, included


def random_directions(epsilon: float, canaries: int, draw: np.random.Generator) -> Scores:
    """Canaries along independent directions in twice as many dimensions, in which each has a part of all others."""
    included = draw.random(canaries) < 0.5
    directions = draw.choice(np.array([-1, 1], np.float32), (canaries, 2 * canaries)) / math.sqrt(2 * canaries)
    sigma = math.sqrt(_ROUNDS_OF_IT) / gaussian.distance_for(epsilon, _DELTA)
    model = _ROUNDS_OF_IT * directions[included].sum(0)
    model += sigma * math.sqrt(_ROUNDS_OF_IT) * draw.standard_normal(2 * canaries)
    return directions @ model / (sigma * math.sqrt(_ROUNDS_OF_IT)), included


def above_3(scores: np.ndarray, included: np.ndarray) -> float:
    """f-DP: guess `in` beyond three deviations of the noise."""
    guessed = scores >= 3
    return of_f_dp_one_run(len(scores), int(guessed.sum()), int(included[guessed].sum()), _DOUBT, _DELTA)


def both_sides(scores: np.ndarray, included: np.ndarray) -> float:
    """f-DP: guess `in` and `out` on the scores farthest from their mean, for the best of some shares."""
    apart = scores - scores.mean()
    right = ((apart > 0) == included)[np.argsort(-np.abs(apart))]
    best = 0.0
    for share in _SHARES_TRIED:
        guesses = max(int(share * len(scores)), 1)
        doubt = _DOUBT / len(_SHARES_TRIED)
        best = max(best, of_f_dp_one_run(len(scores), guesses, int(right[:guesses].sum()), doubt, _DELTA))
    return best


def gaussian_trials(scores: np.ndarray, included: np.ndarray) -> float:
    """Gaussian DP from the rates of right and wrong guesses at the scores' mean, canaries taken for independent."""
    return of_gaussian_trials(scores[included], scores[~included], float(scores.mean()), _DOUBT, _DELTA)


def gaussian_scores(scores: np.ndarray, included: np.ndarray) -> float:
    """The Gaussian one-run auditor, which takes the scores for Gaussian too."""
    return of_gaussian_one_run(scores[included].tolist(), scores[~included].tolist(), _DOUBT, _DELTA)


ScoresOf = Callable[[float, int, np.random.Generator], Scores]
BoundOf = Callable[[np.ndarray, np.ndarray], float]

_WAYS: tuple[tuple[str, ScoresOf, int, BoundOf], ...] = (
    ("f-DP, `in` above 3σ, 8,192 canaries", orthogonal, 8192, above_3),
    ("f-DP, `in` above 3σ, 65,536", orthogonal, 65_536, above_3),
    ("f-DP, both sides and the best share, 2,048", orthogonal, 2048, both_sides),
    ("the same along random directions, 2,048", random_directions, 2048, both_sides),
    ("f-DP, both sides and the best share, 8,192", orthogonal, 8192, both_sides),
    ("f-DP, both sides and the best share, 65,536", orthogonal, 65_536, both_sides),
    ("Gaussian DP from rates, 2,048", orthogonal, 2048, gaussian_trials),
    ("Gaussian DP from rates, 8,192", orthogonal, 8192, gaussian_trials),
    ("Gaussian one-run, 2,048", orthogonal, 2048, gaussian_scores),
    ("Gaussian one-run, 8,192", orthogonal, 8192, gaussian_scores),
    ("Gaussian one-run along random directions, 2,048", random_directions, 2048, gaussian_scores),
)


def main() -> None:
    """Print the share of ε that each way shows."""
    epsilons = (1.0, 2.0, 4.0, 8.0)
    print(f"{'':50}" + "".join(f"ε = {epsilon:<5g}" for epsilon in epsilons))
    for name, scored, canaries, bound in _WAYS:
        draw = np.random.default_rng(0)
        shares = [
            np.mean([bound(*scored(epsilon, canaries, draw)) for _ in range(_RUNS)]) / epsilon for epsilon in epsilons
        ]
        print(f"{name:50}" + "".join(f"{share:<9.0%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
