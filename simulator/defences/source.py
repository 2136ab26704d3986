"""Where a defence's randomness comes from: the operating system for real clients, a seed in a simulation.

Whoever finds the seed takes the noise off again, and entries that are known to be zero tell the right one. torch's and
numpy's generators are no cryptographic ones; `os.urandom` is.

Noise in floating point gives away more than theory says: which numbers `x + noise` can be depends on x (Mironov, CCS
2012, https://doi.org/10.1145/2382196.2382264; for Gaussian noise Jin et al., S&P 2022,
https://arxiv.org/abs/2112.05307). Against that the system's noise is done in two steps, in double precision. Both x and
the noise are rounded to multiples of a grid, where their sum is exact, so that the same numbers can come of every x, as
in Google's library (https://github.com/google/differential-privacy, Secure Noise Generation, 2020). And the noise is a
sum of several draws, four for a Gaussian, so that draws of 53 bits reach all multiples in its tails too (Holohan and
Braghin, ESORICS 2021, https://arxiv.org/abs/2107.10138). What is left: the draws follow their distribution as closely
as double precision does and no closer, x moves by half the grid, and the time that it takes is not constant.
"""

from __future__ import annotations

import math
import os
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Source: TypeAlias = torch.Generator | None
"""None is the operating system's cryptographic generator. A torch.Generator has a seed: it is for simulations alone."""

FINE = 32
"""The grid is 2^-32 of the noise's scale, or less. That is exact for entries up to 2^20 times the scale, and n entries
move by 2^-33 √n of it at most."""

DRAWS = 4
"""Gaussian variables of which the system's noise is the sum, over √4."""


def gaussian(tensor: Tensor, sigma: float, source: Source) -> Tensor:
    """The tensor with N(0, sigma²) on each entry."""
    if source is not None:
        return tensor + sigma * torch.randn(tensor.shape, generator=source).to(tensor.dtype)
    drawn = torch.zeros(tensor.shape, dtype=torch.float64)
    for _ in range(DRAWS):
        drawn += torch.special.ndtri(uniform(tensor.shape, None))
    return _on_grid(tensor, sigma, drawn / math.sqrt(DRAWS))


def laplace(tensor: Tensor, scale: float, source: Source) -> Tensor:
    """The tensor with Laplace noise of this scale on each entry: the difference of two exponential variables."""
    if source is not None:
        twice = torch.empty(2, *tensor.shape).exponential_(generator=source)
        return tensor + scale * (twice[0] - twice[1]).to(tensor.dtype)
    one, other = uniform((2, *tensor.shape), None).log()
    return _on_grid(tensor, scale, one - other)


def uniform(shape: torch.Size | tuple[int, ...], source: Source) -> Float[Tensor, "*shape"]:
    """Between 0 and 1; the system's are the odd multiples of 2^-53, and never an end."""
    if source is not None:
        return torch.rand(shape, generator=source)
    words = np.frombuffer(os.urandom(8 * math.prod(shape)), np.uint64) >> np.uint64(12)
    return torch.from_numpy((words + 0.5) * 2.0**-52).reshape(shape)


def _on_grid(tensor: Tensor, scale: float, noise: Float[Tensor, "..."]) -> Tensor:
    """``tensor + scale noise``, each rounded to the grid before they are added."""
    if not scale:
        return tensor.clone()
    grid = 2.0 ** max(math.frexp(scale)[1] - 1 - FINE, -800)  # to divide by a power of two is exact
    steps = (tensor.double() / grid).round() + (scale / grid * noise).round()
    return (steps * grid).to(tensor.dtype)
