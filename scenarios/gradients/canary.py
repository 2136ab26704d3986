"""Does noise after a clip hold what theory promises, against an attacker that knows everything but one secret?

Expect: yes. Two opposite canaries are told apart exactly as often as the bound allows, ten somewhat less often; with
half the noise, or with the clip skipped (--broken-mechanism), the measured success passes the bound, and the run ends
by saying so.

The trial is the one that the bound on reconstruction is about (Hayes, Mahloujifar and Balle, NeurIPS 2023,
https://arxiv.org/abs/2302.07225): a client holds one of K canaries, each as likely as the others, and the attacker
knows all of them, the defence, and everything else. Canaries are one white image under K labels: at zero weights the
gradients of softmax regression, (softmax(0) - label) ⊗ image, are the corners of a regular simplex, and for K = 2 they
are opposite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from fedtap.scenarios.attack_options import Attacked
from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.errors import ClientError, FedtapError
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.scenario import Observed, Row, Scored, Session, Trial

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from torch import Tensor

    from fedtap.simulator.attack import Attack
    from fedtap.simulator.data.images import Dataset
    from fedtap.simulator.defences.accountant import Gaussian
    from fedtap.simulator.leaks import Leak, Protocol
    from fedtap.simulator.report.columns import Group
    from fedtap.simulator.report.page import Page

SHAPE = (1, 16, 16)
"""Of the canaries' image, which is white: a gradient's norm is 16 √(1 - 1/K)."""

EXCESS = 10
"""How many times longer than the clip a canary's gradient is, at least: a skipped clip must show."""

LEVEL = 1e-4
"""Probability, at most, that an honest run has a success that seems to pass its bound: shared by the run's rows. It is
small because two canaries reach the bound, so that so many honest runs would be accused."""


@dataclass(frozen=True)
class Canary(Attacked):
    """One client, one secret, one release: clipped, with Gaussian noise.

    Raises:
        FedtapError: the canaries are too short for the clip, or a value out of range.
    """

    doubted: ClassVar[bool] = False

    canaries: Annotated[int, Option("equally likely secrets that a client may hold", 2, 100)] = sweep(2, 10)
    epsilon: Annotated[float, Option("ε of one release, add/remove, for which the noise is chosen", 1e-3, 1e3)] = sweep(
        0.5, 1.0, 2.0, 4.0, 8.0
    )
    delta: Annotated[float, Option("δ at which ε is meant", 1e-300, 1 - 1e-9)] = 1e-5
    clip: Annotated[float, Option("L2 norm to which clients clip their gradient", 1e-6, 1.5)] = 1.0
    trials: Annotated[int, Option("how many are made, for each ε", 1)] = 5000
    exchanges: Annotated[int, Option("of these, how many are whole exchanges between server and client", 0)] = 100
    broken_mechanism: Annotated[
        Literal["none", "half_noise", "no_clip"],
        Option("what is really done, unannounced: half the noise, or noise alone", group="defence"),
    ] = "none"
    attack: str = "known_image"

    def __post_init__(self) -> None:
        if self.length < EXCESS * self.clip:
            raise FedtapError(
                f"Canaries with gradients of norm {self.length:.3g} are not {EXCESS} times longer than the clip, so a "
                f"skipped clip would hardly show: lower --clip to {self.length / EXCESS:.3g} or less."
            )

    @property
    def length(self) -> float:
        """Norm of a canary's gradient."""
        return math.sqrt(math.prod(SHAPE) * (1 - 1 / self.canaries))

    @property
    def played(self) -> int:
        """Trials that are whole exchanges."""
        return min(self.exchanges, self.trials)

    @cached_property
    def mechanism(self) -> Gaussian:
        """What is announced."""
        from fedtap.simulator.defences.accountant import Gaussian, noise_for

        return Gaussian(noise_for(self.epsilon, self.delta, self.clip), self.clip, "client", "add/remove")

    @property
    def announced(self) -> str:
        """The defence that is announced, as it is written."""
        return f"clip({self.clip!r})+noise({self.mechanism.sigma!r})"

    @property
    def done(self) -> str:
        """What clients really do, as a defence is written."""
        sigma = self.mechanism.sigma / (2 if self.broken_mechanism == "half_noise" else 1)
        return f"noise({sigma!r})" if self.broken_mechanism == "no_clip" else f"clip({self.clip!r})+noise({sigma!r})"

    @property
    def truth(self) -> Tensor:
        """Which canary each client holds."""
        import torch

        from fedtap.simulator.attack import generator

        draw = generator(self.seed, "canaries", str(self.epsilon), self.canaries)
        return torch.randint(self.canaries, (self.trials,), generator=draw)

    @cached_property
    def federation(self) -> Exchanges:
        """The trials that are whole exchanges."""
        return Exchanges(
            attack="grey", model="softmax", learning_rate=1.0, defence=self.done, victims=max(self.played, 1),
            seed=self.seed, name=self.name, canary=self,
        )  # fmt: skip

    @property
    def nodes(self) -> int:
        """A client for each exchange, and the compromised one."""
        return self.played + 1

    @property
    def any_nodes(self) -> bool:
        """Exchanges take as many rounds as they need."""
        return True

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """What a client of the federation replies."""
        return self.federation.reply(message, context, data_root)

    def observe(self, session: Session) -> Observed:
        """Exchanges, and after them the clients' defence called alone, with no exchange around it."""
        import torch

        from fedtap.simulator.leaks import GradientLeak
        from fedtap.simulator.models.registry import build

        protocol = dataclasses.replace(self.federation.protocol(self.dataset()), defence=self.announced)
        parts = [self._defended(protocol)]
        if self.played:
            exchanged = self.federation.observe(session)
            if exchanged.missing or exchanged.leak is None:
                raise ClientError(f"A client failed, and all are needed: {next(iter(exchanged.missing.values()))}.")
            parts.insert(0, dict(exchanged.leak.observed))
        network = build("softmax", SHAPE, self.canaries, seed=0)
        leak = GradientLeak(
            observed={name: torch.cat([part[name] for part in parts]) for name in parts[0]},
            protocol=protocol,
            network=build("softmax", SHAPE, self.canaries),
            weights={name: weight.detach() for name, weight in network.named_parameters()},
            buffers={},
            clients=torch.arange(self.trials),
            rounds=torch.ones(self.trials, dtype=torch.long),
            restarts=torch.zeros(self.trials, dtype=torch.long),
        )
        return Observed(leak, keep=False)

    def _defended(self, protocol: Protocol) -> dict[str, Tensor]:
        """What the clients' defence makes of the canaries in the trials after the exchanges."""
        import torch

        from fedtap.simulator.attack import generator
        from fedtap.simulator.auxiliary import gradients
        from fedtap.simulator.defences.chained import parse
        from fedtap.simulator.models.registry import build

        images = torch.ones(self.canaries, 1, *SHAPE)
        every = gradients(build("softmax", SHAPE, self.canaries, seed=0), images, torch.arange(self.canaries)[:, None])
        held = {name: rows[self.truth[self.played :]] for name, rows in every.items()}
        draws = [generator(self.seed, "defence", client, 1) for client in range(self.played, self.trials)]
        return parse(self.done).update.stacked(held, draws) if draws else held

    def dataset(self) -> Dataset:
        """White images; a victim's label is its secret."""
        return _white(self.canaries, self.played, tuple(self.truth[: self.played].tolist()))

    def settled(self, attack: Attack, label: str, observed: Observed) -> Row:
        """Nothing: the row is about trials, and not about a victim of an attack."""
        return {}

    def score(self, trial: Trial) -> Scored:
        """One row. Success is the share of trials in which the label is right; its limits are Clopper and Pearson's,
        one-sided each."""
        from fedtap.simulator import scores
        from fedtap.simulator.federation.guarantees import UNCOVERED

        won = int((trial.reconstruction.labels[:, 0] == self.truth).sum())
        rows = sum(isinstance(setting, Canary) for setting in trial.session.settings)
        low, high = scores.limits(won, self.trials, LEVEL / rows)
        kappa = 1 / self.canaries
        row = {
            "canaries": self.canaries,
            "broken_mechanism": self.broken_mechanism,
            **dataclasses.asdict(self.mechanism.guarantee(self.delta)),
            "epsilon": self.epsilon,
            "sigma": self.mechanism.sigma,
            "not_covered": UNCOVERED,
            "defence": self.done,
            "trials": self.trials,
            "exchanges": self.played,
            "success": won / self.trials,
            "success_low": low,
            "success_high": high,
            "bound": self.mechanism.bound(kappa),
            "bound_renyi": self.mechanism.renyi_bound(kappa),
            "expected": expected(self),
            "accuracy": None,
        }
        return Scored([row])

    def verdict(self, rows: Sequence[Row]) -> None:
        """Hold every success against its bound.

        Raises:
            FedtapError: one of them is above, by more than chance allows.
        """
        for row in rows:
            if "canaries" in row and row["success_low"] > row["bound"]:
                raise FedtapError(
                    f"At ε = {row['epsilon']:g} the attacker tells {row['canaries']} canaries apart in "
                    f"{row['success']:.1%} of {row['trials']:,} trials (at least {row['success_low']:.1%}), and theory "
                    f"allows {row['bound']:.1%}: what is done, {row['defence']}, is not what is announced, so look at "
                    "its clip and its noise."
                )

    def shown_on(self, page: Page, rows: Sequence[Row]) -> tuple[Page, Group]:
        """With the measured success beside every bound."""
        from fedtap.simulator.report.images import page_of

        return page_of(page, rows)

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """The attacker of the bound."""
        from fedtap.simulator.federation.guarantees import UNCOVERED

        return (
            "The attacker knows the model, the weights, the clip, the noise's size and all K canaries, each as likely "
            "as the others, and says which one the client holds: κ = 1/K. ε is that of one release, for a client (here "
            "with one example), under add/remove: a client that is not there sends noise alone. Its sensitivity is the "
            f"clip. ε speaks of the update alone. Beside it travels in the clear: {UNCOVERED}.",
        )


@dataclass(frozen=True)
class Exchanges(ImageScenario):
    """A federation whose clients hold canaries."""

    canary: Canary | None = None

    def opened(self, data_root: Path) -> Dataset:
        """The canaries."""
        assert self.canary is not None
        return self.canary.dataset()


@lru_cache(maxsize=4)
def _white(canaries: int, trials: int, secrets: tuple[int, ...]) -> Dataset:
    import numpy as np

    from fedtap.simulator.data.images import of_arrays

    channels, height, width = SHAPE
    train = 2 * (trials + 2) + canaries  # enough for every client to have one, which none uses
    arrays: dict[str, np.ndarray] = {
        "x_train": np.full((train, height, width, channels), 255, np.uint8),
        "y_train": np.arange(train) % canaries,
        "x_test": np.full((max(trials, 1), height, width, channels), 255, np.uint8),
        "y_test": np.array(secrets or (0,)),
    }
    return of_arrays("canaries", arrays, ())


def expected(canary: Canary) -> float:
    """How often the best attacker is right: ∫ φ(x - a) Φ(x)^(K - 1) dx, a = √(K / (K - 1)) clip / σ.

    Corners of a regular simplex, K of norm C, are as hard to tell apart as K orthogonal vectors of norm C √(K/(K-1)).
    """
    from scipy.integrate import quad
    from scipy.stats import norm

    many = canary.canaries
    shift = math.sqrt(many / (many - 1)) * canary.clip / canary.mechanism.sigma
    value, _ = quad(lambda x: norm.pdf(x - shift) * norm.cdf(x) ** (many - 1), shift - 12, shift + 12, limit=200)
    return float(value)
