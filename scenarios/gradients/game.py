"""The game that the bound on reconstruction is about, with real clients, their real defence and the best attacker.

A client holds one of K canaries, each as likely as the others, and the attacker knows all of them, the defence, and
everything else; it wins if it tells which one. Canaries are one white image under K labels: at zero weights the
gradients of softmax regression, (softmax(0) - label) ⊗ image, are the corners of a regular simplex, and for K = 2 they
are opposite. Hayes, Mahloujifar and Balle, NeurIPS 2023, https://arxiv.org/abs/2302.07225.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn

from fedtap.attackers.parts.likelihood import most_likely
from fedtap.clients.app import client_app
from fedtap.simulator import scores
from fedtap.simulator.attack import generator
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.accountant import Gaussian, noise_for
from fedtap.simulator.defences.chain import parse
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.rounds import play
from fedtap.simulator.federation.settings import Scenario, private_data
from fedtap.simulator.leaks import Tensors, stack
from fedtap.simulator.models.registry import Shape
from fedtap.simulator.report.folder import Row
from fedtap.simulator.run import UNCOVERED
from fedtap.simulator.wire.grid import LocalGrid

SHAPE = (1, 16, 16)
"""Of the canaries' image, which is white: a gradient's norm is 16 √(1 - 1/K)."""

EXCESS = 10
"""How many times longer than the clip a canary's gradient is, at least: a skipped clip must show."""

LEVEL = 1e-4
"""Probability, at most, that an honest run has a success that seems to pass its bound: shared by the run's rows. It is
small because two canaries reach the bound, so that so many honest runs would be accused."""

SABOTAGES = ("none", "half_noise", "no_clip")
"""What is really done: what is announced, or with half the noise, or with noise alone."""


def softmax(shape: Shape, classes: int) -> nn.Module:
    """Softmax regression without biases, at zero weights."""
    linear = nn.Linear(math.prod(shape), classes, bias=False)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(nn.Flatten(), linear)


@dataclass(frozen=True)
class Game(Scenario):
    """So many games (the scenario's `victims`) against one mechanism.

    Raises:
        FedtapError: the canaries are too short for the clip, or a value out of range.
    """

    epsilon: float = 1.0
    """Of one release, at `delta`, for a client, under add/remove: the announced noise is the least that gives it."""
    delta: float = 1e-5
    clip: float = 1.0
    canaries: int = 2
    exchanges: int = 100
    """Games, of the first ones, that are whole exchanges of a federation; in the others the defence is called alone."""
    sabotage: str = "none"

    def __post_init__(self) -> None:
        shortest = EXCESS * self.clip
        if self.length < shortest:
            raise FedtapError(
                f"Canaries with gradients of norm {self.length:.3g} are not {EXCESS} times longer than the clip, so a "
                f"skipped clip would hardly show: lower --clip to {self.length / EXCESS:.3g} or less."
            )

    @property
    def length(self) -> float:
        """Norm of a canary's gradient."""
        return math.sqrt(math.prod(SHAPE) * (1 - 1 / self.canaries))

    @cached_property
    def mechanism(self) -> Gaussian:
        """What is announced."""
        return Gaussian(noise_for(self.epsilon, self.delta, self.clip), self.clip, "client", "add/remove")

    @property
    def done(self) -> str:
        """What clients really do, as a defence is written."""
        sigma = self.mechanism.sigma / (2 if self.sabotage == "half_noise" else 1)
        return f"noise({sigma!r})" if self.sabotage == "no_clip" else f"clip({self.clip!r})+noise({sigma!r})"

    def alone(self, parts: Sequence[Scenario]) -> list[Row]:
        """The game's row."""
        return [played(self, sum(isinstance(part, Game) for part in parts))]

    @cached_property
    def truth(self) -> Int[Tensor, "games"]:
        """Which canary each client holds."""
        draw = generator(self.seed, "canaries", str(self.epsilon), self.canaries)
        return torch.randint(self.canaries, (self.victims,), generator=draw)

    @cached_property
    def gradients(self) -> dict[str, Float[Tensor, "canaries *parameter"]]:
        """Every canary's gradient, before any defence."""
        images = torch.ones(self.canaries, 1, *SHAPE)
        return gradients(softmax(SHAPE, self.canaries), images, torch.arange(self.canaries)[:, None])


def played(game: Game, rows: int) -> Row:
    """The game's row. Success is the share of games won; its limits are Clopper and Pearson's, one-sided each.

    Args:
        rows: of the run, which share LEVEL.
    """
    heard = torch.cat([exchanged(game), defended(game)])
    canaries = _flat(game.gradients) * (game.clip / game.length)
    won = scores.games_won(most_likely(heard, canaries), game.truth)
    low, high = scores.limits(won, game.victims, LEVEL / rows)
    mechanism, kappa = game.mechanism, 1 / game.canaries
    return {
        "scenario": game.name,
        "canaries": game.canaries,
        "sabotage": game.sabotage,
        **dataclasses.asdict(mechanism.guarantee(game.delta)),
        "epsilon": game.epsilon,
        "sigma": mechanism.sigma,
        "not_covered": UNCOVERED,
        "defence": game.done,
        "games": game.victims,
        "exchanges": min(game.exchanges, game.victims),
        "success": won / game.victims,
        "success_low": low,
        "success_high": high,
        "bound": mechanism.bound(kappa),
        "bound_renyi": mechanism.renyi_bound(kappa),
        "expected": expected(game),
        "accuracy": None,
        "seed": game.seed,
    }


def expected(game: Game) -> float:
    """How often the best attacker is right: ∫ φ(x - a) Φ(x)^(K - 1) dx, a = √(K / (K - 1)) clip / σ.

    Corners of a regular simplex, K of norm C, are as hard to tell apart as K orthogonal vectors of norm C √(K/(K-1)).
    """
    many = game.canaries
    shift = math.sqrt(many / (many - 1)) * game.clip / game.mechanism.sigma
    value, _ = quad(lambda x: norm.pdf(x - shift) * norm.cdf(x) ** (many - 1), shift - 12, shift + 12, limit=200)
    return float(value)


def check(rows: Sequence[Row]) -> None:
    """Hold every success against its bound.

    Raises:
        FedtapError: one of them is above, by more than chance allows.
    """
    for row in rows:
        if row["success_low"] > row["bound"]:
            raise FedtapError(
                f"At ε = {row['epsilon']:g} the attacker tells {row['canaries']} canaries apart in "
                f"{row['success']:.1%} of {row['games']:,} games (at least {row['success_low']:.1%}), and theory "
                f"allows {row['bound']:.1%}: what is done, {row['defence']}, is not what is announced, so look at its "
                "clip and its noise."
            )


def exchanged(game: Game) -> Float[Tensor, "games entries"]:
    """The gradients that a server hears in the first games, each an exchange with an honest client."""
    games = min(game.exchanges, game.victims)
    if not games:
        return torch.zeros(0, _flat(game.gradients).shape[1])
    with TemporaryDirectory() as folder:
        part = dataclasses.replace(
            game, dataset=str(_dataset(Path(folder), game, games)), victims=games, defence=game.done
        )
        private = private_data(part, Path(folder), games)
        heard = play(part, LocalGrid(client_app(lambda config: (part,)), games + 1), private)
    return _flat(stack([heard.leaks[name] for name in private.names()]).observed)


def defended(game: Game) -> Float[Tensor, "games entries"]:
    """What the clients' defence makes of the canaries in the games after those, with no exchange around it."""
    first = min(game.exchanges, game.victims)
    if first == game.victims:
        return torch.zeros(0, _flat(game.gradients).shape[1])
    held = {name: rows[game.truth[first:]] for name, rows in game.gradients.items()}
    draws = [generator(game.seed, "defence", client, 1) for client in range(first, game.victims)]
    return _flat(parse(game.done).update.stacked(held, draws))


def _flat(gradients: Tensors) -> Float[Tensor, "games entries"]:
    return torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], dim=1)


def _dataset(folder: Path, game: Game, games: int) -> Path:
    """White images; a victim's label is its secret."""
    channels, height, width = SHAPE
    train = 2 * (games + 2) + game.canaries  # enough for every client to have one, which none uses
    np.savez(
        folder / "canaries.npz",
        x_train=np.full((train, height, width, channels), 255, np.uint8),
        y_train=np.arange(train) % game.canaries,
        x_test=np.full((games, height, width, channels), 255, np.uint8),
        y_test=game.truth[:games].numpy(),
    )
    return folder / "canaries.npz"
