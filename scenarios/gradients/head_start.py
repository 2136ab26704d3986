"""Does a learned guess give an iterative attack a head start?

Expect: yes, and the shorter the run the larger: at equal iterations, from Coarse GIT's guess, gradient matching ends
far above where it ends from noise; Gauss-Newton, which seldom finds the way from noise, needs a dozen steps from there.
"""

from __future__ import annotations

from typing import Annotated, Unpack

from fedtap.scenarios.command.options import Knob
from fedtap.scenarios.gradients.image import ImageKnobs, attacks_named, image_knobs, image_scenario
from fedtap.simulator.federation.settings import Scenario


@image_knobs(victims=4, iterations=(30, 100, 300))
def scenario(
    *,
    iterations: Annotated[int, Knob("steps of the iterative attacks; of Gauss-Newton, conjugate gradients in all", 1)],
    **knobs: Unpack[ImageKnobs],
) -> Scenario:
    """Each attack from noise and from the learned guess; the weights are known."""
    if not attacks_named(knobs):
        newton = f"gauss_newton(steps={max(1, iterations // 30)},inner={min(30, iterations)})"
        finishes = (f"idlg(steps={iterations})", f"inverting_gradients(steps={iterations})", newton)
        knobs["attack"] = ",".join(("coarse_git", *finishes, *(f"refine(coarse_git,{one})" for one in finishes)))
    return image_scenario(**knobs)
