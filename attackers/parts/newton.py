"""Gauss-Newton: an image from its gradient by nonlinear least squares, each residual in units of its own error.

With g(x) the gradient that image x would cause, G the leaked one, s the error of its entries and a prior N(m, 1 / P),

    |(g(x) - G) / s|^2 + (x - m)^T P (x - m)

is lowered by steps d that solve ``(J^T J + P + damping) d = -(J^T r + P (x - m))``, J the Jacobian of the residual r,
by conjugate gradients that need J only in products (Levenberg 1944; Marquardt 1963; Nocedal and Wright 2006, ch. 10).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fedtap.attackers.parts.priors import PerElement
from fedtap.simulator.attack import Labels
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.leaks import Leak, Tensors
from fedtap.simulator.wire.replay import client_reply, mean_gradient, targets

FlatImages = Float[Tensor, "elements pixels"]
Unknown = Float[Tensor, "elements unknowns"]
Product = Callable[[FlatImages], FlatImages]
"""A symmetric matrix for each element, in products with a row."""

_FALL, _RISE = 0.2, 8.0
"""Factor of the damping after a step that is kept, and after one that is not."""

LENGTHS = (1.0, 0.5, 0.2, 0.05)
"""Lengths of a Gauss-Newton step among which the line search chooses."""

CG_TOLERANCE = 1e-4
"""Conjugate gradients end where the residual's norm has fallen to this share of its first value, unless told."""


def standard_errors(leak: Leak) -> dict[str, Float[Tensor, "elements"]]:
    """Error of an entry of each parameter's gradient: of its format's rounding, or the wire's or the defence's."""
    gradient = mean_gradient(leak)
    least = max(leak.resolution, sigma(leak.protocol), 1e-30)
    return {
        name: (torch.finfo(tensor.dtype).eps * tensor.double().square().flatten(1).mean(1).sqrt()).clamp_min(least)
        for name, tensor in gradient.items()
    }


def residual(
    leak: Leak, labels: Labels, dtype: torch.dtype = torch.float64
) -> Callable[[FlatImages], Float[Tensor, "elements entries"]]:
    """``(g(x) - G) / s`` of each element, as a function of its pixels, which are of this dtype."""
    respond, leaked, errors = client_reply(leak), mean_gradient(leak), standard_errors(leak)
    shape = (leak.protocol.batch, *leak.protocol.shape)
    target = targets(labels, leak.protocol.classes).to(dtype)

    def element(
        weights: Tensors, buffers: Tensors, leaked: Tensors, errors: Tensors, x: Tensor, target: Tensor
    ) -> Tensor:
        found = respond(weights, buffers, x.reshape(shape), target)
        return torch.cat([((found[name] - leaked[name]) / errors[name]).flatten() for name in found])

    def cast(tensors: Tensors) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    shared = 0 if leak.stacked else None
    every = vmap(element, in_dims=(shared, shared, 0, 0, 0, 0))
    weights, buffers, gradients = cast(leak.weights or {}), cast(leak.buffers), cast(leaked)
    in_units = cast(errors)
    return lambda x: every(weights, buffers, gradients, in_units, x, target)


def fitted(
    residuals: Callable[[FlatImages], Float[Tensor, "elements entries"]],
    start: FlatImages,
    mean: FlatImages,
    precision: Product,
    steps: int,
    inner: int,
) -> tuple[FlatImages, Float[Tensor, "elements"]]:
    """The pixels at which the objective is lowest from `start` on, and the objective there; all in float64.

    Args:
        residuals: the residual of each element, as a function of its pixels.
        precision: product with P.
        steps: Gauss-Newton steps, each with at most `inner` conjugate gradients.
    """

    def cost(x: FlatImages) -> Float[Tensor, "elements"]:
        return residuals(x).square().sum(1) + ((x - mean) * precision(x - mean)).sum(1)

    x, value = start, cost(start)
    damping: Tensor | None = None
    for _ in range(steps):
        r, transposed = vjp(residuals, x)[:2]

        # H v = J'J v + P v
        def curved(
            v: FlatImages, x: FlatImages = x, transposed: Callable[[Tensor], tuple[FlatImages]] = transposed
        ) -> FlatImages:
            return transposed(jvp(residuals, (x,), (v,))[1])[0] + precision(v)

        # J'r + P (x - m)
        gradient = transposed(r)[0] + precision(x - mean)
        if damping is None:
            # a thousandth of the curvature along the gradient g, g'Hg / g'g
            damping = 1e-3 * (gradient * curved(gradient)).sum(1) / gradient.square().sum(1).clamp_min(1e-300)
        step = conjugate_gradients(lambda v, d=damping, c=curved: c(v) + d[:, None] * v, -gradient, inner)  # type: ignore[misc]
        # (H + damping) d = -g
        there = x + step
        lower = cost(there)
        kept = lower < value
        x, value = torch.where(kept[:, None], there, x), torch.where(kept, lower, value)
        # Levenberg: less damping after a step that lowers the cost, more after one that does not
        damping = torch.where(kept, damping * _FALL, damping * _RISE)
    return x, value


def linear(
    residual: Callable[[Unknown], Tensor], z: Unknown
) -> tuple[Tensor, Callable[[Tensor], Unknown], Callable[[Unknown], Unknown]]:
    """The residual r at z, ``u -> J'u``, and ``v -> (J'J + 1) v``; the 1 is the prior's precision."""
    r, back = vjp(residual, z)[:2]
    # J v is the derivative of J'u by u, in the direction v: no second forward pass is needed
    ahead = vjp(lambda u: back(u)[0], r)[1]
    return r, lambda u: back(u)[0], lambda v: back(ahead(v)[0])[0] + v


def stepped(
    residual: Callable[[Unknown], Tensor], z: Unknown, inner: int, tolerance: float = CG_TOLERANCE
) -> tuple[Unknown, PerElement]:
    """A Gauss-Newton step from z, of the length in `LENGTHS` that leads lowest, or none; and the objective there."""

    def cost(z: Unknown) -> PerElement:
        return residual(z).square().sum(1) + z.square().sum(1)

    r, back, curved = linear(residual, z)
    # (J'J + 1) d = -(J'r + z)
    d = conjugate_gradients(curved, -(back(r) + z), inner, tolerance)
    best, lowest = z, r.square().sum(1) + z.square().sum(1)
    for length in LENGTHS:
        there = z + length * d
        value = cost(there)
        lower = value < lowest
        best, lowest = torch.where(lower[:, None], there, best), torch.where(lower, value, lowest)
    return best, lowest


def conjugate_gradients(product: Product, right: FlatImages, steps: int, tolerance: float = CG_TOLERANCE) -> FlatImages:
    """x of ``product(x) = right`` for each element, begun at 0 (Hestenes and Stiefel 1952).

    Args:
        steps: iterations, at most.
        tolerance: share of its first norm at which the residual is small enough.
    """
    x, r = torch.zeros_like(right), right
    p, power = r, r.square().sum(1)
    least = tolerance**2 * power
    for _ in range(steps):
        going = power > least
        if not going.any():
            break
        ahead = product(p)
        # alpha = r'r / p'Ap
        length = torch.where(going, power / (p * ahead).sum(1).clamp_min(1e-300), 0.0)
        x, r = x + length[:, None] * p, r - length[:, None] * ahead
        before, power = power, torch.where(going, r.square().sum(1), power)
        # beta = r_new'r_new / r'r
        p = r + torch.where(going, power / before, 0.0)[:, None] * p
    return x
