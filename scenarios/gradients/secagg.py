"""What remains of a client's picture in the sum of many clients' updates?

Expect: as much as in the gradient of one batch as large: the closed form on an MLP reads images out of sums of ten,
gradient matching has little left at five. And as much as with no aggregation at all once the server knows what the
others sent, since they are silent, copies of its own client, or collude: then it takes that off the sum.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Annotated, Unpack

from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.gradients.image import ImageKnobs, image_knobs, matching_and_reading
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import Scenario
from fedtap.simulator.wire.threat_models import OTHERS, SECURE

KNOWN_AT = 10
"""Clients of a sum at which, unless said, the others are also tried as the server may know them."""


@image_knobs(threat_model=SECURE, clients=(1, 2, 5, 10, 50), others="", victims=3)
def scenario(
    *,
    others: Annotated[
        str, Knob(f"what the rest of a sum does; unless said honest, with {KNOWN_AT} clients all", choices=OTHERS)
    ],
    **knobs: Unpack[ImageKnobs],
) -> tuple[Scenario, ...]:
    """One step of federated SGD behind secure aggregation; a victim is a sum. One client alone is not aggregated."""
    if knobs["threat_model"] != SECURE:
        raise FedtapError(
            f"This scenario is about what {SECURE} hides, and the {knobs['threat_model']} hears each client by itself: "
            "leave out --threat-model."
        )
    if knobs["clients"] == 1 and others not in ("", "honest"):
        warnings.warn(f"One client alone has no others to be {others}: --clients 1 is left out.", stacklevel=1)
        return ()
    if knobs["clients"] == 1:
        knobs["threat_model"], others = "curious_server", "honest"
    kinds = [others] if others else OTHERS if knobs["clients"] == KNOWN_AT else ["honest"]
    parts = matching_and_reading(knobs, "idlg(steps=400)")
    return tuple(dataclasses.replace(part, others=kind) for kind in kinds for part in parts)
