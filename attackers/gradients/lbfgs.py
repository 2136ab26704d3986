"""L-BFGS on many problems at once, each batch element with its own history, line search and end.

Liu and Nocedal 1989, https://doi.org/10.1007/BF01589116, in the compact form of Byrd, Nocedal and Schnabel 1994,
https://doi.org/10.1007/BF01582063; weak Wolfe bisection of Lewis and Overton 2013,
https://doi.org/10.1007/s10107-012-0514-2. Every call of the objective serves all elements that still run: an element
whose point was refused tries another step length in the call in which others take their next step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.simulator.progress import progress

Iterates = Float[Tensor, "elements size"]
ValueAndGradient = Callable[[Iterates, Int[Tensor, "elements"]], tuple[Float[Tensor, "elements"], Iterates]]
"""(points, number of the element each belongs to) -> (values, gradients)."""

DECREASE, CURVATURE = 1e-4, 0.9
"""c1 and c2 of the weak Wolfe conditions, at the values of Nocedal and Wright 2006, chapter 3."""

CPU_BLOCK, CUDA_BLOCK = 64, 1024
"""Elements that run at once: their histories stay below a gigabyte on a CPU, and below ten on a GPU."""

TRIES = 12
"""Points tried along a direction before it is replaced by steepest descent; along that, before the element ends."""


def minimise(
    objective: ValueAndGradient,
    start: Iterates,
    steps: int,
    *,
    history: int = 60,
    tolerance: float = 0.0,
    label: str = "L-BFGS",
) -> tuple[Iterates, Float[Tensor, "elements"]]:
    """Lowest point found for each element within `steps` evaluations, and its value.

    Args:
        history: pairs of (step, change of gradient) that an element remembers.
        tolerance: value at or below which an element ends.
    """
    blocks = [
        _minimise(objective, start, elements, steps, history, tolerance, label)
        for elements in torch.split(
            torch.arange(len(start), device=start.device), CUDA_BLOCK if start.is_cuda else CPU_BLOCK
        )
    ]
    points, values = zip(*blocks, strict=True)
    return torch.cat(points), torch.cat(values)


def _minimise(
    objective: ValueAndGradient,
    start: Float[Tensor, "all size"],
    block: Int[Tensor, "elements"],
    steps: int,
    history: int,
    tolerance: float,
    label: str,
) -> tuple[Iterates, Float[Tensor, "elements"]]:
    elements, first = block, block[0]
    x = start[block]
    value, gradient = objective(x, elements)
    found, lowest = x.clone(), value.clone()
    memory = _Memory(x, history)
    move, descent = _steepest(gradient)
    step, low, high = torch.ones_like(value), torch.zeros_like(value), torch.full_like(value, float("inf"))
    tries, fresh = torch.zeros_like(elements), torch.ones_like(elements, dtype=torch.bool)
    for _ in progress(steps - 1, label):
        going = (value > tolerance) & (descent < 0) & value.isfinite()
        if not bool(going.all()):  # elements that have ended leave the batch
            keep = going.nonzero().squeeze(1)
            x, value, gradient, move, descent, step, low, high, tries, fresh, elements = (
                tensor[keep] for tensor in (x, value, gradient, move, descent, step, low, high, tries, fresh, elements)
            )
            memory.keep(keep)
            if not len(elements):
                break
        there = x + step[:, None] * move
        value_there, gradient_there = objective(there, elements)
        # sufficient decrease: f(x + t d) <= f(x) + c1 t g'd; curvature: g(x + t d)'d >= c2 g'd
        enough = value_there <= value + DECREASE * step * descent  # false for NaN
        flat = (gradient_there * move).sum(1) >= CURVATURE * descent
        tries = tries + 1
        accept = enough & (flat | (tries >= TRIES))
        stuck = ~accept & (tries >= TRIES)

        # bisection: a point without decrease bounds the step from above, one without curvature from below
        high = torch.where(enough, high, step)
        low = torch.where(enough & ~flat, step, low)
        step = torch.where(high.isinf(), 2 * step, (low + high) / 2)
        if bool(accept.any()):
            chosen = accept[:, None]
            after = torch.where(chosen, gradient_there, gradient)
            move = torch.where(chosen, memory.direction(accept, there - x, gradient, after), move)
            x, gradient = torch.where(chosen, there, x), after
            value = torch.where(accept, value_there, value)
            found[elements - first], lowest[elements - first] = x, value
            descent = torch.where(accept, (move * gradient).sum(1), descent)
            fresh = fresh & ~accept
        uphill = accept & ~(descent < 0)
        again = uphill | (stuck & ~fresh)
        if bool(again.any()):
            rows = again.nonzero().squeeze(1)
            memory.forget(rows)
            move[rows], descent[rows] = _steepest(gradient[rows])
            fresh[rows] = True
        descent = torch.where(stuck & ~again, torch.zeros_like(descent), descent)
        anew = accept | again
        step = torch.where(anew, torch.ones_like(step), step)
        low = torch.where(anew, torch.zeros_like(low), low)
        high = torch.where(anew, torch.full_like(high, float("inf")), high)
        tries = torch.where(anew, torch.zeros_like(tries), tries)
    return found, lowest


def _steepest(gradient: Iterates) -> tuple[Iterates, Float[Tensor, "elements"]]:
    """The direction of steepest descent, of l1 norm 1 at most, and the derivative along it."""
    move = -gradient / gradient.abs().sum(1, keepdim=True).clamp_min(1)
    return move, (move * gradient).sum(1)


class _Memory:
    """Each element's last steps `s` and changes of gradient `y`, oldest overwritten first, and their products."""

    def __init__(self, x: Iterates, history: int) -> None:
        elements, size = x.shape
        self.s, self.y = x.new_zeros(elements, history, size), x.new_zeros(elements, history, size)
        self.sy, self.yy = (x.new_zeros(elements, history, history, dtype=torch.float64) for _ in range(2))
        self.on_s, self.on_y = (x.new_zeros(elements, history, dtype=torch.float64) for _ in range(2))  # S'g, Y'g
        self.count = torch.zeros(elements, dtype=torch.long, device=x.device)
        self.scale = x.new_ones(elements, dtype=torch.float64)

    def keep(self, rows: Tensor) -> None:
        """Let go of all other elements."""
        for name in ("s", "y", "sy", "yy", "on_s", "on_y", "count", "scale"):
            setattr(self, name, getattr(self, name)[rows])

    def forget(self, rows: Tensor) -> None:
        """Begin anew in these elements."""
        for tensor in (self.s, self.y, self.sy, self.yy, self.on_s, self.on_y, self.count):
            tensor[rows] = 0

    def direction(self, accept: Tensor, s: Iterates, gradient_before: Iterates, gradient: Iterates) -> Iterates:
        """``-H g`` for the elements in `accept`, once the step `s` and its change of gradient are in the memory.

        H is the inverse Hessian of an element's pairs: with R the upper triangle of S'Y (oldest first), D its diagonal
        and u = R^-1 S'g, H g = scale g + S R^-T ((D + scale Y'Y) u - scale Y'g) - scale Y u.
        """
        # y = g_{k+1} - g_k
        y = gradient - gradient_before
        product, size = (s * y).sum(1), (y * y).sum(1)
        accept = accept & (product > 1e-10 * size.sqrt() * s.norm(dim=1))  # s'y > 0 keeps H positive definite
        rows = accept.nonzero().squeeze(1)
        slot = self.count[rows] % self.s.shape[1]
        # a ring: the newest pair overwrites the oldest
        self.s[rows, slot], self.y[rows, slot] = s[rows], y[rows]
        self.count[rows] += 1
        # H_0 = (s'y / y'y) I
        self.scale[rows] = (product[rows] / size[rows]).double()
        self.on_s[rows, slot] = (s * gradient_before).sum(1)[rows].double()
        self.on_y[rows, slot] = (y * gradient_before).sum(1)[rows].double()
        on_s, on_y = _products(self.s, gradient), _products(self.y, gradient)
        # S'y = S'g - S'g_before: the large tensors are read once, not twice
        self.sy[rows, :, slot] = (on_s - self.on_s)[rows]
        self.yy[rows, :, slot] = self.yy[rows, slot, :] = (on_y - self.on_y)[rows]
        self.sy[rows, slot, slot], self.yy[rows, slot, slot] = product[rows].double(), size[rows].double()
        self.on_s, self.on_y = on_s, on_y

        history = self.s.shape[1]
        slots, count = torch.arange(history, device=gradient.device), self.count[:, None]
        by_age = torch.where(count > history, (count + slots) % history, slots)  # slot of each pair, oldest first
        triangle, squares = (_in_order(products, by_age) for products in (self.sy, self.yy))
        # R: s_i'y_j for i <= j, oldest first
        triangle = triangle.triu()
        diagonal = triangle.diagonal(dim1=1, dim2=2)
        triangle = triangle + torch.diag_embed((diagonal == 0).double())  # slots not in use
        scale = self.scale[:, None]
        # u = R^-1 S'g
        u = torch.linalg.solve_triangular(triangle, on_s.gather(1, by_age)[:, :, None], upper=True)
        right = diagonal[:, :, None] * u + scale[:, :, None] * (
            torch.bmm(squares, u) - on_y.gather(1, by_age)[:, :, None]
        )
        # R^-T (D u + scale (Y'Y u - Y'g))
        along_s = torch.linalg.solve_triangular(triangle.transpose(1, 2), right, upper=False).squeeze(2)
        along_y = -scale * u.squeeze(2)
        back = by_age.argsort(1)
        weights = (along.gather(1, back).to(gradient.dtype)[:, None, :] for along in (along_s, along_y))
        combined = sum(torch.bmm(weight, known) for weight, known in zip(weights, (self.s, self.y), strict=True))
        return -(scale.to(gradient.dtype) * gradient + torch.as_tensor(combined).squeeze(1))


def _products(known: Float[Tensor, "elements history size"], vector: Iterates) -> Float[Tensor, "elements history"]:
    # a row times a matrix: the other way round is four times slower in torch's bmm on a CPU
    return torch.bmm(vector[:, None, :], known.transpose(1, 2)).squeeze(1).double()


def _in_order(products: Tensor, by_age: Tensor) -> Tensor:
    return products.gather(1, by_age[:, :, None].expand_as(products)).gather(2, by_age[:, None, :].expand_as(products))
