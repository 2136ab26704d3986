"""The regulariser of a client's training, as the protocol announces it: it stands for a prior over the parameters.

A model trained to the end on examples z_n is a stationary point, ``∇R(θ) + Σ_n ∇l(θ, z_n) = 0``; R is one of

- `fedprox(μ)`, ½ μ |θ - θ_global|², FedProx's proximal term around the weights that were broadcast (Li et al., MLSys
  2020, https://arxiv.org/abs/1812.06127; there the loss is a mean, here a sum, so this μ is theirs times the examples);
- `weight_decay(μ)`, ½ μ |θ|²;
- `max_margin`, ½ |θ|²: the limit of training a homogeneous network without any, where each example's margin takes the
  place of its loss (Lyu and Li, ICLR 2020, https://arxiv.org/abs/1906.05890; Ji and Telgarsky, NeurIPS 2020).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Tensors

_LEAST, _MOST = 1e-12, 1e12
"""Least and largest strength whose gradient double precision can add to that of a loss."""

WRITTEN = re.compile(r"(fedprox|weight_decay)\(([^()]+)\)|(max_margin)")


@dataclass(frozen=True)
class Regulariser:
    """``½ strength |θ - anchor|²``.

    Raises:
        FedtapError: the strength is none that a training could end with.
    """

    name: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise FedtapError(
                f"{self.name} of strength {self.strength} has no gradient, so the trained weights show no sum of "
                "gradients: give a number over 0."
            )
        if not _LEAST <= self.strength <= _MOST:
            raise FedtapError(
                f"{self.name} of strength {self.strength:g} is lost in the losses' rounding, or they in its: give a "
                f"number from {_LEAST:g} to {_MOST:g}."
            )

    @classmethod
    def parse(cls, text: str) -> Regulariser:
        """The regulariser of this announcement: `fedprox(0.05)`, `weight_decay(0.01)`, `max_margin`.

        Raises:
            FedtapError: another text.
        """
        found = WRITTEN.fullmatch(text.strip())
        try:
            if found and found[3]:
                return cls(found[3])
            if found:
                return cls(found[1], float(found[2]))
        except ValueError:
            pass
        raise FedtapError(
            f"The regulariser {short(text)!r} is none that is known, so what the trained weights balance is not "
            "either: write fedprox(0.05), weight_decay(0.01) or max_margin."
        )

    def __str__(self) -> str:
        return self.name if self.name == "max_margin" else f"{self.name}({self.strength!r})"

    def gradient(self, weights: Tensors, broadcast: Tensors | None) -> dict[str, Tensor]:
        """``∇R`` at these weights, parameter name -> tensor, in double precision."""
        # μ (θ - θ_global) for fedprox, μ θ otherwise
        here = {name: tensor.double() for name, tensor in weights.items()}
        if self.name == "fedprox":
            if broadcast is None:
                raise FedtapError(
                    "The proximal term of fedprox is around the broadcast weights, which this threat model "
                    "does not know: use curious_server."
                )
            here = {name: tensor - broadcast[name].double() for name, tensor in here.items()}
        return {name: self.strength * tensor for name, tensor in here.items()}
