"""Does the posterior of a regression tell how many records a client has, and what they are like?

Expect: yes. Their number, means, variances and covariances come back, each as well as so many draws tell them; single
records do not, and two sets of pseudo-data far from each other fit the posterior equally well. Without whitening the
descent has a condition number of 1e8, and Adam's variances do not converge.
"""

from __future__ import annotations

from typing import Annotated

from fedtap.attackers.posteriors.fisher import ESTIMATORS
from fedtap.attackers.posteriors.posterior_mmd import OPTIMISERS
from fedtap.clients.bayesian import SAMPLERS
from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.posteriors.regression import MOST, WHITENED, Regression


def scenario(
    *,
    draws: Annotated[
        str, Knob("posteriordb draws (.json, .json.zip) that the client answers with", path=True, swept=False)
    ] = "",
    data: Annotated[
        str, Knob("posteriordb data (.json, .json.zip); none: 434 records are made", path=True, swept=False)
    ] = "",
    x: Annotated[str, Knob("the data's columns that are inputs, joined by commas", swept=False)] = "",
    y: Annotated[str, Knob("the data's column that is the output", swept=False)] = "",
    model: Annotated[str, Knob("linear_regression, or bayesian_network(HIDDEN, NOISE)")] = "linear_regression",
    prior: Annotated[str, Knob("of σ: flat, or halfcauchy(SCALE); β is flat")] = "halfcauchy(2.5)",
    sampler: Annotated[str, Knob("how a client without --draws answers", choices=SAMPLERS)] = "exact",
    samples: Annotated[int, Knob("draws that it makes", 2, 10_000_000)] = 10_000,
    pseudo: Annotated[int, Knob("pseudo-points", 2, MOST)] = 200,
    whiten: Annotated[str, Knob("whether parameters are whitened before they are compared", choices=WHITENED)] = "yes",
    estimator: Annotated[str, Knob("how the divergence is estimated", choices=ESTIMATORS)] = "exact",
    optimiser: Annotated[str, Knob("how it is minimised", choices=OPTIMISERS)] = "gauss_newton",
    iterations: Annotated[int, Knob("its steps; 0: as many as it takes", 0)] = 0,
    seed: Annotated[int, Knob("seed of all that is drawn", 0, 2**31)] = 0,
) -> Regression:
    """One Bayesian client, one answer."""
    return Regression(
        draws=draws,
        data=data,
        x=x,
        y=y,
        model=model,
        prior=prior,
        sampler=sampler,
        samples=samples,
        pseudo=pseudo,
        whiten=whiten,
        estimator=estimator,
        optimiser=optimiser,
        iterations=iterations,
        seed=seed,
    )
