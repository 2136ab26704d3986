"""L-BFGS on many problems at once, each lane with its own history, line search and end.

Liu and Nocedal 1989, https://doi.org/10.1007/BF01589116, in the compact form of Byrd, Nocedal and Schnabel 1994,
https://doi.org/10.1007/BF01582063; weak Wolfe bisection of Lewis and Overton 2013,
https://doi.org/10.1007/s10107-012-0514-2. Every call of the objective serves all lanes that still run: a lane that
searches along its line takes another point of it while its neighbours go on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.simulator.progress import progress

Points = Float[Tensor, "lanes size"]
Objective = Callable[[Points, Int[Tensor, "lanes"]], tuple[Float[Tensor, "lanes"], Points]]
"""Of points and the number of the lane each belongs to: values and slopes."""

DECREASE, CURVATURE = 1e-4, 0.9
BLOCK, CUDA_BLOCK = 64, 1024
"""Lanes that run at once: what their histories take stays below a gigabyte, on a GPU below some ten."""

TRIES = 12
"""Points on one line before its direction is given up: steepest descent next, the end if that was it."""


def minimise(
    objective: Objective, start: Points, steps: int, *, history: int = 60, floor: float = 0.0, label: str = "L-BFGS"
) -> tuple[Points, Float[Tensor, "lanes"]]:
    """Lowest point found for each lane within `steps` evaluations, and its value.

    Args:
        history: pairs of (move, change of slope) that a lane remembers.
        floor: a lane whose value is no higher is done.
    """
    blocks = [
        _minimise(objective, start, lanes, steps, history, floor, label)
        for lanes in torch.split(torch.arange(len(start), device=start.device), CUDA_BLOCK if start.is_cuda else BLOCK)
    ]
    points, values = zip(*blocks, strict=True)
    return torch.cat(points), torch.cat(values)


def _minimise(
    objective: Objective,
    start: Float[Tensor, "all size"],
    block: Int[Tensor, "lanes"],
    steps: int,
    history: int,
    floor: float,
    label: str,
) -> tuple[Points, Float[Tensor, "lanes"]]:
    lanes, first = block, block[0]
    x = start[block]
    value, slope = objective(x, lanes)
    found, lowest = x.clone(), value.clone()
    memory = _Memory(x, history)
    move, descent = _steepest(slope)
    step, low, high = torch.ones_like(value), torch.zeros_like(value), torch.full_like(value, float("inf"))
    tries, fresh = torch.zeros_like(lanes), torch.ones_like(lanes, dtype=torch.bool)
    for _ in progress(steps - 1, label):
        going = (value > floor) & (descent < 0) & value.isfinite()
        if not bool(going.all()):  # lanes that are done leave the batch
            keep = going.nonzero().squeeze(1)
            x, value, slope, move, descent, step, low, high, tries, fresh, lanes = (
                tensor[keep] for tensor in (x, value, slope, move, descent, step, low, high, tries, fresh, lanes)
            )
            memory.keep(keep)
            if not len(lanes):
                break
        there = x + step[:, None] * move
        value_there, slope_there = objective(there, lanes)
        enough = value_there <= value + DECREASE * step * descent  # false for NaN
        flat = (slope_there * move).sum(1) >= CURVATURE * descent
        tries = tries + 1
        accept = enough & (flat | (tries >= TRIES))
        stuck = ~accept & (tries >= TRIES)

        high = torch.where(enough, high, step)
        low = torch.where(enough & ~flat, step, low)
        step = torch.where(high.isinf(), 2 * step, (low + high) / 2)
        if bool(accept.any()):
            chosen = accept[:, None]
            after = torch.where(chosen, slope_there, slope)
            move = torch.where(chosen, memory.direction(accept, there - x, slope, after), move)
            x, slope = torch.where(chosen, there, x), after
            value = torch.where(accept, value_there, value)
            found[lanes - first], lowest[lanes - first] = x, value
            descent = torch.where(accept, (move * slope).sum(1), descent)
            fresh = fresh & ~accept
        uphill = accept & ~(descent < 0)
        again = uphill | (stuck & ~fresh)
        if bool(again.any()):
            rows = again.nonzero().squeeze(1)
            memory.forget(rows)
            move[rows], descent[rows] = _steepest(slope[rows])
            fresh[rows] = True
        descent = torch.where(stuck & ~again, torch.zeros_like(descent), descent)
        anew = accept | again
        step = torch.where(anew, torch.ones_like(step), step)
        low = torch.where(anew, torch.zeros_like(low), low)
        high = torch.where(anew, torch.full_like(high, float("inf")), high)
        tries = torch.where(anew, torch.zeros_like(tries), tries)
    return found, lowest


def _steepest(slope: Points) -> tuple[Points, Float[Tensor, "lanes"]]:
    """Downhill by one unit at most, and the slope along it."""
    move = -slope / slope.abs().sum(1, keepdim=True).clamp_min(1)
    return move, (move * slope).sum(1)


class _Memory:
    """Each lane's last moves `s` and changes of slope `y`, oldest overwritten first, and their products."""

    def __init__(self, x: Points, history: int) -> None:
        lanes, size = x.shape
        self.s, self.y = x.new_zeros(lanes, history, size), x.new_zeros(lanes, history, size)
        self.sy, self.yy = (x.new_zeros(lanes, history, history, dtype=torch.float64) for _ in range(2))
        self.on_s, self.on_y = (x.new_zeros(lanes, history, dtype=torch.float64) for _ in range(2))  # S'slope, Y'slope
        self.count = torch.zeros(lanes, dtype=torch.long, device=x.device)
        self.scale = x.new_ones(lanes, dtype=torch.float64)

    def keep(self, rows: Tensor) -> None:
        """Let go of all other lanes."""
        for name in ("s", "y", "sy", "yy", "on_s", "on_y", "count", "scale"):
            setattr(self, name, getattr(self, name)[rows])

    def forget(self, rows: Tensor) -> None:
        """Begin anew in these lanes."""
        for tensor in (self.s, self.y, self.sy, self.yy, self.on_s, self.on_y, self.count):
            tensor[rows] = 0

    def direction(self, accept: Tensor, s: Points, slope_before: Points, slope: Points) -> Points:
        """``-H slope`` for the lanes in `accept`, after learning the move `s` and what it did to the slope.

        H is the inverse Hessian of a lane's pairs: with R the upper triangle of S'Y (oldest first), D its diagonal
        and u = R^-1 S'g, H g = scale g + S R^-T ((D + scale Y'Y) u - scale Y'g) - scale Y u.
        """
        y = slope - slope_before
        product, size = (s * y).sum(1), (y * y).sum(1)
        accept = accept & (product > 1e-10 * size.sqrt() * s.norm(dim=1))  # positive curvature alone is worth learning
        rows = accept.nonzero().squeeze(1)
        slot = self.count[rows] % self.s.shape[1]
        self.s[rows, slot], self.y[rows, slot] = s[rows], y[rows]
        self.count[rows] += 1
        self.scale[rows] = (product[rows] / size[rows]).double()
        self.on_s[rows, slot] = (s * slope_before).sum(1)[rows].double()
        self.on_y[rows, slot] = (y * slope_before).sum(1)[rows].double()
        on_s, on_y = _products(self.s, slope), _products(self.y, slope)
        # S'y = S'slope - S'slope_before: the large tensors are read once, not twice
        self.sy[rows, :, slot] = (on_s - self.on_s)[rows]
        self.yy[rows, :, slot] = self.yy[rows, slot, :] = (on_y - self.on_y)[rows]
        self.sy[rows, slot, slot], self.yy[rows, slot, slot] = product[rows].double(), size[rows].double()
        self.on_s, self.on_y = on_s, on_y

        history = self.s.shape[1]
        slots, count = torch.arange(history, device=slope.device), self.count[:, None]
        order = torch.where(count > history, (count + slots) % history, slots)  # slot of each pair, oldest first
        triangle, squares = (_in_order(products, order) for products in (self.sy, self.yy))
        triangle = triangle.triu()
        diagonal = triangle.diagonal(dim1=1, dim2=2)
        triangle = triangle + torch.diag_embed((diagonal == 0).double())  # slots not in use
        scale = self.scale[:, None]
        u = torch.linalg.solve_triangular(triangle, on_s.gather(1, order)[:, :, None], upper=True)
        right = diagonal[:, :, None] * u + scale[:, :, None] * (
            torch.bmm(squares, u) - on_y.gather(1, order)[:, :, None]
        )
        along_s = torch.linalg.solve_triangular(triangle.transpose(1, 2), right, upper=False).squeeze(2)
        along_y = -scale * u.squeeze(2)
        back = order.argsort(1)
        weights = (along.gather(1, back).to(slope.dtype)[:, None, :] for along in (along_s, along_y))
        combined = sum(torch.bmm(weight, known) for weight, known in zip(weights, (self.s, self.y), strict=True))
        return -(scale.to(slope.dtype) * slope + torch.as_tensor(combined).squeeze(1))


def _products(known: Float[Tensor, "lanes history size"], vector: Points) -> Float[Tensor, "lanes history"]:
    # a row times a matrix: the other way round is four times slower in torch's bmm on a CPU
    return torch.bmm(vector[:, None, :], known.transpose(1, 2)).squeeze(1).double()


def _in_order(products: Tensor, order: Tensor) -> Tensor:
    return products.gather(1, order[:, :, None].expand_as(products)).gather(2, order[:, None, :].expand_as(products))
