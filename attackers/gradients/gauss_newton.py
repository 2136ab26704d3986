"""Gauss-Newton: gradient matching as nonlinear least squares, each entry in units of its own error.

Levenberg 1944, https://doi.org/10.1090/qam/10666; Marquardt 1963, https://doi.org/10.1137/0111030; as an attack on
gradients we found none (November 2026). Squared residuals near a solution have a curvature that first derivatives
give, so ten steps do what thousands do for signed or quasi-Newton descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedtap.attackers.gradients.matching import MATCHED, check_matching
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.newton import fitted, residual
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.defence import Defence, Trace
from fedtap.simulator.leaks import Leak

VICTIMS_AT_ONCE = 16
"""Victims solved together: their float64 Jacobian products stay within about a gigabyte."""


@dataclass(frozen=True)
class GaussNewton(Attack):
    """The image of highest posterior density, for Gaussian noise of the announced size and a Gaussian prior around
    grey.

    From a random start it seldom converges: `refine(coarse_git, gauss_newton)` begins near the image.
    """

    leaks = MATCHED

    steps: int = 10
    """Gauss-Newton steps; each solves a linear system in the pixels by conjugate gradients."""
    inner: int = 100
    """Iterations of conjugate gradients in each step, at most."""
    prior_std: float = 0.25
    """Standard deviation of a pixel around 0.5, in units of the pixel range."""

    def __post_init__(self) -> None:
        check_fields(self, steps=1, inner=1, prior_std=1e-6)

    def knows(self, defence: Defence) -> bool:
        """Noise, whose size weighs the residuals."""
        return {Trace.SCALE, Trace.RATIOS} <= defence.survives

    def accepts(self, leak: Leak) -> None:
        """Networks that torch.func can differentiate twice and whose last layer shows the labels."""
        super().accepts(leak)
        check_matching(self, leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        labels = recovered(leak)
        found = []
        for some in torch.arange(len(leak)).split(VICTIMS_AT_ONCE):  # type: ignore[no-untyped-call]
            pixels = start[some].flatten(1).double()
            residuals = residual(leak[some], labels[some])
            grey = torch.full_like(pixels, 0.5)
            # the prior N(0.5, prior_std^2) has the precision P = I / prior_std^2
            found.append(fitted(residuals, pixels, grey, lambda v: v / self.prior_std**2, self.steps, self.inner))
        images, objective = (torch.cat(parts).to(start.dtype) for parts in zip(*found, strict=True))
        return Reconstruction(images.reshape(start.shape), labels, objective)
