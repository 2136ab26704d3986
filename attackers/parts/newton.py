"""Gauss-Newton: an image from its gradient as nonlinear least squares, each residual in units of its own error.

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

from fedtap.simulator.attack import Labels
from fedtap.simulator.defences.chain import sigma
from fedtap.simulator.leaks import Leak, Tensors
from fedtap.simulator.wire.replay import answer, mean_gradient, targets

Rows = Float[Tensor, "lanes pixels"]
Product = Callable[[Rows], Rows]
"""A symmetric matrix for each lane, in products with a row."""

GIVE, TAKE, MOST = 0.2, 8.0, 1e12
"""The damping's change after a step that is kept, after one that is not, and where a lane stops."""

ENOUGH = 1e-4
"""Conjugate gradients stop where the residual has fallen to this share."""


def standard_errors(leak: Leak) -> dict[str, Float[Tensor, "lanes"]]:
    """Error of an entry of each parameter's gradient: of its format's rounding, or the wire's or the defence's."""
    gradient = mean_gradient(leak)
    least = max(leak.resolution, sigma(leak.protocol), 1e-30)
    return {
        name: (torch.finfo(tensor.dtype).eps * tensor.double().square().flatten(1).mean(1).sqrt()).clamp_min(least)
        for name, tensor in gradient.items()
    }


def residual(leak: Leak, labels: Labels) -> Callable[[Rows], Float[Tensor, "lanes entries"]]:
    """``(g(x) - G) / s`` of each lane, in float64, as a function of its pixels."""
    respond, leaked, errors = answer(leak), mean_gradient(leak), standard_errors(leak)
    shape = (leak.protocol.batch, *leak.protocol.shape)
    target = targets(labels, leak.protocol.classes).double()

    def lane(weights: Tensors, buffers: Tensors, leaked: Tensors, errors: Tensors, x: Tensor, target: Tensor) -> Tensor:
        found = respond(weights, buffers, x.reshape(shape), target)
        return torch.cat([((found[name] - leaked[name]) / errors[name]).flatten() for name in found])

    def doubled(tensors: Tensors) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in tensors.items()}

    shared = 0 if leak.stacked else None
    every = vmap(lane, in_dims=(shared, shared, 0, 0, 0, 0))
    weights, buffers, heard = doubled(leak.weights or {}), doubled(leak.buffers), doubled(leaked)
    return lambda x: every(weights, buffers, heard, errors, x, target)


def fitted(
    misfit: Callable[[Rows], Float[Tensor, "lanes entries"]],
    start: Rows,
    mean: Rows,
    precision: Product,
    steps: int,
    inner: int,
) -> tuple[Rows, Float[Tensor, "lanes"]]:
    """The pixels at which the objective is lowest from `start` on, and the objective there; all in float64.

    Args:
        misfit: the residual of each lane.
        precision: product with P.
        steps: Gauss-Newton steps, each with at most `inner` conjugate gradients.
    """

    def cost(x: Rows) -> Float[Tensor, "lanes"]:
        return misfit(x).square().sum(1) + ((x - mean) * precision(x - mean)).sum(1)

    x, value = start, cost(start)
    damping: Tensor | None = None
    for _ in range(steps):
        r, pull = vjp(misfit, x)[:2]

        def curved(v: Rows, x: Rows = x, pull: Callable[[Tensor], tuple[Rows]] = pull) -> Rows:
            return pull(jvp(misfit, (x,), (v,))[1])[0] + precision(v)

        slope = pull(r)[0] + precision(x - mean)
        if damping is None:
            damping = 1e-3 * (slope * curved(slope)).sum(1) / slope.square().sum(1).clamp_min(1e-300)
        step = conjugate_gradients(lambda v, d=damping, c=curved: c(v) + d[:, None] * v, -slope, inner)  # type: ignore[misc]
        there = x + step
        lower = cost(there)
        kept = lower < value
        x, value = torch.where(kept[:, None], there, x), torch.where(kept, lower, value)
        damping = torch.where(kept, damping * GIVE, damping * TAKE)
    return x, value


def conjugate_gradients(product: Product, right: Rows, steps: int) -> Rows:
    """x of ``product(x) = right`` for each lane, begun at 0 (Hestenes and Stiefel 1952)."""
    x, r = torch.zeros_like(right), right
    p, power = r, r.square().sum(1)
    least = ENOUGH**2 * power
    for _ in range(steps):
        going = power > least
        if not going.any():
            break
        ahead = product(p)
        length = torch.where(going, power / (p * ahead).sum(1).clamp_min(1e-300), 0.0)
        x, r = x + length[:, None] * p, r - length[:, None] * ahead
        before, power = power, torch.where(going, r.square().sum(1), power)
        p = r + torch.where(going, power / before, 0.0)[:, None] * p
    return x
