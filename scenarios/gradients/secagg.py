"""What remains of a client's picture in the sum of many clients' updates?

Expect: as much as in the gradient of one batch as large: the closed form on an MLP reads images out of sums of ten,
gradient matching has little left at five. And as much as with no aggregation at all once the server knows what the
others sent, since they are silent, copies of its own client, or collude: then it takes that off the sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import OTHERS, SECURE, Threat
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.scenario import Scenario

KNOWN_AT = 10
"""Clients of a sum at which, unless said, the others are also tried as the server may know them."""


@dataclass(frozen=True)
class SecAgg(ImageScenario):
    """One step of federated SGD behind secure aggregation; a victim is a sum. One client alone is not aggregated."""

    matching: ClassVar[str] = "idlg(steps=400)"
    threat_model: Threat = "secure_aggregation"
    clients: int = sweep(1, 2, 5, 10, 50)
    victims: int = 3
    others: Annotated[
        Literal["honest", "silent", "identical", "colluding"],
        Option(f"what the rest of a sum does; unless said honest, with {KNOWN_AT} clients all", group="federation"),
    ] = "honest"

    def check_sum(self) -> None:
        """One client alone is no sum: `settings` makes it one that is observed by itself."""
        if self.clients != 1:
            super().check_sum()

    def settings(self) -> Sequence[Scenario]:
        """Each conduct of the others that is asked for."""
        if self.threat_model != SECURE:
            raise FedtapError(
                f"This scenario is about what {SECURE} hides, and the {self.threat_model} observes each client by "
                "itself: leave out --threat-model."
            )
        if self.clients == 1 and self.others != "honest":
            warnings.warn(f"One client alone has no others to be {self.others}: --clients 1 is left out.", stacklevel=1)
            return ()
        if self.clients == 1:
            return self.played(threat_model="curious_server").under_threat_models()
        kinds = OTHERS if self.clients == KNOWN_AT and not self.chose("others") else (self.others,)
        return tuple(one for kind in kinds for one in self.played(others=kind).under_threat_models())
