"""Scores of pseudo-data: here their statistics meet the private records', a row for each client and statistic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedtap.attackers.posteriors.fisher import Quadratic
from fedtap.attackers.posteriors.posterior_mmd import PosteriorMMD
from fedtap.scenarios.posteriors.regression import RegressionPosterior
from fedtap.simulator.attack import Attack, PseudoData
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.likelihoods import Likelihood, LinearRegression
from fedtap.simulator.report.charts import GREY, Panel, Series, chart
from fedtap.simulator.scenario import Row, Scored, Trial

COURSE = 200
"""Iterations that a chart shows, at most."""

_TINY = 1e-9
"""A truth below which no relative error is told."""

ALL = "all"
"""The name of the sum over clients, in rows."""

Powers = tuple[int, ...]
Sums = Callable[[Powers], Float[Tensor, "victims"] | None]
"""Of a monomial's powers, one a column, its sum over weighted points; None where it is not known."""

Statistics = Mapping[str, Float[Tensor, "victims"]]
"""Statistic -> what it is, of each client, and of their sum where there are several."""


def score_posteriors(setting: RegressionPosterior, trial: Trial) -> Scored:
    """A row for each client and statistic, then for the sum over clients where there are several; and charts."""
    attack, leak, found = trial.attack, trial.leak, trial.reconstruction
    model = setting.likelihood(trial.session.data_root)
    private = [setting.records(client, trial.session.data_root) for client in leak.clients.tolist()]
    start = attack.begin(leak.repeat(attack.starts), setting.seed)
    second = attack(leak, start=setting.elsewhere(start).to(leak.device)).on_cpu()

    def statistics(sums: Sums) -> Statistics:
        return setting.statistics(_with_total(sums), model)

    readings = {"value": statistics(sums_of(*all_of(found))), "second": statistics(sums_of(*all_of(second)))}
    if private[0] is not None:
        readings["truth"] = statistics(_sums_over(private))
    sections = {}
    if isinstance(attack, PosteriorMMD):
        quadratic = attack.quadratic(leak) if isinstance(model, LinearRegression) else None
        steps, course = _course(attack, leak, start.to(leak.device), quadratic)
        readings["start"] = statistics(course[0])
        if quadratic is not None and isinstance(model, LinearRegression):
            readings["oracle"] = statistics(sums_in(model, quadratic.minimum().cpu()))
            sections = _convergence(setting, steps, [statistics(sums) for sums in course], readings)
    sections["Pseudo-data over the private records"] = points_chart(
        private[0],
        {"pseudo-data": _first(found), "pseudo-data that began elsewhere": _first(second)},
        (setting.labelled(_labels(model)[0]), setting.labelled("y")),
    )
    return Scored(_rows(setting, attack, model, readings, found, second), sections=sections)


def _course(
    attack: PosteriorMMD, leak: Leak, start: Float[Tensor, "victims pseudo columns"], quadratic: Quadratic | None
) -> tuple[list[int], list[Sums]]:
    """Iterations, and the sums there; on batches of draws, which no chart shows, the start alone."""
    path = attack.path(leak, start, quadratic)
    every = max(1, attack.steps // COURSE) if attack.optimiser == "adam" else 1
    found = {
        step: sums_of(weights.cpu(), points.cpu())
        for step, (weights, points, _) in enumerate(path if quadratic is not None else itertools.islice(path, 1))
        if step % every == 0
    }
    return list(found), list(found.values())


def _rows(
    setting: RegressionPosterior,
    attack: Attack[PseudoData],
    model: Likelihood,
    readings: Mapping[str, Statistics],
    found: PseudoData,
    second: PseudoData,
) -> list[Row]:
    rows: list[Row] = []
    far = apart(found, second)
    known = {name: getattr(attack, name, None) for name in ("estimator", "whiten", "optimiser", "pseudo")}
    if isinstance(known["whiten"], bool):
        known["whiten"] = "yes" if known["whiten"] else "no"
    for client in range(len(readings["value"]["sum_w"])):
        single = client < len(far)
        about = {
            "model": str(model),
            **known,
            "objective": float(found.objective[client]) if single else None,
            "second_objective": float(second.objective[client]) if single else None,
            "apart": far[client] if single else None,
        }
        for statistic in readings["value"]:
            said = {
                kind: float(some[statistic][client]) if statistic in some else None for kind, some in readings.items()
            }
            rows.append(
                {"client": client if single else ALL, "statistic": statistic, "column": setting.column(statistic)}
                | {name: said.get(name) for name in ("value", "truth", "oracle")}
                | {"error": _error(said["value"], said.get("truth"))}
                | {name: said.get(name) for name in ("second", "start")}
                | about
            )
    return rows


def _convergence(
    setting: RegressionPosterior,
    steps: Sequence[int],
    course: Sequence[Statistics],
    readings: Mapping[str, Statistics],
) -> dict[str, str]:
    """How the first client's statistics converge: against the truth, or the oracle where there is none."""
    oracle = readings["oracle"]
    goals = {statistic: float(values[0]) for statistic, values in readings.get("truth", oracle).items()}
    reference = "truth" if "truth" in readings else "oracle"

    def scaled(statistic: str, values: Float[Tensor, "victims"]) -> float:
        """In units of the goal; a mean, as the deviations it is off."""
        value, goal = float(values[0]), goals[statistic]
        if statistic.startswith("mean"):
            return (value - goal) / math.sqrt(max(goals[statistic.replace("mean", "var")], 1e-300))
        return value / goal

    panels = []
    for kind, title in setting.panels.items():
        series: list[Series] = []
        for statistic in (name for name in goals if name.startswith(kind)):
            values = [scaled(statistic, one[statistic]) for one in course]
            series.append(Series(statistic, steps, values, "smooth"))
            if "truth" in readings:
                end = scaled(statistic, oracle[statistic])
                ends = Series(f"{statistic}, oracle", [steps[0], steps[-1]], [end, end], "dotted", like=statistic)
                series.append(ends)
        around = kind == "mean"
        spread = [value for one in series for value in one.y if value > 0]
        log = not around and bool(spread) and max(spread) > 10 * min(spread)
        levels = {reference: 0.0 if around else 1.0}
        panels.append(Panel("iteration", "", series, f"{title} {reference}", levels, log=log))
    if not panels:
        return {}
    return {"How they converge": chart(panels, "statistics of the pseudo-data against iterations", height=4.0)}


LARGEST = 60.0
"""Area of the heaviest pseudo-point on its chart, in square points."""


def points_chart(
    real: Float[Tensor, "records columns"] | None,
    reconstructions: Mapping[str, tuple[Float[Tensor, "pseudo columns"], Float[Tensor, "pseudo"]]],
    names: tuple[str, str],
) -> str:
    """The first and the last column: private records, and reconstructed points, as large as their weights."""
    private = []
    if real is not None:
        private = [Series("private records", real[:, 0].tolist(), real[:, -1].tolist(), "specks", color=GREY)]
    panels = []
    for label, (found, weights) in reconstructions.items():
        x, y, sizes = (column.tolist() for column in (found[:, 0], found[:, -1], LARGEST * weights / weights.max()))
        panels.append(Panel(*names, [*private, Series(label, x, y, "open", sizes=sizes)]))
    return chart(panels, "pseudo-data over the private records", height=4.6)


def mean_and_spread(sums: Sums, model: Likelihood) -> dict[str, Float[Tensor, "victims"]]:
    """Σw, means, variances, covariances."""
    unit = (0,) * model.columns
    labels = _labels(model)
    total = sums(unit)
    assert total is not None
    means = [_moment(sums, total, _raised(unit, at)) for at in range(model.columns)]
    found = {"sum_w": total} | {f"mean_{label}": mean for label, mean in zip(labels, means, strict=True)}
    pairs = [(at, at) for at in range(model.columns)] + [*itertools.combinations(range(model.columns), 2)]
    for one, other in pairs:
        name = f"var_{labels[one]}" if one == other else f"cov_{labels[one]}_{labels[other]}"
        product = _moment(sums, total, _raised(_raised(unit, one), other))
        found[name] = product - means[one] * means[other]
    return found


def apart(found: PseudoData, other: PseudoData) -> list[float]:
    """How far the points of two reconstructions lie from each other, in the first one's deviations, matched for the
    least."""
    distances = []
    (weights, points), (_, others) = all_of(found), all_of(other)
    share = (weights / weights.sum(1, keepdim=True))[..., None]
    centre = (share * points).sum(1, keepdim=True)
    scale = (share * (points - centre).square()).sum(1, keepdim=True).sqrt().clamp_min(1e-300)
    for one, two in zip(points / scale, others / scale, strict=True):
        cost = torch.cdist(one, two).square().numpy()
        distances.append(float(cost[linear_sum_assignment(cost)].mean() ** 0.5))
    return distances


def all_of(found: PseudoData) -> tuple[Float[Tensor, "victims pseudo"], Float[Tensor, "victims pseudo columns"]]:
    """Weights, and points with their targets."""
    return found.weights, torch.cat([found.points, found.targets[..., None]], dim=-1)


def sums_of(weights: Float[Tensor, "victims points"], points: Float[Tensor, "victims points columns"]) -> Sums:
    """The sums of weighted points."""
    return lambda powers: (weights * (points ** points.new_tensor(powers)).prod(-1)).sum(-1)


def sums_in(model: LinearRegression, sums: Float[Tensor, "victims statistics"]) -> Sums:
    """The sums that are sufficient statistics; none else."""
    places = {powers: at for at, powers in enumerate(model.monomials)}
    return lambda powers: sums[:, places[powers]] if powers in places else None


def _sums_over(records: Sequence[Float[Tensor, "records columns"] | None]) -> Sums:
    """The sums of each client's records."""
    known = [(torch.ones(1, len(some)).to(some), some[None]) for some in records if some is not None]
    return lambda powers: torch.cat([sums for one in known if (sums := sums_of(*one)(powers)) is not None])


def _with_total(sums: Sums) -> Sums:
    """With the sum over clients after theirs, where there are several."""

    def both(powers: Powers) -> Float[Tensor, "victims"] | None:
        found = sums(powers)
        return found if found is None or len(found) == 1 else torch.cat([found, found.sum(0, keepdim=True)])

    return both


def _moment(sums: Sums, total: Tensor, powers: Powers) -> Float[Tensor, "victims"]:
    found = sums(powers)
    assert found is not None, f"no sufficient statistic of {powers}"
    return found / total


def _raised(powers: Powers, at: int) -> Powers:
    return tuple(power + (column == at) for column, power in enumerate(powers))


def _labels(model: Likelihood) -> tuple[str, ...]:
    """`x`, `y`; or `x1`, `x2`, …, `y`."""
    many = model.inputs > 1
    return (*(f"x{at + 1}" if many else "x" for at in range(model.inputs)), "y")


def _error(value: float | None, truth: float | None) -> float | None:
    sound = value is not None and truth is not None and abs(truth) > _TINY
    return abs(float(value / truth) - 1) if sound else None  # type: ignore[operator]


def _first(found: PseudoData) -> tuple[Float[Tensor, "pseudo columns"], Float[Tensor, "pseudo"]]:
    """The first victim's points and weights."""
    weights, points = all_of(found)
    return points[0], weights[0]
