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
        from fedtap.simulator.report.charts import Panel, Series, chart
        from fedtap.simulator.report.columns import grouped, setting

        clients = list(dict.fromkeys(str(row["client"]) for row in rows))
        series = []
        told = [row for row in rows if row["truth"] and not row["statistic"].startswith("cov")]
        groups = grouped(told, [setting("statistic")])
        for number, some in enumerate(groups):
            aside = 0.08 * (number - (len(groups) - 1) / 2)  # so that points at one client do not hide each other
            at = [clients.index(str(row["client"])) + aside for row in some]
            series.append(Series(some[0]["statistic"], at, [row["value"] / row["truth"] for row in some], "dots"))
        panel = Panel("client", "value / truth", series, levels={"truth": 1.0}, ticknames=clients)
        return {"Each client's statistics": chart([panel], "value / truth against client")}
