"""How much noise on the change of the weights hides on which texts a model was tuned, and what does it cost?

Expect: the domain is found under noise that ruins the model. A direction of thousands of numbers averages noise away,
so precision falls to twice chance far beyond the noise at which the model that came back is worse than the one that was
sent; membership is gone long before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fedtap.scenarios.checkpoints.select_topic import SelectTopic
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Delta, Option, sweep
from fedtap.simulator.scenario import Row, Scenario, same_but

if TYPE_CHECKING:
    from fedtap.simulator.attack import Attack


@dataclass(frozen=True)
class SelectDP(SelectTopic):
    """Clients that clip the change of their weights and add Gaussian noise to each of its entries."""

    sigma: Annotated[float, Option("standard deviation of the noise on an entry; 0: none", 0.0, 1e6, "defence")] = (
        sweep(0.0, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    )
    clip: Annotated[float, Option("L2 norm to which the change is clipped", 1e-6, 1e6, "defence")] = 1.0
    delta: Delta = 1e-5
    attack: str = "lowest_loss,loss_drop,select,select(at='tuned')"

    def settings(self) -> Sequence[Scenario]:
        """The setting with its defence."""
        if self.defence != "none":
            raise FedtapError(
                "In this scenario --sigma and --clip are the defence, and --defence would be another: leave it out."
            )
        return (same_but(self, defence=self.mechanism),)

    @property
    def mechanism(self) -> str:
        """As it is written."""
        return f"clip({self.clip})" + (f"+noise({self.sigma!r})" if self.sigma else "")

    def settled(self, attack: Attack[Any], label: str, observed: Any) -> Row:
        """With ε of all rounds."""
        from fedtap.simulator.defences.accountant import mechanism_of
        from fedtap.simulator.defences.notation import described

        guarantee = mechanism_of(described(self.defence), "add/remove", self.rounds, 1).guarantee(self.delta)
        epsilon = guarantee.epsilon if guarantee.epsilon < float("inf") else None
        return super().settled(attack, label, observed) | {"sigma": self.sigma, "clip": self.clip, "epsilon": epsilon}
