"""Does the posterior of a regression tell how many records a client has, and what they are like?

Expect: yes. Their number, means, variances and covariances come back, each as well as so many draws tell them; single
records do not, and two sets of pseudo-data far from each other fit the posterior equally well. Without whitening the
descent has a condition number of 1e8, and Adam's variances do not converge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fedtap.scenarios.posteriors.regression import TableRegression
from fedtap.simulator.options import Option


@dataclass(frozen=True)
class Posterior(TableRegression):
    """One Bayesian client, one reply."""

    draws: Annotated[
        str,
        Option(
            "posteriordb draws (.json, .json.zip) that the client replies with", group="data", file=True, single=True
        ),
    ] = ""
    model: Annotated[str, Option("linear_regression, or bayesian_network(HIDDEN, NOISE)", group="model")] = (
        "linear_regression"
    )
    whiten: Annotated[
        Literal["yes", "no"], Option("whether posterior_mmd compares whitened parameters", group="attack")
    ] = "yes"
    optimiser: Annotated[
        Literal["gauss_newton", "adam"], Option("how posterior_mmd minimises the divergence", group="attack")
    ] = "gauss_newton"
    iterations: Annotated[int, Option("its steps; 0: as many as it takes", 0, group="attack")] = 0
