"""Does noise after a clip hold what theory promises, against an attacker that knows everything but one secret?

Expect: yes. Two opposite canaries are told apart exactly as often as the bound allows, ten somewhat less often; with
half the noise, or with the clip skipped (--sabotage), the measured success passes the bound, and the run ends by
saying so.
"""

from __future__ import annotations

from typing import Annotated

from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.gradients.game import SABOTAGES, Game


def scenario(
    *,
    canaries: Annotated[int, Knob("equally likely secrets that a client may hold", 2, 100)] = (2, 10),  # type: ignore[assignment]
    epsilon: Annotated[float, Knob("ε of one release, add/remove, for which the noise is chosen", 1e-3, 1e3)] = (
        0.5,
        1.0,
        2.0,
        4.0,
        8.0,
    ),  # type: ignore[assignment]
    delta: Annotated[float, Knob("δ at which ε is meant", 1e-300, 1 - 1e-9)] = 1e-5,
    clip: Annotated[float, Knob("L2 norm to which clients clip their gradient", 1e-6, 1.5)] = 1.0,
    games: Annotated[int, Knob("how many are played, for each ε", 1)] = 5000,
    exchanges: Annotated[int, Knob("of these, how many are whole exchanges between server and client", 0)] = 100,
    sabotage: Annotated[str, Knob("what goes wrong, unannounced", choices=SABOTAGES)] = "none",
    seed: Annotated[int, Knob("seed of all that is drawn", 0, 2**31)] = 0,
) -> Game:
    """One client, one secret, one release: clipped, with Gaussian noise."""
    return Game(
        attacks=(),
        dataset="canaries",
        model="fedtap.scenarios.gradients.game:softmax",
        learning_rate=1.0,
        canaries=canaries,
        epsilon=epsilon,
        delta=delta,
        clip=clip,
        victims=games,
        exchanges=exchanges,
        sabotage=sabotage,
        seed=seed,
    )
