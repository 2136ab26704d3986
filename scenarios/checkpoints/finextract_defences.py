"""Which of the measures that are at hand keeps a client's images out of the diffusion model that it sends, and at what
price?

Expect: protection at the price of use. Cutout and RandAugment change what is learned, early stopping how well, noise
on the change of the weights and DP-SGD how far it can be read. `contrast` and the pictures say whether the model is
still of use: one that draws noise hides everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fedtap.scenarios.checkpoints.extraction import Extracting
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Delta, Option, sweep
from fedtap.simulator.scenario import Row, Scenario, same_but

if TYPE_CHECKING:
    from fedtap.simulator.attack import Attack


@dataclass(frozen=True)
class FinextractDefences(Extracting):
    """Clients that tune an adapter and do one thing against its giving away their images."""

    method: Literal["full", "lora"] = "lora"
    countermeasure: Annotated[
        Literal["none", "cutout", "randaugment", "early_stop", "noise", "dp_sgd"],
        Option("of the client", group="defence"),
    ] = sweep("none", "cutout", "randaugment", "early_stop", "noise", "dp_sgd")
    sigma: Annotated[float, Option("of noise: standard deviation on an entry", 0.0, 1e6, "defence")] = 0.01
    clip: Annotated[
        float,
        Option("L2 norm to which the change is clipped before noise, or an image's gradient", 1e-6, 1e6, "defence"),
    ] = 10.0
    noise_multiplier: Annotated[float, Option("of dp_sgd", 0.0, 1e6, "defence")] = 0.1
    stopped: Annotated[int, Option("local steps of early_stop", 1, 10**6, "defence")] = 100
    delta: Delta = 1e-5
    attack: str = "guided_sampling(samples=5,steps=20),finextract(w=5.0,k=0.0,samples=5,steps=20)"

    def settings(self) -> Sequence[Scenario]:
        """The setting with its countermeasure."""
        if self.defence != "none" or self.augmentation != "none":
            raise FedtapError(
                "In this scenario --countermeasure says what clients do, and --defence or --augmentation would be "
                "another: leave those out."
            )
        changes: dict[str, Any] = {}
        if self.countermeasure in ("cutout", "randaugment"):
            changes["augmentation"] = self.countermeasure
        elif self.countermeasure == "early_stop":
            changes["local_steps"] = self.stopped
        elif self.countermeasure == "noise":
            changes["defence"] = f"clip({self.clip})+noise({self.sigma!r})"
        elif self.countermeasure == "dp_sgd":
            changes["defence"] = f"dp_sgd({self.clip},{self.noise_multiplier})"
        return (same_but(self, **changes),)

    def settled(self, attack: Attack[Any], label: str, observed: Any) -> Row:
        """With ε of all rounds, where there is one."""
        from fedtap.simulator.defences.accountant import mechanism_of
        from fedtap.simulator.defences.notation import described

        row = super().settled(attack, label, observed) | {"countermeasure": self.countermeasure}
        if self.defence == "none":
            return row
        adjacency = "replace" if self.countermeasure == "dp_sgd" else "add/remove"
        guarantee = mechanism_of(described(self.defence), adjacency, self.rounds, self.training.steps).guarantee(
            self.delta
        )
        return row | {"epsilon": guarantee.epsilon if guarantee.epsilon < float("inf") else None}
