"""Which moments of the data does the posterior of a polynomial regression of degree p tell?

Expect: those of x to the order 2p and those of x times y to the order p, as the paper's Theorem 3.4 says, since these
are what the likelihood's gradients see; of order 2p + 1 nothing but what the lower ones leave possible: two sets of
pseudo-data that fit the posterior equally well agree to 8 digits up to 2p, and differ from there on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fedtap.scenarios.posteriors.regression import RegressionPosterior
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.scenario import Row, Scored, Trial

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fedtap.scenarios.posteriors.scoring import Sums
    from fedtap.simulator.models.likelihoods import Likelihood

BEYOND = 2
"""Orders beyond 2p that are looked at."""

COLUMNS = {
    "degree": "p of the regression",
    "statistic": "moment_k: mean of x^k; moment_k_y: of x^k y",
    "told": "whether theory says that the posterior tells it",
    "value": "of the pseudo-data",
    "truth": "of the private records",
    "oracle": "of the exact minimiser",
    "error": "|value / truth − 1|",
    "second": "of the pseudo-data from a second initialisation",
    "seconds_differ": "|value − second| / |truth|",
}
"""Column of a table -> what it means."""


@dataclass(frozen=True)
class PosteriorFeatures(RegressionPosterior):
    """One client, and the raw moments of its records: x is skewed, so that odd ones are not 0."""

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

    @property
    def columns(self) -> Sequence[Any]:
        """Moments, and what they are to be."""
        return tuple(COLUMNS)

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Each degree's moments: how far from the truth, and how far two reconstructions are from each other."""
        from fedtap.simulator.report import pseudo_charts

        off, differ = "off the truth", "second initialisation differs"
        panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
        told: dict[str, float] = {}
        for row in rows:
            name = str(row["statistic"])
            if name.startswith("moment") and not name.endswith("y"):
                panel = panels.setdefault(title := f"degree {row['degree']}", {off: [], differ: []})
                panel[off].append((order := int(name.split("_")[1]), row["error"]))
                panel[differ].append((order, row["seconds_differ"]))
                told[title] = 2 * row["degree"]
        return {"Moments that are told, and those that are not": pseudo_charts.differences(panels, told, "order")}
