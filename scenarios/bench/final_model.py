"""What does the final model alone tell of ε? `python -m fedtap.scenarios.bench.final_model`.

Ten rounds of a federation, each with canary clients whose updates are orthogonal and as long as the clip, and Gaussian
noise that is just enough for the promised ε of all rounds. An observer of the final model alone scores every canary,
and directions that no client had, by the model's part along it.
"""

from __future__ import annotations

import math

import numpy as np

from fedtap.simulator.auditing.epsilon_bounds import of_f_dp_one_run, of_gaussian_one_run, of_one_run
from fedtap.simulator.defences.accountant import noise_for

_DELTA, _DOUBT, _ROUNDS_OF_IT, _PLANTED, _DIRECTIONS = 1e-5, 1e-3, 10, 4096, 16_384


def main() -> None:
    """Print the bounds at each ε."""
    draw = np.random.default_rng(0)
    for epsilon in (1.0, 2.0, 4.0, 8.0):
        sigma = noise_for(epsilon, _DELTA, math.sqrt(_ROUNDS_OF_IT))
        model = np.zeros(_DIRECTIONS)
        for _ in range(_ROUNDS_OF_IT):
            model[:_PLANTED] += 1.0  # each canary in a direction of its own, which is an entry here
            model += sigma * draw.standard_normal(_DIRECTIONS)
        present, absent = model[:_PLANTED], model[_PLANTED:]
        gaussian = of_gaussian_one_run(present.tolist(), absent.tolist(), _DOUBT, _DELTA)
        # of as many that are in as are out, a guess on those whose score is beyond three deviations of the noise
        threshold = 3 * sigma * math.sqrt(_ROUNDS_OF_IT)
        right = int((present >= threshold).sum())
        guesses = right + int((absent[:_PLANTED] >= threshold).sum())
        counted = [bound(2 * _PLANTED, guesses, right, _DOUBT, _DELTA) for bound in (of_one_run, of_f_dp_one_run)]
        told = f"one-run {counted[0]:.3f}, f-DP one-run {counted[1]:.3f} ({counted[1] / epsilon:.0%})"
        print(f"ε = {epsilon:g}: Gaussian one-run {gaussian:.3f} ({gaussian / epsilon:.0%}), {told}")


if __name__ == "__main__":
    main()
