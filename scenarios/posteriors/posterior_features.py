"""Which moments of the data does the posterior of a polynomial regression of degree p tell?

Expect: those of x to the order 2p and those of x times y to the order p, as the paper's Theorem 3.4 says, since these
are what the likelihood's gradients see; of order 2p + 1 nothing but what the lower ones leave possible: two sets of
pseudo-data that fit the posterior equally well agree to 8 digits up to 2p, and differ from there on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.posteriors.regression import MOST, Regression, Sums
from fedtap.simulator.attack import PseudoData
from fedtap.simulator.models.likelihoods import Likelihood
from fedtap.simulator.report.charts import Panel, Series, chart, unzipped
from fedtap.simulator.report.columns import Column, grouped, setting
from fedtap.simulator.report.folder import Row

BEYOND = 2
"""Orders beyond 2p that are looked at."""


@dataclass(frozen=True)
class Moments(Regression):
    """One client, and the raw moments of its records: x is skewed, so that odd ones are not 0."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("degree", over="same"),
        Column("statistic", "moment_k is the mean of x^k", over="same"),
        Column("told", "whether theory says that the posterior tells it", over="share"),
        *(column for column in Regression.columns if column.name in ("value", "truth", "oracle", "error", "second")),
        Column("seconds_differ", "|value − second| / |truth|"),
        *(Column(name, over="hidden") for name in ("client", "column", "start", "model")),
        *(column for column in Regression.columns if column.over == "hidden"),
    )

    @property
    def degree(self) -> int:
        """p."""
        return int(self.model.removeprefix("polynomial(").removesuffix(")")) if "(" in self.model else 1

    def made(self) -> Float[Tensor, "records columns"]:
        """x from two normals, between about −1 and 2; y a cubic with noise."""
        draw = np.random.default_rng(self.seed)
        x = np.where(draw.random(500) < 0.7, draw.normal(0.0, 0.4, 500), draw.normal(1.2, 0.3, 500))
        return torch.from_numpy(np.stack([x, 1 + x - 0.5 * x**3 + draw.normal(0, 0.5, 500)], axis=1))

    def readings(self, sums: Sums, model: Likelihood) -> dict[str, Float[Tensor, "victims"]]:
        """Σw, and the moments that are known, to two orders beyond what is told."""
        total = sums((0, 0))
        assert total is not None
        orders = {f"moment_{k}": (k, 0) for k in range(1, 2 * self.degree + BEYOND + 1)}
        orders |= {f"moment_{k}_y": (k, 1) for k in range(self.degree + BEYOND)}
        found = {name: sums(powers) for name, powers in orders.items()}
        return {"sum_w": total} | {name: some / total for name, some in found.items() if some is not None}

    def rows_of(
        self,
        readings: Mapping[str, Mapping[str, Float[Tensor, "victims"]]],
        model: Likelihood,
        guess: PseudoData,
        second: PseudoData,
    ) -> list[Row]:
        """As for any regression, and whether theory says that it is told."""
        rows = []
        for row in super().rows_of(readings, model, guess, second):
            differ = abs(row["value"] - row["second"]) / abs(row["truth"])
            told = row["statistic"] in readings["oracle"]
            rows.append({"degree": self.degree} | row | {"told": told, "seconds_differ": differ})
        return rows

    def _columns_of(self, statistic: str) -> str:
        return {"sum_w": ""}.get(statistic, "x, y" if statistic.endswith("y") else "x")

    def elsewhere(self, start: Float[Tensor, "victims pseudo columns"]) -> Float[Tensor, "victims pseudo columns"]:
        """All points below the mean of x, so that odd moments begin far off."""
        below = start.clone()
        below[..., 0] = -below[..., 0].abs()
        return below

    def charts_of(
        self,
        steps: Sequence[int],
        course: Sequence[Mapping[str, Float[Tensor, "victims"]]],
        readings: Mapping[str, Mapping[str, Float[Tensor, "victims"]]],
    ) -> dict[str, str]:
        """None of one degree alone."""
        return {}

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Each degree's moments: how far from the truth, and how far two guesses are from each other."""
        moments = [row for row in rows if re.fullmatch(r"moment_\d+", row["statistic"])]
        panels = []
        for some in grouped(moments, [setting("degree")]):
            orders = [int(row["statistic"].split("_")[1]) for row in some]
            series = []
            for label, name in {"off the truth": "error", "two initialisations differ": "seconds_differ"}.items():
                known = [(order, row[name]) for order, row in zip(orders, some, strict=True) if row[name] is not None]
                series.append(Series(label, *unzipped(known)))
            degree, up = some[0]["degree"], "relative difference"
            panels.append(Panel("order", up, series, f"degree {degree}", mark=2 * degree + 0.5, log=True))
        heading = "Moments that are told, and those that are not"
        return {heading: chart(panels, "relative difference against order", height=3.9, across=5)}


def scenario(
    *,
    degree: Annotated[int, Knob("p: y is regressed on 1, x, …, x^p", 1, 6)] = (1, 2, 3, 4, 5),  # type: ignore[assignment]
    prior: Annotated[str, Knob("of σ: flat, or halfcauchy(SCALE); β is flat")] = "halfcauchy(2.5)",
    samples: Annotated[int, Knob("draws that the client makes", 2, 10_000_000)] = 100_000,
    pseudo: Annotated[int, Knob("pseudo-points", 2, MOST)] = 200,
    iterations: Annotated[int, Knob("of Gauss-Newton; 0: as many as it takes", 0)] = 0,
    seed: Annotated[int, Knob("seed of all that is drawn", 0, 2**31)] = 0,
) -> Moments:
    """One Bayesian client, regressions of rising degree on the same records."""
    model = "linear_regression" if degree == 1 else f"polynomial({degree})"
    return Moments(model=model, prior=prior, samples=samples, pseudo=pseudo, iterations=iterations, seed=seed)
