"""Bayesian models by name: the likelihood of a record under parameters, and the prior of the parameters.

A record is a point ``(inputs, output)``. The client samples the posterior of such a model, and the server, which chose
it, knows it: its name is in the leak's protocol.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Protocol

HALF_CAUCHY = re.compile(r"halfcauchy\(\s*([0-9.eE+-]+)\s*\)")

HIGHEST, WIDEST = 20, 500
"""Degree of a polynomial, and hidden units of a network, at most: beyond, powers are lost in rounding, and the Hessian
of the log-posterior needs gigabytes."""

HOW_TO_WRITE = "write linear_regression, polynomial(DEGREE) or bayesian_network(HIDDEN, NOISE)"


@dataclass(frozen=True)
class Prior:
    """Prior of a standard deviation σ > 0: flat, or Half-Cauchy(0, `scale`)."""

    scale: float = math.inf

    def __str__(self) -> str:
        return "flat" if math.isinf(self.scale) else f"halfcauchy({self.scale:g})"

    def __call__(self, sigma: Float[Tensor, "*draws"]) -> Float[Tensor, "*draws"]:
        """log p(σ) up to a constant."""
        return -torch.log1p((sigma / self.scale) ** 2)


def prior(text: str) -> Prior:
    """The prior of these words: ``flat``, ``halfcauchy(2.5)``.

    Raises:
        FedtapError: it is none of them, or its scale is no number over 0.
    """
    found = HALF_CAUCHY.fullmatch(text.strip())
    try:
        scale = float(found[1]) if found else math.inf
    except ValueError:
        scale = math.nan
    if (found and not 0 < scale < math.inf) or (not found and text.strip() != "flat"):
        raise FedtapError(
            f"{short(text)!r} is no prior of σ that fedtap knows: write flat or halfcauchy(SCALE), with a scale over 0."
        )
    return Prior(scale)


class Likelihood(ABC):
    """The model as an attack on a posterior needs it.

    One whose log-likelihood is ``natural(θ) . statistics(point)`` says both, and is an exponential family.
    """

    inputs: int

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the entries of θ, in order."""

    @abstractmethod
    def log_likelihood(self, theta: Float[Tensor, "d"], point: Float[Tensor, "columns"]) -> Float[Tensor, ""]:
        """log l(θ, (inputs, output)), up to a constant."""

    @abstractmethod
    def log_prior(self, theta: Float[Tensor, "d"]) -> Float[Tensor, ""]:
        """log p(θ), up to a constant."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The architecture, on the meta device: a parameter for each group of them, in the order of θ."""

    @property
    def columns(self) -> int:
        """Numbers of a record."""
        return self.inputs + 1

    @property
    def positive(self) -> tuple[int, ...]:
        """Indices of the entries of θ that are positive."""
        return ()


@dataclass(frozen=True)
class LinearRegression(Likelihood):
    """``y ~ N(ψ(x)ᵀβ, σ²)``, ψ = (1, x), or (1, x, …, x^degree) of one input; β flat, σ unknown."""

    inputs: int = 1
    degree: int = 1
    sigma: Prior = Prior()

    def __post_init__(self) -> None:
        if self.inputs < 1 or not 1 <= self.degree <= HIGHEST or (self.degree > 1 and self.inputs > 1):
            raise FedtapError(
                f"A linear regression on {short(self.inputs)} inputs of degree {short(self.degree)} is none that "
                f"fedtap knows: it takes any number of inputs at degree 1, or powers of one, to {HIGHEST}."
            )

    def __str__(self) -> str:
        return "linear_regression" if self.degree == 1 else f"polynomial({self.degree})"

    def network(self) -> nn.Module:
        return _bare(beta=self.inputs * self.degree + 1, sigma=1)

    @property
    def parameters(self) -> tuple[str, ...]:
        """β[1] is the intercept; σ comes last, as in posteriordb."""
        return (*(f"beta[{number + 1}]" for number in range(self.inputs * self.degree + 1)), "sigma")

    @property
    def positive(self) -> tuple[int, ...]:
        return (self.inputs * self.degree + 1,)

    def features(self, inputs: Float[Tensor, "*points inputs"]) -> Float[Tensor, "*points features"]:
        """ψ(x)."""
        powers = [inputs**power for power in range(1, self.degree + 1)]
        return torch.cat([torch.ones_like(inputs[..., :1]), *powers], dim=-1)

    def log_likelihood(self, theta: Float[Tensor, "d"], point: Float[Tensor, "columns"]) -> Float[Tensor, ""]:
        residual = point[-1] - self.features(point[:-1]) @ theta[:-1]
        return -theta[-1].log() - 0.5 * (residual / theta[-1]) ** 2

    def log_prior(self, theta: Float[Tensor, "d"]) -> Float[Tensor, ""]:
        return self.sigma(theta[-1])

    @property
    def monomials(self) -> list[tuple[int, ...]]:
        """Powers of the columns in each statistic; those of ψψᵀ, ψy and y², each once, 1 first."""
        products = {_product(*pair) for pair in combinations_with_replacement(self._u, 2)}
        return sorted(products, key=lambda powers: (sum(powers), powers[::-1]))

    @property
    def _u(self) -> list[tuple[int, ...]]:
        """Powers of the columns in each entry of u = (ψ, y)."""
        units = [tuple(int(at == column) for at in range(self.columns)) for column in range(self.columns)]
        inputs = [tuple(power * one for one in unit) for power in range(1, self.degree + 1) for unit in units[:-1]]
        return [(0,) * self.columns, *inputs, units[-1]]

    def statistics(self, points: Float[Tensor, "*points columns"]) -> Float[Tensor, "*points statistics"]:
        """Sufficient statistics of a record; the likelihood depends on the records through their sums alone."""
        u, pairs = self._u, combinations_with_replacement(range(len(self._u)), 2)
        place = {_product(u[left], u[right]): (left, right) for left, right in pairs}  # of equal ones, any does
        left, right = zip(*(place[powers] for powers in self.monomials), strict=True)
        seen = torch.cat([self.features(points[..., :-1]), points[..., -1:]], dim=-1)
        return seen[..., left] * seen[..., right]

    def natural(self, theta: Float[Tensor, "d"]) -> Float[Tensor, "statistics"]:
        """``log l(θ, z) = natural(θ) . statistics(z)``: −log σ on 1, and −vvᵀ/2σ² on uuᵀ, v = (β, −1), u = (ψ, y)."""
        sigma, signed = theta[-1], torch.cat([theta[:-1], -torch.ones_like(theta[:1])])
        products = -0.5 * torch.outer(signed, signed).flatten() / sigma**2
        first = torch.zeros_like(products)
        first[0] = 1.0
        return self._gather.to(theta) @ (products - first * sigma.log())

    @property
    def _gather(self) -> Float[Tensor, "statistics products"]:
        """Index, for each entry of uuᵀ, of its monomial among the statistics."""
        u, place = self._u, {powers: row for row, powers in enumerate(self.monomials)}
        gather = torch.zeros(len(place), len(u) ** 2)
        for row, left in enumerate(u):
            for column, right in enumerate(u):
                gather[place[_product(left, right)], row * len(u) + column] = 1.0
        return gather


def _product(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(one + other for one, other in zip(left, right, strict=True))


@dataclass(frozen=True)
class BayesianNetwork(Likelihood):
    """``y ~ N(v . tanh(Wx + b) + c, noise²)``; every parameter N(0, 1)."""

    inputs: int = 1
    hidden: int = 8
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.inputs < 1 or not 1 <= self.hidden <= WIDEST or not 0 < self.noise < math.inf:
            raise FedtapError(
                f"{short(self)} is no network that can be sampled: give it at least one input, 1 to {WIDEST} hidden "
                "units, and a noise over 0."
            )

    def __str__(self) -> str:
        return f"bayesian_network({self.hidden}, {self.noise:g})"

    def network(self) -> nn.Module:
        return _bare(into=self.hidden * self.inputs, bias=self.hidden, out=self.hidden, offset=1)

    @property
    def parameters(self) -> tuple[str, ...]:
        into = [f"W[{unit + 1},{at + 1}]" for unit in range(self.hidden) for at in range(self.inputs)]
        rest = [f"{name}[{unit + 1}]" for name in "bv" for unit in range(self.hidden)]
        return (*into, *rest, "c")

    def log_likelihood(self, theta: Float[Tensor, "d"], point: Float[Tensor, "columns"]) -> Float[Tensor, ""]:
        wide = self.hidden
        into, bias, out, offset = theta.split([wide * self.inputs, wide, wide, 1])  # type: ignore[no-untyped-call]
        hidden = torch.tanh(into.reshape(wide, self.inputs) @ point[:-1] + bias)
        residual: Tensor = point[-1] - out @ hidden - offset[0]
        return -0.5 * (residual / self.noise) ** 2

    def log_prior(self, theta: Float[Tensor, "d"]) -> Float[Tensor, ""]:
        return -0.5 * theta @ theta


LIKELIHOODS = ("linear_regression", "polynomial", "bayesian_network")

NORMAL = "normal(1)"
"""The prior of a network's parameters."""


def likelihood(model: str, inputs: int, prior_of_sigma: str = "flat") -> Likelihood:
    """The model of this name, as a protocol says it, for this number of inputs.

    Raises:
        FedtapError: there is none of this name, or its values are not such.
    """
    name, _, rest = model.strip().partition("(")
    values = [word.strip() for word in rest.removesuffix(")").split(",") if rest]
    try:
        if name == "bayesian_network":
            hidden, noise = values
            return BayesianNetwork(inputs, int(hidden), float(noise))
        (degree,) = values if name == "polynomial" else ["1"] if not values else ["", ""]
        if name in LIKELIHOODS:
            return LinearRegression(inputs, int(degree), prior(prior_of_sigma))
    except ValueError as error:
        raise FedtapError(
            f"{short(model)!r} cannot be read as a likelihood ({short(error)}): {HOW_TO_WRITE}."
        ) from error
    raise FedtapError(f"{short(model)!r} is no likelihood that fedtap knows: {HOW_TO_WRITE}.")


def likelihood_of(protocol: Protocol) -> Likelihood:
    """The model that a posterior is of.

    Raises:
        FedtapError: the protocol's model is none whose likelihood is known.
    """
    return likelihood(protocol.model, protocol.shape[0], protocol.prior)


def _bare(**sizes: int) -> nn.Module:
    network = nn.Module()
    for name, size in sizes.items():
        network.register_parameter(name, nn.Parameter(torch.empty(size, device="meta")))
    return network
