"""Does a learned guess give an iterative attack a head start?

Expect: yes, and the shorter the run the larger: at equal iterations, from Coarse GIT's guess, gradient matching ends
far above where it ends from noise; Gauss-Newton, which seldom finds the way from noise, needs a dozen steps from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fedtap.scenarios.gradients.images import ImageScenario
from fedtap.simulator.options import Option, sweep
from fedtap.simulator.scenario import Scenario


@dataclass(frozen=True)
class HeadStart(ImageScenario):
    """Each attack from noise and from the learned guess; the weights are known."""

    spent: ClassVar[tuple[str, ...]] = ("iterations",)
    victims: int = 4
    iterations: Annotated[
        int, Option("steps of the iterative attacks; of Gauss-Newton, conjugate gradients in all", 1)
    ] = sweep(30, 100, 300)

    def settings(self) -> Sequence[Scenario]:
        """Coarse GIT, and every iterative attack with and without its help."""
        if self.named:
            return (self,)
        newton = f"gauss_newton(steps={max(1, self.iterations // 30)},inner={min(30, self.iterations)})"
        finishes = (f"idlg(steps={self.iterations})", f"inverting_gradients(steps={self.iterations})", newton)
        return (
            self.played(attack=",".join(("coarse_git", *finishes, *(f"refine(coarse_git,{one})" for one in finishes)))),
        )
