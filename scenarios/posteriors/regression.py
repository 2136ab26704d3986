"""What the scenarios about regressions' posteriors share: who holds which records, how they are asked, what is told."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedtap.attackers.posteriors.fisher import Quadratic
from fedtap.attackers.posteriors.posterior_mmd import PosteriorMMD
from fedtap.clients import bayesian
from fedtap.simulator.attack import PseudoData, generator
from fedtap.simulator.data.posteriordb import read_columns, read_draws
from fedtap.simulator.errors import ClientError, FedtapError, short
from fedtap.simulator.files import exists
from fedtap.simulator.leaks import PosteriorLeak, Protocol, stack
from fedtap.simulator.models.likelihoods import NORMAL, Likelihood, LinearRegression, likelihood
from fedtap.simulator.report.charts import GREY, Panel, Series, chart
from fedtap.simulator.report.columns import Column
from fedtap.simulator.report.folder import Row
from fedtap.simulator.study import Exchange, Outcome, Study, ask, read
from fedtap.simulator.wire.records import tensors_of

POSTERIOR = "train.posterior"
"""Message type under which clients are asked for their posterior."""

MADE = 434
"""Records that are made where no file is named."""

MOST = 4000
"""Pseudo-points, at most: two sets of them are matched one by one."""

COURSE = 200
"""Iterations that a chart shows, at most."""

WHITENED = ("yes", "no")

TINY = 1e-9
"""A truth below which no relative error is told."""

REGRESSIONS = ("linear_regression", "polynomial")
"""Models of which σ has the prior that is asked for."""

ALL = "all"
"""The name of the sum over clients, in rows."""

PANELS = {"sum": "Σw /", "mean": "means, deviations off the", "var": "variances /"}

Powers = tuple[int, ...]
Sums = Callable[[Powers], Float[Tensor, "victims"] | None]
"""Of a monomial's powers, one a column, its sum over weighted points; None where it is not known."""

THREAT = (
    "A curious server chose the model and the prior, and reads the posterior that a client answers with: draws, or "
    "mean and covariance. It is not told how many records the client has, nor of which size they are."
)


@dataclass(frozen=True)
class Regression(Study):
    """Clients with a posterior of one model each, and what its pseudo-data have in common with their records.

    Without a file, 434 records are made: y = 26 + 0.6 x + N(0, 18²), x skewed around 100. For a network all columns
    are standardised.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        *(Column(name, over="same") for name in ("client", "statistic", "column")),
        Column("value", "of the pseudo-data"),
        Column("truth", "of the private records"),
        Column("oracle", "of the exact minimiser"),
        Column("error", "|value / truth − 1|"),
        Column("second", "of pseudo-data from a second initialisation"),
        Column("start", "where they began"),
        *(Column(name, over="hidden") for name in ("objective", "second_objective", "apart")),
    )
    threat: ClassVar[str] = THREAT

    draws: str = ""
    """File of draws that the client answers with; none means that it samples."""
    data: str = ""
    x: str = ""
    """Columns of the data file that are inputs, joined by commas."""
    y: str = ""
    model: str = "linear_regression"
    prior: str = "halfcauchy(2.5)"
    sampler: str = "exact"
    samples: int = 10_000
    """Draws that a client makes."""
    shards: int = 1
    """Clients, each with as many of the records, or one fewer."""
    pseudo: int = 200
    whiten: str = "yes"
    estimator: str = "exact"
    optimiser: str = "gauss_newton"
    iterations: int = 0

    def __post_init__(self) -> None:
        if self.data and not (self.x and self.y):
            raise FedtapError(
                f"{short(self.data)} has columns, and which are meant is not said: add --x NAME[,NAME…] --y NAME."
            )
        if (self.x or self.y) and not self.data:
            raise FedtapError("--x and --y name columns of a data file, and there is none: add --data FILE.")
        if not all(self.names):
            raise FedtapError(
                f"--x {short(self.x)} --y {short(self.y)} leaves a column without a name: write --x NAME,NAME --y NAME."
            )
        if len(set(self.names)) < len(self.names):
            raise FedtapError(
                f"--x {short(self.x)} --y {short(self.y)} names a column twice, and copies tell nothing: name it once."
            )
        if self.draws and self.shards > 1:
            raise FedtapError("--draws are of one client's posterior, and here are several: leave it out.")
        if self.draws and (self.sampler, self.samples) != (Regression.sampler, Regression.samples):
            raise FedtapError("With --draws nothing is sampled: leave out --sampler and --samples, or the draws.")
        self.attack  # noqa: B018 (its fields are checked)
        model = likelihood(self.model, 1, self.prior)
        if self.sampler == "exact" and not self.draws and not isinstance(model, LinearRegression):
            raise FedtapError(
                f"There is no exact sampler of {short(self.model)}'s posterior: use --sampler hmc, or laplace."
            )

    @property
    def clients(self) -> int:
        return self.shards

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, the output last; empty where no file is named."""
        return (*(name.strip() for name in self.x.split(",")), self.y.strip()) if self.data else ()

    @property
    def attack(self) -> PosteriorMMD:
        """The attack, as the knobs say."""
        return PosteriorMMD(self.pseudo, self.whiten == "yes", self.estimator, self.optimiser, self.iterations)

    def records(self, client: int, data_root: Path) -> Float[Tensor, "records columns"] | None:
        """A client's private records, the output last; None where only draws are at hand.

        Raises:
            FedtapError: the data file cannot be read, or has fewer records than there are clients.
        """
        if self.draws and not self.data:
            return None
        every = _columns(_found(self.data, data_root), self.names) if self.data else self.made()
        if not self.model.startswith(REGRESSIONS):  # a network is trained on numbers around 0
            every = (every - every.mean(0)) / every.std(0).clamp_min(1e-300)
        if len(every) < self.shards:
            raise FedtapError(f"{len(every)} records cannot be dealt to {self.shards} clients: give more records.")
        order = torch.randperm(len(every), generator=generator(self.seed, "shards"))
        return every if self.shards == 1 else every[order[client :: self.shards]]

    def made(self) -> Float[Tensor, "records columns"]:
        """Records of no file."""
        draw = np.random.default_rng(self.seed)
        x = 70 + draw.gamma(4.0, 7.5, MADE)
        return torch.from_numpy(np.stack([x, 26 + 0.6 * x + draw.normal(0, 18, MADE)], axis=1))

    def likelihood(self, data_root: Path) -> Likelihood:
        """The model, on as many inputs as the records or the draws have.

        Raises:
            FedtapError: the draws are not of so many parameters.
        """
        records = self.records(0, data_root)
        drawn = len(_draws(_found(self.draws, data_root))[0]) if self.draws else 0
        inputs = records.shape[1] - 1 if records is not None else max(drawn - 2, 1)
        prior = self.prior if self.model.startswith(REGRESSIONS) else NORMAL
        model = likelihood(self.model, inputs, prior)
        names = _draws(_found(self.draws, data_root))[0] if self.draws else ()
        if "sigma" in names[:-1]:
            raise FedtapError(
                f"{self.draws} has its draws in the order {', '.join(names)}, and a regression's σ comes after its "
                "coefficients: put sigma last."
            )
        if self.draws and drawn != len(model.parameters):
            raise FedtapError(
                f"{self.draws} has draws of {drawn} parameters, and {model} on {inputs} inputs has "
                f"{len(model.parameters)} ({', '.join(model.parameters)}): name the inputs that the draws are of, --x."
            )
        return model

    def answer(self, order: Message, client: int, data_root: Path) -> Message:
        """Its draws, as it samples them or as its file has them."""
        if self.draws:
            return bayesian.posterior(order, client, {"draws": _draws(_found(self.draws, data_root))[1]})
        records = self.records(client, data_root)
        assert records is not None
        return bayesian.posterior_reply(
            order, client, self.likelihood(data_root), records, self.sampler, self.samples, self.seed
        )

    def play(self, grid: Grid, part: int, device: torch.device, data_root: Path) -> Outcome:
        """Ask each client once, attack all at once, and set the statistics beside the records'."""
        model = self.likelihood(data_root)
        private = [self.records(client, data_root) for client in range(self.clients)]
        leak = _heard(model, self.prior, ask(grid, POSTERIOR, RecordDict({}), part))
        on_device, attack = leak.to(device), self.attack
        start = attack.begin(leak, self.seed)
        quadratic = attack.quadratic(on_device) if isinstance(model, LinearRegression) else None
        guess = attack(on_device, start=start).on_cpu()
        *_, (weights, points, objective) = attack.path(on_device, self.elsewhere(start).to(device), quadratic)
        second = PseudoData(points[..., :-1], points[..., -1], weights, objective).on_cpu()
        steps, course = self.course(on_device, start, quadratic)
        readings = {
            "value": self.readings(with_total(sums_of(*all_of(guess))), model),
            "second": self.readings(with_total(sums_of(*all_of(second))), model),
            "start": self.readings(with_total(course[0]), model),
        }
        if quadratic is not None and isinstance(model, LinearRegression):
            readings["oracle"] = self.readings(with_total(sums_in(model, quadratic.minimum().cpu())), model)
        if private[0] is not None:
            readings["truth"] = self.readings(with_total(sums_over(private)), model)
        charts = {}
        if quadratic is not None:  # on batches of draws, only the ends are known
            charts = self.charts_of(steps, [self.readings(sums, model) for sums in course], readings)
        charts |= {
            "Pseudo-data over the private records": points_chart(
                private[0],
                {"pseudo-data": _first(guess), "second initialisation": _first(second)},
                (self.named(_labels(model)[0]), self.named("y")),
            )
        }
        return Outcome(self.rows_of(readings, model, guess, second), leak, charts)

    def elsewhere(self, start: Float[Tensor, "victims pseudo columns"]) -> Float[Tensor, "victims pseudo columns"]:
        """Another start: corners of a square, and little around them."""
        return 0.6 * start.sign() + 0.1 * start

    def course(
        self, leak: PosteriorLeak, start: Float[Tensor, "victims pseudo columns"], quadratic: Quadratic | None
    ) -> tuple[list[int], list[Sums]]:
        """Iterations, and the sums there."""
        found: dict[int, Sums] = {}
        every = max(1, self.attack.steps // COURSE) if self.optimiser == "adam" else 1
        for step, (weights, points, _) in enumerate(self.attack.path(leak, start.to(leak.device), quadratic)):
            if step % every == 0:
                found[step] = sums_of(weights.cpu(), points.cpu())
        return list(found), list(found.values())

    def readings(self, sums: Sums, model: Likelihood) -> dict[str, Float[Tensor, "victims"]]:
        """Statistic -> what it is, of those that the sums tell: Σw, means, variances, covariances."""
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

    def named(self, label: str) -> str:
        """A label as the data file calls it: `x`, `x2`, `y`."""
        if not self.data:
            return label
        if label == "y":
            return self.names[-1]
        return self.names[int(label.removeprefix("x") or 1) - 1]

    def rows_of(
        self,
        readings: Mapping[str, Mapping[str, Float[Tensor, "victims"]]],
        model: Likelihood,
        guess: PseudoData,
        second: PseudoData,
    ) -> list[Row]:
        """A row for each client and statistic, then for the sum over clients, where there are several."""
        rows: list[Row] = []
        far = apart(guess, second)
        for client in range(len(readings["value"]["sum_w"])):
            single = client < self.clients
            about = {
                "model": str(model),
                "estimator": self.estimator,
                "whiten": self.whiten,
                "optimiser": self.optimiser,
                "pseudo": self.pseudo,
                "objective": float(guess.objective[client]) if single else None,
                "second_objective": float(second.objective[client]) if single else None,
                "apart": far[client] if single else None,
            }
            for statistic in readings["value"]:
                said = {
                    kind: float(some[statistic][client]) if statistic in some else None
                    for kind, some in readings.items()
                }
                rows.append(
                    {"client": client if single else ALL, "statistic": statistic, "column": self._columns_of(statistic)}
                    | {name: said.get(name) for name in ("value", "truth", "oracle")}
                    | {
                        "error": _error(said["value"], said.get("truth")),
                        "second": said["second"],
                        "start": said["start"],
                    }
                    | about
                )
        return rows

    def _columns_of(self, statistic: str) -> str:
        labels = statistic.split("_")[1:]
        return "" if statistic == "sum_w" else ", ".join(self.named(label) for label in labels)

    def charts_of(
        self,
        steps: Sequence[int],
        course: Sequence[Mapping[str, Float[Tensor, "victims"]]],
        readings: Mapping[str, Mapping[str, Float[Tensor, "victims"]]],
    ) -> dict[str, str]:
        """How the first client's statistics converge: against the truth, or the oracle where there is none."""
        oracle = readings.get("oracle", {})
        target = readings.get("truth", oracle)
        if not target:
            return {}
        goals = {statistic: float(values[0]) for statistic, values in target.items()}
        reference = "truth" if "truth" in readings else "oracle"

        def scaled(statistic: str, values: Float[Tensor, "victims"]) -> float:
            """In units of the goal; a mean, as the deviations it is off."""
            value, goal = float(values[0]), goals[statistic]
            if statistic.startswith("mean"):
                return (value - goal) / math.sqrt(max(goals[statistic.replace("mean", "var")], 1e-300))
            return value / goal

        panels = []
        for kind, title in PANELS.items():
            series: list[Series] = []
            for statistic in (name for name in goals if name.startswith(kind)):
                values = [scaled(statistic, one[statistic]) for one in course]
                series.append(Series(statistic, steps, values, "smooth"))
                if oracle and "truth" in readings:
                    end = scaled(statistic, oracle[statistic])
                    ends = Series(f"{statistic}, oracle", [steps[0], steps[-1]], [end, end], "dotted", like=statistic)
                    series.append(ends)
            around = kind == "mean"
            spread = [value for one in series for value in one.y if value > 0]
            log = not around and bool(spread) and max(spread) > 10 * min(spread)
            levels = {reference: 0.0 if around else 1.0}
            panels.append(Panel("iteration", "", series, f"{title} {reference}", levels, log=log))
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


def apart(guess: PseudoData, other: PseudoData) -> list[float]:
    """How far the points of two guesses lie from each other, in the first one's deviations, matched for the least."""
    found = []
    (weights, points), (_, others) = all_of(guess), all_of(other)
    share = (weights / weights.sum(1, keepdim=True))[..., None]
    centre = (share * points).sum(1, keepdim=True)
    scale = (share * (points - centre).square()).sum(1, keepdim=True).sqrt().clamp_min(1e-300)
    for one, two in zip(points / scale, others / scale, strict=True):
        cost = torch.cdist(one, two).square().numpy()
        found.append(float(cost[linear_sum_assignment(cost)].mean() ** 0.5))
    return found


def all_of(guess: PseudoData) -> tuple[Float[Tensor, "victims pseudo"], Float[Tensor, "victims pseudo columns"]]:
    """Weights, and points with their targets."""
    return guess.weights, torch.cat([guess.points, guess.targets[..., None]], dim=-1)


def sums_of(weights: Float[Tensor, "victims points"], points: Float[Tensor, "victims points columns"]) -> Sums:
    """The sums of weighted points."""
    return lambda powers: (weights * (points ** points.new_tensor(powers)).prod(-1)).sum(-1)


def sums_in(model: LinearRegression, sums: Float[Tensor, "victims statistics"]) -> Sums:
    """The sums that are sufficient statistics; none else."""
    places = {powers: at for at, powers in enumerate(model.monomials)}
    return lambda powers: sums[:, places[powers]] if powers in places else None


def sums_over(records: Sequence[Float[Tensor, "records columns"] | None]) -> Sums:
    """The sums of each client's records."""
    known = [(torch.ones(1, len(some)).to(some), some[None]) for some in records if some is not None]
    return lambda powers: torch.cat([sums for one in known if (sums := sums_of(*one)(powers)) is not None])


def with_total(sums: Sums) -> Sums:
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
    sound = value is not None and truth is not None and abs(truth) > TINY
    return abs(float(value / truth) - 1) if sound else None  # type: ignore[operator]


def _first(guess: PseudoData) -> tuple[Float[Tensor, "pseudo columns"], Float[Tensor, "pseudo"]]:
    """The first victim's points and weights."""
    weights, points = all_of(guess)
    return points[0], weights[0]


def _heard(model: Likelihood, prior: str, heard: Sequence[Exchange]) -> PosteriorLeak:
    """All clients' posteriors in one stack: every one is needed, for the sum over them."""
    leaks = read(heard, lambda one: _leak(model, prior, one))
    for leak in leaks[1:]:
        if leak.sent() != leaks[0].sent():
            raise ClientError(
                f"Client {int(leak.clients[0])} sent other draws, or another number of them, than the first did, and "
                "all are attacked at once: let all clients sample alike."
            )
    return cast(PosteriorLeak, stack(leaks))


def _leak(model: Likelihood, prior: str, one: Exchange) -> PosteriorLeak:
    name = torch.tensor([one.client])
    leak = PosteriorLeak(
        observed={key: tensor[None] for key, tensor in tensors_of(one.answer.array_records["posterior"]).items()},
        protocol=Protocol(
            model=str(model),
            shape=(model.inputs,),
            classes=1,
            batch=1,
            prior=prior if isinstance(model, LinearRegression) else NORMAL,
        ),
        network=model.network(),
        weights=None,
        buffers={},
        clients=name,
        rounds=torch.ones_like(name),
        restarts=torch.zeros_like(name),
    )
    leak.check()
    return leak


def _found(name: str, data_root: Path) -> Path:
    """The file as named, or in the data root."""
    return Path(name) if exists(Path(name)) else data_root / name


@lru_cache(maxsize=2)
def _columns(path: Path, names: tuple[str, ...]) -> Float[Tensor, "records columns"]:
    return read_columns(path, names)


@lru_cache(maxsize=2)
def _draws(path: Path) -> tuple[tuple[str, ...], Float[Tensor, "draws d"]]:
    return read_draws(path)
