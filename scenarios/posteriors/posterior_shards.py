"""What does each of ten clients tell by its posterior of a shared regression?

Expect: how many records it holds, and their means and variances, from 10,000 draws to about one and two percent; what
the likelihood sees of the records adds over clients, so that the whole federation's statistics come back too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from fedtap.attackers.posteriors.fisher import ESTIMATORS
from fedtap.clients.bayesian import SAMPLERS
from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.posteriors.regression import MOST, Regression
from fedtap.simulator.report.charts import Panel, Series, chart
from fedtap.simulator.report.columns import grouped, setting
from fedtap.simulator.report.folder import Row


@dataclass(frozen=True)
class Shards(Regression):
    """Clients with a share of the records each, and the sum of them all."""

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Every client's statistics over the truth."""
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


def scenario(
    *,
    shards: Annotated[int, Knob("clients, among whom the records are dealt", 2, 1000)] = 10,
    data: Annotated[
        str, Knob("posteriordb data (.json, .json.zip); none: 434 records are made", path=True, swept=False)
    ] = "",
    x: Annotated[str, Knob("the data's columns that are inputs, joined by commas", swept=False)] = "",
    y: Annotated[str, Knob("the data's column that is the output", swept=False)] = "",
    prior: Annotated[str, Knob("of σ: flat, or halfcauchy(SCALE); β is flat")] = "halfcauchy(2.5)",
    sampler: Annotated[str, Knob("how a client answers", choices=SAMPLERS)] = "exact",
    samples: Annotated[int, Knob("draws that each makes", 2, 10_000_000)] = 10_000,
    pseudo: Annotated[int, Knob("pseudo-points for each client", 2, MOST)] = 50,
    estimator: Annotated[str, Knob("how the divergence is estimated", choices=ESTIMATORS)] = "exact",
    seed: Annotated[int, Knob("seed of all that is drawn", 0, 2**31)] = 0,
) -> Shards:
    """Ten Bayesian clients, one answer each, attacked in one stack."""
    return Shards(
        shards=shards,
        data=data,
        x=x,
        y=y,
        prior=prior,
        sampler=sampler,
        samples=samples,
        pseudo=pseudo,
        estimator=estimator,
        seed=seed,
    )
