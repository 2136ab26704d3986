"""Defences: what a client does to its gradient before it sends it. `none`, or `noise(0.01)`."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simulator.errors import FedtapError
from simulator.leaks import Tensors

HOW = "write none or noise(0.01)"


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on each entry of the gradient.

    Args:
        sigma: its standard deviation, in the gradient's own units.
    """

    sigma: float

    def __str__(self) -> str:
        return f"noise({self.sigma!r})"

    def __call__(self, gradient: Tensors, draw: torch.Generator) -> dict[str, Tensor]:
        """The gradient that is sent; what is random comes from `draw`, in the order of the names."""
        return {
            name: gradient[name] + self.sigma * torch.randn(gradient[name].shape, generator=draw)
            for name in sorted(gradient)
        }


def parse(text: str) -> Noise | None:
    """The defence as it is written on the command line; None where there is none.

    Raises:
        FedtapError: no such defence, or a value out of range.
    """
    if text.strip() == "none":
        return None
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "noise"):
            raise ValueError("no such defence")
        (value,) = call.args
        sigma = float(ast.literal_eval(value))
        if call.keywords or not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError("noise takes one number from 0")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise FedtapError(f"--defence {text!r} cannot be read ({error}): {HOW}.") from error
    return Noise(sigma)
