"""Does noise of this size, after a clip, stop the attack, and what does it cost?

Expect: noise so small that its ε is no promise at all, in the thousands, leaves little even to an attack that knows of
it; an ε worth having costs much of the model's accuracy, since each client hides by itself. What stopped one attack has
not stopped all: beside it stands the game of two canaries, where the best attacker there can be is held against the
bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fedtap.scenarios.gradients.canary import Canary
from fedtap.scenarios.gradients.promises import Promising
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.scenario import Scenario

TRIALS = 5000
"""Trials with two canaries beside each ε."""


@dataclass(frozen=True)
class DP(Promising):
    """Clipping and Gaussian noise by each client, in training and in the exchange that is attacked."""

    spent: ClassVar[tuple[str, ...]] = ("epsilon", "sigma", "clip", "mechanism")
    tried: ClassVar[str] = "inverting_gradients(steps=200),inverting_gradients(steps=200,adaptive=True)"
    model: str = "convnet"
    victims: int = 4
    clients: int = 8
    rounds: int = 20
    training_batch: int = 32
    learning_rate: float = 0.3
    epsilon: Annotated[float, Option("ε of one exchange, for which the noise is chosen; inf is no noise")] = sweep(
        1.0, 10.0, 100.0, 1e3, 1e4, math.inf
    )
    sigma: Annotated[float, Option("standard deviation of the noise, in place of an ε; 0: as ε asks", 0.0, 1e6)] = 0.0
    clip: Annotated[float, Option("L2 norm to which is clipped", 1e-6, 1e6)] = 1.0
    mechanism: Annotated[
        Literal["update", "dp_sgd", "local_dp"],
        Option("what is clipped, and by whom: the update, examples (Opacus), or Flower's LocalDpMod"),
    ] = "update"

    def settings(self) -> Sequence[Scenario]:
        """The exchange that is attacked, and beside it the trials of two canaries under the same ε and δ."""
        if self.defence != "none":
            raise FedtapError(
                "In this scenario --epsilon, --sigma and --clip are the defence, and --defence would be another: leave "
                "it out, or choose a --mechanism."
            )
        attacked = self.played(defence=self._written(), attack=self.named or self.tried, trained_attack="")
        if self.mechanism != "update" or self.sigma or math.isinf(self.epsilon):
            return (attacked,)
        return attacked, Canary(
            canaries=2, epsilon=self.epsilon, delta=self.delta, trials=TRIALS, exchanges=0, seed=self.seed
        )

    def _written(self) -> str:
        """The defence, as it is written.

        Raises:
            FedtapError: ε ≤ 0, δ not in (0, 1), or a σ for Flower's mod, which takes none.
        """
        from fedtap.simulator.defences.accountant import ADJACENCIES, noise_for
        from fedtap.simulator.federation.guarantees import ADJACENCY

        if self.mechanism == "local_dp":
            if self.sigma:
                raise FedtapError(
                    "Flower's LocalDpMod chooses its noise from ε by itself: give --epsilon, not --sigma."
                )
            noise_for(self.epsilon, self.delta, self.clip)
            return f"local_dp({self.clip}, {self.clip}, {self.epsilon}, {self.delta})"
        exact = math.isinf(self.epsilon) and not self.sigma
        far = self.clip * ADJACENCIES["replace" if self.mechanism == "dp_sgd" else ADJACENCY]
        noise = 0.0 if exact else self.sigma or noise_for(self.epsilon, self.delta, far)
        if self.mechanism == "dp_sgd":  # ε is of one exchange, whose local steps add up as their variances do
            return f"dp_sgd({self.clip}, {noise * (1 if self.sigma else math.sqrt(self.local_steps)) / self.clip!r})"
        return f"clip({self.clip})+noise({noise!r})" if noise else f"clip({self.clip})"
