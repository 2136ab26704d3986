"""Does noise of this size, after a clip, stop the attack, and what does it cost?

Expect: noise so small that its ε is no promise at all, in the thousands, leaves little even to an attack that knows of
it; an ε worth having costs much of the model's accuracy, since each client hides by itself. What stopped one attack has
not stopped all: beside it stands the game of two canaries, where the best attacker there can be is held against the
bound.
"""

from __future__ import annotations

import math
from typing import Annotated, Unpack

from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.gradients.game import Game
from fedtap.scenarios.gradients.image import Delta, ImageKnobs, SuccessDb, image_knobs, promising
from fedtap.simulator.defences.accountant import ADJACENCIES, noise_for
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import Scenario
from fedtap.simulator.run import ADJACENCY

ATTACK = "inverting_gradients(steps=200),inverting_gradients(steps=200,adaptive=True)"

MECHANISMS = ("update", "dp_sgd", "local_dp")
"""Noise on the clipped update, on the sum of clipped gradients of examples (Opacus), or by Flower's `LocalDpMod`."""

GAMES = 5000
"""Games of two canaries beside each ε."""


@image_knobs(
    model="convnet",
    victims=4,
    clients=8,
    rounds=20,
    training_batch=32,
    learning_rate=0.3,
    epsilon=(1.0, 10.0, 100.0, 1e3, 1e4, math.inf),
    sigma=0.0,
    clip=1.0,
    delta=1e-5,
    mechanism="update",
    success_db=0.0,
)
def scenario(
    *,
    epsilon: Annotated[float, Knob("ε of one exchange, for which the noise is chosen; inf is no noise")],
    sigma: Annotated[float, Knob("standard deviation of the noise, in the place of an ε; 0: as ε asks", 0.0, 1e6)],
    clip: Annotated[float, Knob("L2 norm to which is clipped", 1e-6, 1e6)],
    delta: Delta,
    mechanism: Annotated[str, Knob("what is clipped, and by whom", choices=MECHANISMS)],
    success_db: SuccessDb,
    **knobs: Unpack[ImageKnobs],
) -> tuple[Scenario, ...]:
    """Clipping and Gaussian noise by each client, in training and in the exchange that is attacked."""
    if knobs["defence"] != "none":
        raise FedtapError(
            "In this scenario --epsilon, --sigma and --clip are the defence, and --defence would be another: leave it "
            "out, or choose a --mechanism."
        )
    knobs["defence"] = _written(mechanism, epsilon, sigma, clip, delta, knobs["local_steps"])
    attacked = promising(knobs, ATTACK, delta, success_db)
    if mechanism != "update" or sigma or math.isinf(epsilon):
        return (attacked,)
    return attacked, _game(epsilon, delta, knobs["seed"])


def _written(mechanism: str, epsilon: float, sigma: float, clip: float, delta: float, steps: int) -> str:
    """The defence, in words.

    Raises:
        FedtapError: ε ≤ 0, δ not in (0, 1), or a σ for Flower's mod, which takes none.
    """
    if mechanism == "local_dp":
        if sigma:
            raise FedtapError("Flower's LocalDpMod chooses its noise from ε by itself: give --epsilon, not --sigma.")
        noise_for(epsilon, delta, clip)
        return f"local_dp({clip}, {clip}, {epsilon}, {delta})"
    exact = math.isinf(epsilon) and not sigma
    far = clip * ADJACENCIES["replace" if mechanism == "dp_sgd" else ADJACENCY]
    noise = 0.0 if exact else sigma or noise_for(epsilon, delta, far)
    if mechanism == "dp_sgd":
        return f"dp_sgd({clip}, {noise * (1 if sigma else math.sqrt(steps)) / clip!r})"
    return f"clip({clip})+noise({noise!r})" if noise else f"clip({clip})"


def _game(epsilon: float, delta: float, seed: int) -> Game:
    """Two canaries under the same ε and δ, so at the same ratio of clip to noise."""
    return Game(
        attacks=(),
        dataset="canaries",
        model="fedtap.scenarios.gradients.game:softmax",
        learning_rate=1.0,
        canaries=2,
        epsilon=epsilon,
        delta=delta,
        victims=GAMES,
        exchanges=0,
        seed=seed,
    )
