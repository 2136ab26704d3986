"""What scenarios about the gradients of images share: attacks, clients, and the settings of each threat model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedtap.scenarios.attack_options import Attacked
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import Federation, ImageObserved
from fedtap.simulator.scenario import Row, Scenario, Session

if TYPE_CHECKING:
    from flwr.app import Context, Message


@dataclass(frozen=True)
class ImageScenario(Attacked, Federation):
    """Honest clients and a compromised one, some rounds of training, then exchanges that are attacked.

    Class attributes:
        panels: threat model -> the attacks that run under it where none is named.
        matching: where no attack is named, those that match gradients; an MLP is read in closed form beside them.
    """

    panels: ClassVar[Mapping[str, str]] = {}
    matching: ClassVar[str] = ""

    def settings(self) -> Sequence[Scenario]:
        """A setting for each threat model."""
        return self.under_threat_models()

    def under_threat_models(self) -> Sequence[ImageScenario]:
        """A setting for each threat model, with its attacks; the options may choose either, or both.

        Raises:
            FedtapError: the threat model has no attacks here, and none is named.
        """
        if self.matching and not self.named:
            return self.played(attack=self.matching), self.played(attack="linear", model="mlp")
        if not self.panels:
            return (self.played(),)
        chosen = [self.threat_model] if self.chose("threat_model") else list(self.panels)
        if self.named:
            return (self.played(threat_model=self._fit(chosen)),)
        if chosen[0] not in self.panels:
            raise FedtapError(
                f"This scenario has no attacks of its own for the {chosen[0]}, but for {' and '.join(self.panels)}: "
                "name some, --attack."
            )
        return tuple(self.played(threat_model=one, attack=self.panels[one]) for one in chosen)

    def played(self, **changes: Any) -> ImageScenario:
        """This setting, with these changes."""
        return dataclasses.replace(self, **changes)

    def _fit(self, chosen: Sequence[str]) -> str:
        """The first threat model under which the named attacks can work; all but an eavesdropper know the weights."""
        if len(chosen) == 1 or not any(attack.needs_weights for attack in self.attacks):
            return chosen[0]
        return next((one for one in chosen if one != "eavesdropper"), "curious_server")

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """Weights after local training; of the compromised client, auxiliary pairs too."""
        from fedtap.clients import compromised, honest
        from fedtap.simulator.federation.private_data import private_data
        from fedtap.simulator.federation.rounds import PRACTICE

        data = private_data(self, data_root, int(context.node_config["num-partitions"]) - 1)
        if message.metadata.message_type != PRACTICE:
            return honest.train_on_images(message, context, data)
        if int(context.node_config["partition-id"]) != data.clients:
            raise PermissionError("an honest client takes no examples from the server")
        return compromised.compute_auxiliary(message, data)

    def at_once(self, orders: Sequence[tuple[Message, Context]], data_root: Path) -> Mapping[int, Message]:
        """Weights after one local step of many clients, as lanes of one gradient."""
        from fedtap.clients.honest import train_at_once
        from fedtap.simulator.federation.private_data import private_data

        return train_at_once(orders, private_data(self, data_root, int(orders[0][1].node_config["num-partitions"]) - 1))

    def measured(self, session: Session, observed: ImageObserved) -> Row:
        """How many times as long an exchange takes a client with the defence as without."""
        from fedtap.clients.cost import overhead

        return {"overhead": overhead(self, observed.private)}
