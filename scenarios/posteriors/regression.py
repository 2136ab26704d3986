"""What the scenarios about regressions' posteriors share: who holds which records, how clients reply, what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from fedtap.scenarios.attack_options import Attacked
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.options import Option
from fedtap.simulator.report.columns import Column
from fedtap.simulator.scenario import Observed, Scored, Session, Trial

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from jaxtyping import Float
    from torch import Tensor

    from fedtap.scenarios.posteriors.scoring import Sums
    from fedtap.simulator.leaks import Leak
    from fedtap.simulator.models.likelihoods import Likelihood

MADE = 434
"""Records that are made where no file is named."""

_MOST = 4000
"""Pseudo-points, at most: two sets of them are matched one by one."""

REGRESSIONS = ("linear_regression", "polynomial")
"""Models of which σ has the prior that is asked for."""

HYPERPARAMETERS = ("pseudo", "whiten", "estimator", "optimiser", "iterations")
"""Options that are posterior_mmd's own fields, in their order there."""

_THREAT = (
    "A curious server chose the model and the prior, and reads the posterior that a client replies with: draws, or "
    "mean and covariance. It is not told how many records the client has, nor of which size they are."
)


@dataclass(frozen=True)
class RegressionPosterior(Attacked):
    """Clients with a posterior of one model each, and what its pseudo-data have in common with their records.

    Without a file, 434 records are made: y = 26 + 0.6 x + N(0, 18²), x skewed around 100. For a network all columns
    are standardised.

    Class attributes:
        panels: beginning of a statistic's name -> the panel that shows how such statistics converge.

    Raises:
        FedtapError: options that contradict each other, a column that is not named, or no such model, prior or attack.
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

    leads: ClassVar[str] = "error"
    reconstructs: ClassVar[str] = "PseudoData"
    panels: ClassVar[Mapping[str, str]] = {"sum": "Σw /", "mean": "means, deviations off the", "var": "variances /"}

    draws: str = ""
    """File of draws that the client replies with; none means that it samples."""
    data: str = ""
    x: str = ""
    """Columns of the data file that are inputs, joined by commas."""
    y: str = ""
    model: str = "linear_regression"
    prior: Annotated[str, Option("of σ: flat, or halfcauchy(SCALE); β is flat", group="model")] = "halfcauchy(2.5)"
    sampler: str = "exact"
    samples: Annotated[int, Option("draws that each client makes", 2, 10_000_000, "federation")] = 10_000
    shards: int = 1
    """Clients, each with as many of the records, or one fewer."""
    pseudo: Annotated[int, Option("posterior_mmd's pseudo-points for each client", 2, _MOST, "attack")] = 200
    whiten: str = "yes"
    estimator: str = "exact"
    optimiser: str = "gauss_newton"
    iterations: int = 0

    def __post_init__(self) -> None:
        from fedtap.simulator.models.likelihoods import LinearRegression, likelihood

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
        if self.draws and (self._said("sampler") or self._said("samples")):
            raise FedtapError("With --draws nothing is sampled: leave out --sampler and --samples, or the draws.")
        if self.attack and (
            said := [f"--{name}" for name in HYPERPARAMETERS if name in (self.given or ()) or self._said(name)]
        ):
            raise FedtapError(
                f"{' and '.join(said)} belong to the posterior_mmd in whose place --attack {short(self.attack)} puts "
                "another: write them into --attack, as in 'posterior_mmd(pseudo=30)', or leave --attack out."
            )
        self.attacks  # noqa: B018 (their fields are checked)
        model = likelihood(self.model, 1, self.prior)
        if self.sampler == "exact" and not self.draws and not isinstance(model, LinearRegression):
            raise FedtapError(
                f"There is no exact sampler of {short(self.model)}'s posterior: use --sampler hmc, or laplace."
            )

    def _said(self, name: str) -> bool:
        """Whether the option has another value than its default."""
        return bool(getattr(self, name) != getattr(type(self), name))

    @property
    def named(self) -> str:
        """The attacks as they are written: posterior_mmd with the options, or those that are named in its place."""
        own = (self.pseudo, self.whiten == "yes", self.estimator, self.optimiser, self.iterations)
        return super().named or f"posterior_mmd({', '.join(map(repr, own))})"

    @property
    def nodes(self) -> int:
        """One for each client."""
        return self.shards

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, the output last; empty where no file is named."""
        return (*(name.strip() for name in self.x.split(",")), self.y.strip()) if self.data else ()

    def records(self, client: int, data_root: Path) -> Float[Tensor, "records columns"] | None:
        """A client's private records, the output last; None where only draws are at hand.

        Raises:
            FedtapError: the data file cannot be read, or has fewer records than there are clients.
        """
        import torch

        from fedtap.simulator.attack import generator

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
        import numpy as np
        import torch

        draw = np.random.default_rng(self.seed)
        x = 70 + draw.gamma(4.0, 7.5, MADE)
        return torch.from_numpy(np.stack([x, 26 + 0.6 * x + draw.normal(0, 18, MADE)], axis=1))

    def likelihood(self, data_root: Path) -> Likelihood:
        """The model, on as many inputs as the records or the draws have.

        Raises:
            FedtapError: the draws are of another number of parameters, or have σ before the coefficients.
        """
        from fedtap.simulator.models.likelihoods import NORMAL, likelihood

        records = self.records(0, data_root)
        names = _draws(_found(self.draws, data_root))[0] if self.draws else ()
        inputs = records.shape[1] - 1 if records is not None else max(len(names) - 2, 1)
        prior = self.prior if self.model.startswith(REGRESSIONS) else NORMAL
        model = likelihood(self.model, inputs, prior)
        if "sigma" in names[:-1]:
            raise FedtapError(
                f"{self.draws} has its draws in the order {', '.join(names)}, and a regression's σ comes after its "
                "coefficients: put sigma last."
            )
        if self.draws and len(names) != len(model.parameters):
            raise FedtapError(
                f"{self.draws} has draws of {len(names)} parameters, and {model} on {inputs} inputs has "
                f"{len(model.parameters)} ({', '.join(model.parameters)}): name the inputs that the draws are of, --x."
            )
        return model

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """Its draws, as it samples them or as its file has them."""
        from fedtap.clients import bayesian

        client = int(context.node_config["partition-id"])
        if self.draws:
            return bayesian.posterior(message, client, {"draws": _draws(_found(self.draws, data_root))[1]})
        records = self.records(client, data_root)
        assert records is not None
        model = self.likelihood(data_root)
        return bayesian.posterior_reply(message, client, model, records, self.sampler, self.samples, self.seed)

    def observe(self, session: Session) -> Observed:
        """Each client's posterior, asked for once; all are needed, for the sum over them."""
        from fedtap.scenarios.posteriors.exchange import posteriors
        from fedtap.simulator.wire.messages import check_nodes

        check_nodes(session.grid, self.nodes, self.name)
        return Observed(posteriors(session, self.likelihood(session.data_root), self.prior))

    def elsewhere(self, start: Tensor) -> Tensor:
        """A second initialisation: corners of a square, and little around them."""
        return 0.6 * start.sign() + 0.1 * start

    def statistics(self, sums: Sums, model: Likelihood) -> dict[str, Float[Tensor, "victims"]]:
        """Statistic -> what it is, of those that the sums tell: Σw, means, variances, covariances."""
        from fedtap.scenarios.posteriors.scoring import mean_and_spread

        return mean_and_spread(sums, model)

    def labelled(self, label: str) -> str:
        """A label as the data file calls it: `x`, `x2`, `y`."""
        if not self.data:
            return label
        return self.names[-1] if label == "y" else self.names[int(label.removeprefix("x") or 1) - 1]

    def column(self, statistic: str) -> str:
        """The columns that a statistic is about."""
        return "" if statistic == "sum_w" else ", ".join(map(self.labelled, statistic.split("_")[1:]))

    def score(self, trial: Trial) -> Scored:
        """The pseudo-data's statistics beside the records', the oracle's, and those of a second initialisation."""
        from fedtap.scenarios.posteriors.scoring import score_posteriors

        return score_posteriors(self, trial)

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """The server of a Bayesian federation."""
        return (_THREAT,)


@dataclass(frozen=True)
class TableRegression(RegressionPosterior):
    """A regression on the columns of a table, whose posterior may be sampled and compared in several ways."""

    data: Annotated[
        str,
        Option("posteriordb data (.json, .json.zip); none: 434 records are made", group="data", file=True, single=True),
    ] = ""
    x: Annotated[str, Option("the data's columns that are inputs, joined by commas", group="data", single=True)] = ""
    y: Annotated[str, Option("the data's column that is the output", group="data", single=True)] = ""
    sampler: Annotated[
        Literal["exact", "hmc", "laplace"], Option("how a client samples its posterior", group="federation")
    ] = "exact"
    estimator: Annotated[
        Literal["exact", "sliced", "denoising"], Option("how posterior_mmd estimates the divergence", group="attack")
    ] = "exact"


def _found(name: str, data_root: Path) -> Path:
    """The file as named, or in the data root."""
    from fedtap.simulator.files import exists

    return Path(name) if exists(Path(name)) else data_root / name


@lru_cache(maxsize=2)
def _columns(path: Path, names: tuple[str, ...]) -> Float[Tensor, "records columns"]:
    from fedtap.simulator.data.posteriordb import read_columns

    return read_columns(path, names)


@lru_cache(maxsize=2)
def _draws(path: Path) -> tuple[tuple[str, ...], Float[Tensor, "draws d"]]:
    from fedtap.simulator.data.posteriordb import read_draws

    return read_draws(path)
