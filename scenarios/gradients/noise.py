"""How much noise must a client add before its image is lost?

Expect: what stops the exact attack long before (1e-3 on an entry) costs the learned one little, since it is trained
under the same noise; the two in one estimator lie well above both in between, and above the learned one even at 0.1,
where the noise is as large as the gradient itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.scenario import Scenario


@dataclass(frozen=True)
class Noise(ImageScenario):
    """Gaussian noise on every entry of what clients send; all know how much."""

    spent: ClassVar[tuple[str, ...]] = ("sigma",)
    panels: ClassVar[Mapping[str, str]] = {
        "curious_server": "coarse_git,exact_git,refine(exact_git,gauss_newton),fused_git",
    }
    victims: int = 4
    sigma: Annotated[float, Option("standard deviation of the noise on each entry of the gradient", 0.0, 1e6)] = sweep(
        0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1
    )

    def settings(self) -> Sequence[Scenario]:
        """The noise is the defence."""
        if self.defence != "none":
            raise FedtapError("In this scenario --sigma is the defence, and --defence would be another: leave one out.")
        defence = f"noise({self.sigma})" if self.sigma else "none"
        return tuple(one.played(defence=defence) for one in self.under_threat_models())
