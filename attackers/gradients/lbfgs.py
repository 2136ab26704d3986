"""L-BFGS on many problems at once, each batch element with its own history, line search and end.

Liu and Nocedal 1989, https://doi.org/10.1007/BF01589116, in the compact form of Byrd, Nocedal and Schnabel 1994,
https://doi.org/10.1007/BF01582063; weak Wolfe bisection of Lewis and Overton 2013,
https://doi.org/10.1007/s10107-012-0514-2. Every call of the objective serves all elements that still run: an element
whose point was refused tries another step length in the call in which others take their next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedtap.attackers.parts.repeated import Repeated, capture_on
from fedtap.simulator.film import shown
from fedtap.simulator.progress import progress

Iterates = Float[Tensor, "elements size"]
ValueAndGradient = Callable[[Iterates, Int[Tensor, "elements"]], tuple[Float[Tensor, "elements"], Iterates]]
"""(points, number of the element each belongs to) -> (values, gradients)."""

DECREASE, CURVATURE = 1e-4, 0.9
"""c1 and c2 of the weak Wolfe conditions, at the values of Nocedal and Wright 2006, chapter 3."""

CPU_BLOCK, CUDA_BLOCK = 64, 1024
"""Elements that run at once: their histories stay below a gigabyte on a CPU, and below ten on a GPU."""

CUDA_LEAST, CUDA_EVERY = 64, 10
"""On a GPU: elements that take no longer than one, so that none of fewer leaves the batch, and steps between two looks
at how many still run."""

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
    image: Sequence[int] = (),
) -> tuple[Iterates, Float[Tensor, "elements"]]:
    """Lowest point found for each element within `steps` evaluations, and its value.

    Args:
        history: pairs of (step, change of gradient) that an element remembers.
        tolerance: value at or below which an element ends.
        image: shape of the images at the beginning of a point, for who films them; none where there are none.
    """
    points, values = start.clone(), start.new_empty(len(start))
    capture = capture_on(start.device)
    captured = capture is not None
    every = CUDA_EVERY if captured else 1
    blocks = torch.split(torch.arange(len(start), device=start.device), CUDA_BLOCK if captured else CPU_BLOCK)
    for place, block in enumerate(blocks):
        search = _Search(objective, start[block], block, history, tolerance, asks=not captured)
        step = Repeated(search.advance, capture)
        for number in progress(range(steps - 1), label):
            if number % every == 0:
                going = search.going()
                left, many = int(going.sum()), len(going)
                if not left:
                    break
                # a new graph is worth its capture where the batch is half as large
                worth = many - 1 if not captured else many // 2 if many > CUDA_LEAST else 0
                if left <= worth:
                    points[search.elements], values[search.elements] = search.x, search.value
                    search.keep(going.nonzero().squeeze(1))
                    step = Repeated(search.advance, capture)
            step()
            if image and place == 0:
                shown(lambda: _first(search, points, values, image))  # noqa: B023  (called at once)
        points[search.elements], values[search.elements] = search.x, search.value
    return points, values


def _first(
    search: _Search, points: Iterates, values: Float[Tensor, "elements"], image: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The first element's images and value: where its search is, or where it came to its end."""
    still = bool(search.elements[0] == 0)
    point, value = (search.x[0], search.value[0]) if still else (points[0], values[0])
    return point[: math.prod(image)].reshape(*image), value


class _Search:
    """The state of each element's search: where it is, its direction, and the interval of step lengths that is left.

    Args:
        elements: the number of each element, for the objective.
        asks: whether what no element needs is left out, which asks the device; all is done for all elsewhere, since a
            GPU would have to be waited for.
    """

    _STATE = ("x", "value", "gradient", "move", "descent", "step", "low", "high", "tries", "fresh", "elements")

    def __init__(
        self,
        objective: ValueAndGradient,
        x: Iterates,
        elements: Int[Tensor, "elements"],
        history: int,
        tolerance: float,
        asks: bool,
    ) -> None:
        self.objective, self.tolerance, self.asks, self.elements = objective, tolerance, asks, elements.clone()
        self.x = x.clone()
        self.value, self.gradient = objective(self.x, elements)
        self.memory = _Memory(x, history)
        self.move, self.descent = _steepest(self.gradient)
        self.step, self.low = torch.ones_like(self.value), torch.zeros_like(self.value)
        self.high = torch.full_like(self.value, float("inf"))
        self.tries, self.fresh = torch.zeros_like(elements), torch.ones_like(elements, dtype=torch.bool)

    def going(self) -> Bool[Tensor, "elements"]:
        """Which elements have not come to their end."""
        return (self.value > self.tolerance) & (self.descent < 0) & self.value.isfinite()

    def keep(self, rows: Tensor) -> None:
        """Let go of all other elements."""
        for name in self._STATE:
            setattr(self, name, getattr(self, name)[rows])
        self.memory.keep(rows)

    def advance(self) -> None:
        """One evaluation for each element, in place; an element that has ended stays where it is."""
        going, x, gradient, move = self.going(), self.x, self.gradient, self.move
        there = x + self.step[:, None] * move
        value_there, gradient_there = self.objective(there, self.elements)
        # sufficient decrease: f(x + t d) <= f(x) + c1 t g'd; curvature: g(x + t d)'d >= c2 g'd
        enough = value_there <= self.value + DECREASE * self.step * self.descent  # false for NaN
        flat = (gradient_there * move).sum(1) >= CURVATURE * self.descent
        tries = self.tries + 1
        accept = going & enough & (flat | (tries >= TRIES))
        stuck = going & ~accept & (tries >= TRIES)

        # bisection: a point without decrease bounds the step from above, one without curvature from below
        high = torch.where(enough, self.high, self.step)
        low = torch.where(enough & ~flat, self.step, self.low)
        step = torch.where(high.isinf(), 2 * self.step, (low + high) / 2)
        fresh, descent = self.fresh, self.descent
        if not self.asks or bool(accept.any()):
            chosen = accept[:, None]
            after = torch.where(chosen, gradient_there, gradient)
            move = torch.where(chosen, self.memory.direction(accept, there - x, gradient, after), move)
            x, gradient = torch.where(chosen, there, x), after
            self.value.copy_(torch.where(accept, value_there, self.value))
            descent = torch.where(accept, (move * gradient).sum(1), descent)
            fresh = fresh & ~accept
        uphill = accept & ~(descent < 0)
        again = uphill | (stuck & ~fresh)
        if not self.asks or bool(again.any()):
            self.memory.forget(again)
            steepest, slope = _steepest(gradient)
            move, descent = torch.where(again[:, None], steepest, move), torch.where(again, slope, descent)
            fresh = fresh | again
        anew = accept | again
        self.x.copy_(x)
        self.gradient.copy_(gradient)
        self.move.copy_(move)
        self.descent.copy_(torch.where(stuck & ~again, torch.zeros_like(descent), descent))
        self.fresh.copy_(fresh)
        self.step.copy_(torch.where(anew, torch.ones_like(step), step))
        self.low.copy_(torch.where(anew, torch.zeros_like(low), low))
        self.high.copy_(torch.where(anew, torch.full_like(high, float("inf")), high))
        self.tries.copy_(torch.where(anew, torch.zeros_like(tries), tries))


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

    def forget(self, which: Bool[Tensor, "elements"]) -> None:
        """Begin anew in these elements; what their slots hold counts for nothing until it is overwritten."""
        self.count.masked_fill_(which, 0)
        for tensor in (self.sy, self.yy, self.on_s, self.on_y):
            tensor.masked_fill_(which.reshape(-1, *[1] * (tensor.ndim - 1)), 0)

    def direction(self, accept: Tensor, s: Iterates, gradient_before: Iterates, gradient: Iterates) -> Iterates:
        """``-H g`` for the elements in `accept`, once the step `s` and its change of gradient are in the memory.

        H is the inverse Hessian of an element's pairs: with R the upper triangle of S'Y (oldest first), D its diagonal
        and u = R^-1 S'g, H g = scale g + S R^-T ((D + scale Y'Y) u - scale Y'g) - scale Y u.
        """
        # y = g_{k+1} - g_k
        y = gradient - gradient_before
        product, size = (s * y).sum(1), (y * y).sum(1)
        accept = accept & (product > 1e-10 * size.sqrt() * s.norm(dim=1))  # s'y > 0 keeps H positive definite
        history = self.s.shape[1]
        rows, slots = (torch.arange(n, device=s.device) for n in (len(s), history))
        slot = self.count % history

        def put(tensor: Tensor, where: tuple[Any, ...], values: Tensor) -> None:
            before = tensor[where]
            tensor[where] = torch.where(accept.reshape(-1, *[1] * (before.ndim - 1)), values.to(before.dtype), before)

        # a ring: the newest pair overwrites the oldest
        newest = (rows, slot)
        put(self.s, newest, s)
        put(self.y, newest, y)
        self.count += accept
        # H_0 = (s'y / y'y) I
        self.scale.copy_(torch.where(accept, (product / size).double(), self.scale))
        put(self.on_s, newest, (s * gradient_before).sum(1))
        put(self.on_y, newest, (y * gradient_before).sum(1))
        unused = slots >= self.count[:, None]
        on_s, on_y = (_products(known, gradient).masked_fill(unused, 0) for known in (self.s, self.y))
        # S'y = S'g - S'g_before: the large tensors are read once, not twice
        put(self.sy, (rows, slice(None), slot), on_s - self.on_s)
        put(self.yy, (rows, slice(None), slot), on_y - self.on_y)
        put(self.yy, newest, on_y - self.on_y)
        put(self.sy, (rows, slot, slot), product)
        put(self.yy, (rows, slot, slot), size)
        self.on_s.copy_(on_s)
        self.on_y.copy_(on_y)

        count = self.count[:, None]
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
        back = torch.where(count > history, (slots - count) % history, slots)  # and the place of each slot
        weights = (along.gather(1, back).to(gradient.dtype)[:, None, :] for along in (along_s, along_y))
        combined = sum(torch.bmm(weight, known) for weight, known in zip(weights, (self.s, self.y), strict=True))
        return -(scale.to(gradient.dtype) * gradient + torch.as_tensor(combined).squeeze(1))


def _products(known: Float[Tensor, "elements history size"], vector: Iterates) -> Float[Tensor, "elements history"]:
    # a row times a matrix: the other way round is four times slower in torch's bmm on a CPU
    return torch.bmm(vector[:, None, :], known.transpose(1, 2)).squeeze(1).double()


def _in_order(products: Tensor, by_age: Tensor) -> Tensor:
    return products.gather(1, by_age[:, :, None].expand_as(products)).gather(2, by_age[:, None, :].expand_as(products))
