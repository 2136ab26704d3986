"""How much noise must a client add before its image is lost?

Expect: what stops the exact attack long before (1e-3 on an entry) costs the learned one little, since it practises
under the same noise; the two in one estimator lie well above both in between, and above the learned one even at 0.1,
where the noise is as large as the gradient itself.
"""

from __future__ import annotations

from typing import Annotated, Unpack

from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.gradients.image import ImageKnobs, heard_by, image_knobs
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import Scenario

PANELS = {"curious_server": "coarse_git,exact_git,refine(exact_git,gauss_newton),fused_git"}


@image_knobs(threat_model="", victims=4, sigma=(0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
def scenario(
    *,
    sigma: Annotated[float, Knob("standard deviation of the noise on each entry of the gradient", 0.0, 1e6)],
    **knobs: Unpack[ImageKnobs],
) -> tuple[Scenario, ...]:
    """Gaussian noise on every entry of what clients send; all know how much."""
    if knobs["defence"] != "none":
        raise FedtapError("In this scenario --sigma is the defence, and --defence would be another: leave one out.")
    knobs["defence"] = f"noise({sigma})" if sigma else "none"
    return heard_by(knobs, PANELS)
