"""Gauss-Newton: gradient matching as nonlinear least squares, each entry in units of its own error.

Levenberg 1944, https://doi.org/10.1090/qam/10666; Marquardt 1963, https://doi.org/10.1137/0111030; as an attack on
gradients we found none (November 2026). Squared residuals near a solution have a curvature that first derivatives
give, so ten steps do what thousands do for signed or quasi-Newton descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedtap.attackers.parts.checks import check_fields, check_slopes
from fedtap.attackers.parts.gradients import check_match
from fedtap.attackers.parts.labels import last_linear, recovered
from fedtap.attackers.parts.newton import fitted, residual
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.defence import Defence, Trace
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak

LANES = 16
"""Victims at once."""


@dataclass(frozen=True)
class GaussNewton(Attack):
    """The image of highest posterior under Gaussian noise, as announced, and a Gaussian around grey.

    Far from the image it seldom finds the way: `refine(coarse_git, gauss_newton)` begins near it.

    Args:
        steps: each solves a linear system in the pixels by conjugate gradients.
        inner: conjugate gradients a step, at most.
        prior_std: of a pixel around grey.
    """

    leaks = (GradientLeak, UpdateLeak)

    steps: int = 10
    inner: int = 100
    prior_std: float = 0.25

    def __post_init__(self) -> None:
        check_fields(self, steps=1, inner=1, prior_std=1e-6)

    def knows(self, defence: Defence) -> bool:
        """Noise."""
        return {Trace.SCALE, Trace.RATIOS} <= defence.survives

    def accepts(self, leak: Leak) -> None:
        """Leaks of networks that can be differentiated twice and whose last layer shows the labels."""
        super().accepts(leak)
        check_slopes(self, leak)
        last_linear(leak)
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        labels = recovered(leak)
        found = []
        for some in torch.arange(len(leak)).split(LANES):  # type: ignore[no-untyped-call]
            pixels = start[some].flatten(1).double()
            misfit = residual(leak[some], labels[some])
            grey = torch.full_like(pixels, 0.5)
            found.append(fitted(misfit, pixels, grey, lambda v: v / self.prior_std**2, self.steps, self.inner))
        images, objective = (torch.cat(parts).to(start.dtype) for parts in zip(*found, strict=True))
        return Reconstruction(images.reshape(start.shape), labels, objective)
