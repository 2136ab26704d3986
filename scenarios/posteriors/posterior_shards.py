"""What does each of ten clients tell by its posterior of a shared regression?

Expect: how many records it holds, and their means and variances, from 10,000 draws to about one and two percent; what
the likelihood sees of the records adds over clients, so that the whole federation's statistics come back too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from fedtap.scenarios.posteriors.regression import TableRegression
from fedtap.simulator.options import Option
from fedtap.simulator.scenario import Row


@dataclass(frozen=True)
class PosteriorShards(TableRegression):
    """Bayesian clients with a share of the records each, attacked in one stack, and the sum of them all."""

    shards: Annotated[int, Option("clients, among whom the records are dealt", 2, 1000, "federation")] = 10
    pseudo: int = 50

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Every client's statistics over the truth."""
        from fedtap.simulator.report import pseudo_charts

        clients = list(dict.fromkeys(str(row["client"]) for row in rows))
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["truth"] and not row["statistic"].startswith("cov"):
                at = clients.index(str(row["client"]))
                series.setdefault(row["statistic"], []).append((at, row["value"] / row["truth"]))
        return {"Each client's statistics": pseudo_charts.ratios(series, "client", "value / truth", clients)}
