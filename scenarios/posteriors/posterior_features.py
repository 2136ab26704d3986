"""Which moments of the data does the posterior of a polynomial regression of degree p tell?

Expect: those of x to the order 2p and those of x times y to the order p, as the paper's Theorem 3.4 says, since these
are what the likelihood's gradients see; of order 2p + 1 nothing but what the lower ones leave possible: two sets of
pseudo-data that fit the posterior equally well agree to 8 digits up to 2p, and differ from there on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from fedtap.scenarios.posteriors.regression import RegressionPosterior
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.report.columns import Column
from fedtap.simulator.scenario import Row, Scored, Trial

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fedtap.scenarios.posteriors.scoring import Sums
    from fedtap.simulator.models.likelihoods import Likelihood

BEYOND = 2
"""Orders beyond 2p that are looked at."""


@dataclass(frozen=True)
class PosteriorFeatures(RegressionPosterior):
    """One client, and the raw moments of its records: x is skewed, so that odd ones are not 0."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("degree", over="same"),
        Column("statistic", "moment_k is the mean of x^k", over="same"),
        Column("told", "whether theory says that the posterior tells it", over="share"),
        *(
            column
            for column in RegressionPosterior.columns
            if column.name in ("value", "truth", "oracle", "error", "second")
        ),
        Column("seconds_differ", "|value − second| / |truth|"),
        *(Column(name, over="hidden") for name in ("client", "column", "start", "model")),
        *(column for column in RegressionPosterior.columns if column.over == "hidden"),
    )

    panels: ClassVar[Mapping[str, str]] = {}

    degree: Annotated[int, Option("p: y is regressed on 1, x, …, x^p", 1, 6, "model")] = sweep(1, 2, 3, 4, 5)
    samples: int = 100_000
    iterations: Annotated[
        int, Option("posterior_mmd's Gauss-Newton steps; 0: as many as it takes", 0, group="attack")
    ] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", "linear_regression" if self.degree == 1 else f"polynomial({self.degree})")
        super().__post_init__()

    def made(self) -> Float[Tensor, "records columns"]:
        """x from two normals, between about −1 and 2; y a cubic with noise."""
        import numpy as np
        import torch

        draw = np.random.default_rng(self.seed)
        x = np.where(draw.random(500) < 0.7, draw.normal(0.0, 0.4, 500), draw.normal(1.2, 0.3, 500))
        return torch.from_numpy(np.stack([x, 1 + x - 0.5 * x**3 + draw.normal(0, 0.5, 500)], axis=1))

    def statistics(self, sums: Sums, model: Likelihood) -> dict[str, Float[Tensor, "victims"]]:
        """Σw, and the moments that are known, to two orders beyond what is told."""
        total = sums((0, 0))
        assert total is not None
        orders = {f"moment_{k}": (k, 0) for k in range(1, 2 * self.degree + BEYOND + 1)}
        orders |= {f"moment_{k}_y": (k, 1) for k in range(self.degree + BEYOND)}
        found = {name: sums(powers) for name, powers in orders.items()}
        return {"sum_w": total} | {name: some / total for name, some in found.items() if some is not None}

    def told_of(self, statistic: str) -> bool:
        """Whether theory says that the posterior tells it: Σw, moments of x to 2p and of x times y to p."""
        _, *order = statistic.split("_")
        return statistic == "sum_w" or int(order[0]) <= self.degree * (1 if statistic.endswith("y") else 2)

    def column(self, statistic: str) -> str:
        """Moments are of x, or of x times y."""
        return "" if statistic == "sum_w" else "x, y" if statistic.endswith("y") else "x"

    def elsewhere(self, start: Tensor) -> Tensor:
        """All points below the mean of x, so that odd moments begin far off."""
        below = start.clone()
        below[..., 0] = -below[..., 0].abs()
        return below

    def score(self, trial: Trial) -> Scored:
        """As for any regression, and whether theory says that a moment is told."""
        scored = super().score(trial)
        rows = [
            {"degree": self.degree}
            | row
            | {"told": self.told_of(row["statistic"])}
            | {"seconds_differ": abs(row["value"] - row["second"]) / abs(row["truth"])}
            for row in scored.rows
        ]
        return dataclasses.replace(scored, rows=rows)

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Each degree's moments: how far from the truth, and how far two guesses are from each other."""
        from fedtap.simulator.report.charts import Panel, Series, chart, unzipped
        from fedtap.simulator.report.columns import grouped, setting

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
