"""Training data from a trained model: weighted points whose gradients balance the regulariser's at the weights.

Wynne 2025, https://arxiv.org/abs/2507.18372, theorem 4.3: at a stationary point of ``R(θ) + Σ_n l(θ, x_n, y_n)`` the
private data are a zero of

    |∇R(θ) + Σ_m w_m ∇l(θ, z_m)|²,  w ≥ 0,

a squared MMD with the kernel <∇l(θ, z), ∇l(θ, z')>. With FedProx's R it is a federation's own leak: the server knows
the weights that it sent, the ones that come back, and μ. Haim et al. 2022, https://arxiv.org/abs/2206.07758, and
Buzaglo et al. 2023, https://arxiv.org/abs/2307.01827, are the case of homogeneous networks without regulariser.

Departs from the papers in six ways. Solved by Levenberg-Marquardt (Nocedal and Wright 2006, chapter 10), where they
use gradient descent. A point's unknowns are z and the coefficients c of its logits' gradients, linear in the sum: for
cross-entropy ``c = w (p - e_y)``, so c tells label and weight afterwards, and w ≥ 0 needs no constraint with two
classes, since a negative weight is a positive one under the other label. The residual is whitened by the gradients of
made-up inputs, without which most restarts end far away. There are more points than private examples, since then fewer
restarts end in a local minimum; what is left over shrinks to weight 0 or comes to lie on another. Restarts help each
other: one that is stuck has found some points already, so after each round the next starts are picked greedily among
all restarts' points (orthogonal matching pursuit, Pati et al. 1993), which is what finds them all; `rounds=1` is
without. Haim's smoothed derivative of ReLU and his hinges on range and weight are not there.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, vmap

from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import Attack, PseudoData, generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Protocol, Tensors, TrainedWeightsLeak
from fedtap.simulator.models.regulariser import Regulariser
from fedtap.simulator.progress import progress

STATIONARY_SHARE = 1e-5
"""Share of ∇R left over, as a length, up to which the points explain the weights."""

SOLVED, ENDED = 1e-22, 1e-12
"""Squared share of the whitened ∇R left over at which a round ends, and one at whose end no further one is needed."""

PICKED = (0.6, 0.1)
"""Share of all starts' points that a new start may pick from: the first start's, the last's, and evenly between."""

_FALL, _RISE, _LEAST, _MOST = 1 / 3, 4.0, 1e-15, 1e10
"""Factor of the damping after a step that is kept, and after one that is not; its least; and its value at the end."""

MOST_ENTRIES = 2**29
"""Entries of the Jacobians of all victims and starts, at most: 4 GiB of float64."""

FAINTEST = 1e-7
"""Singular value of the made-up gradients, as a share of the largest, below which a direction is left out."""


@dataclass(frozen=True)
class StationaryMMD(Attack[PseudoData]):
    """Levenberg-Marquardt on the whitened residual, from several starts that are recombined; the lowest is kept.

    The objective is the plain residual, ``|∇R + sum|² / |∇R|²``.
    """

    leaks = (TrainedWeightsLeak,)
    reconstructs = PseudoData

    restarts: int = 16
    """Starting points of each victim."""
    rounds: int = 6
    """Times that all starts are solved; between rounds they are recombined."""
    steps: int = 40
    """Levenberg-Marquardt steps of each start in a round, at most."""
    surplus: float = 1.2
    """Points sought for each private example, from 1."""
    faint: float = 0.05
    """Standard deviation of the starting coefficients, beside points drawn from N(0, 1)."""
    whiten: float = 1e-3
    """Ridge of the whitening: added to the directions' variances, as a share of the largest."""
    inputs: int = 400
    """Made-up inputs, drawn from N(0, 1), whose gradients whiten the residual, at least."""

    @classmethod
    def suits(cls, leak: Leak) -> bool:
        """Any trained model's weights."""
        return isinstance(leak, TrainedWeightsLeak)

    def __post_init__(self) -> None:
        check_fields(self, restarts=1, rounds=1, steps=1, surplus=1, inputs=2)

    @property
    def starts(self) -> int:
        """The restarts."""
        return self.restarts

    def accepts(self, leak: Leak) -> None:
        """Classifiers of two or more classes whose regulariser is announced."""
        super().accepts(leak)
        Regulariser.parse(leak.protocol.prior)
        if leak.protocol.classes < 2:
            raise FedtapError(
                "stationary_mmd reads labels and weights off a cross-entropy's gradient, and a model with "
                f"{leak.protocol.classes} output has none: use one with two classes."
            )

        entries = sum(parameter.numel() for parameter in leak.network.parameters())
        self.check_size(len(leak), leak.protocol, entries)

    def check_size(self, victims: int, protocol: Protocol, entries: int) -> None:
        """Refuse sizes at which the Jacobians would fill the memory.

        Args:
            entries: parameters of the model.

        Raises:
            FedtapError: with the sizes.
        """
        points = math.ceil(self.surplus * protocol.batch)
        unknowns = points * (math.prod(protocol.shape) + protocol.classes - 1)
        if max(victims * self.restarts, 2 * points) * unknowns * entries > MOST_ENTRIES:
            raise FedtapError(
                f"The Jacobians of {victims} victims with {self.restarts} restarts, {unknowns} unknowns and {entries} "
                "weights fill gigabytes: give it fewer victims, restarts, examples, features or weights."
            )

    def begin(self, leak: Leak, seed: int) -> Tensor:
        """N(0, 1) for the points, and N(0, faint^2) for their coefficients."""
        size = math.prod(leak.protocol.shape)
        shape = (math.ceil(self.surplus * leak.protocol.batch), size + leak.protocol.classes - 1)
        names = zip(leak.clients.tolist(), leak.rounds.tolist(), leak.restarts.tolist(), strict=True)
        drawn = torch.stack(
            [torch.randn(shape, generator=generator(seed, *name), dtype=torch.float64) for name in names]
        )
        drawn[..., size:] *= self.faint
        return drawn

    def reconstruct(self, leak: Leak, start: Tensor) -> PseudoData:
        if not bool(start.isfinite().all()):
            raise FedtapError("The starting point holds NaN or infinity, from which no step leads on: leave it out.")
        regulariser, weights = (
            flattened(regulariser_gradient(leak)),
            {name: tensor.double() for name, tensor in leak.observed.items()},
        )
        _warn(leak, regulariser)
        terms = Terms(leak.network, leak.protocol.shape, leak.protocol.classes)
        start = start.reshape(len(leak), self.starts, *start.shape[1:])
        draw = generator("stationary_mmd", "inputs")
        # at least two made-up inputs for each unknown, so that their gradients span its directions
        made_up = torch.randn(max(self.inputs, 2 * start[0, 0].numel()), terms.size, generator=draw, dtype=start.dtype)
        whitener = self._whitener(terms, weights, made_up.to(start.device))
        # in units of |whitened grad R|: SOLVED and ENDED are shares of it
        whitener = whitener / (regulariser[:, None] @ whitener).norm(dim=-1, keepdim=True)
        found, active = start.clone(), torch.arange(len(leak), device=start.device)
        for number in range(self.rounds):
            own = {name: tensor[active] for name, tensor in weights.items()}
            here = found[active]
            if number:
                fresh = start[active].roll(number, 1)[:, :, leak.protocol.batch :]
                here = recombined(terms, own, regulariser[active], whitener[active], here, fresh, number)
            here, cost = self._solve(terms, own, regulariser[active], whitener[active], here)
            by_cost = cost.argsort(1)
            found[active] = here.gather(1, by_cost[..., None, None].expand_as(here))  # the best first
            active = active[cost.amin(1) > ENDED]
            if not len(active):
                break
        found = found[:, 0]
        # objective |grad R + sum|^2 / |grad R|^2, without whitening
        rest = regulariser + terms.sums(weights, found[:, None])[:, 0]
        return _judged(leak, terms, weights, found, rest.square().sum(1) / regulariser.square().sum(1))

    def _whitener(self, terms: Terms, weights: Tensors, inputs: Tensor) -> Float[Tensor, "victims entries directions"]:
        """``V (S² + whiten s_1²)^-½``, with S V the made-up gradients' root mean squares and their directions."""
        # rows / sqrt(n): singular values are root mean squares of the directions
        rows = terms.directions(weights, inputs) / math.sqrt(len(inputs))
        _, spread, across = torch.linalg.svd(rows, full_matrices=False)
        largest = spread[:, :1]
        # (S^2 + whiten s_1^2)^-1/2; directions below FAINTEST are rounding and are left out
        scale: Tensor = torch.where(spread > FAINTEST * largest, (spread**2 + self.whiten * largest**2).rsqrt(), 0.0)
        divided: Tensor = across * scale[:, :, None]
        return divided.transpose(1, 2)

    def _solve(
        self, terms: Terms, weights: Tensors, regulariser: Tensor, whitener: Tensor, found: Tensor
    ) -> tuple[Tensor, Float[Tensor, "victims starts"]]:
        """Lower ``|(∇R + sum) W|²`` for each victim and start by ``(J'J + damping diag J'J) d = -J'r``."""
        target = regulariser[:, None] @ whitener
        rest = target + terms.sums(weights, found) @ whitener
        cost = rest.square().sum(-1).nan_to_num(torch.inf)
        damping = torch.full_like(cost, 0.1)
        for _ in progress(self.steps, "stationary_mmd"):
            jacobian = terms.jacobian(weights, found)
            jacobian = (jacobian.flatten(1, 2) @ whitener).reshape(*found.shape[:2], -1, whitener.shape[2])
            # J'J of each victim and start, unknowns x unknowns
            normal = jacobian @ jacobian.transpose(-1, -2)
            diagonal = normal.diagonal(dim1=-2, dim2=-1)
            # Marquardt's scaling by the diagonal, and 1e-14 of its largest entry against rounding
            ridge = damping[..., None] * diagonal + 1e-14 * diagonal.amax(-1, keepdim=True)
            factor, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))
            # d = (J'J + damping diag J'J)^-1 J'r, subtracted below
            step = torch.cholesky_solve(jacobian @ rest[..., None], factor)
            there = found - step.reshape(found.shape)
            tried = target + terms.sums(weights, there) @ whitener
            value = tried.square().sum(-1)
            going = (cost.amin(1) > SOLVED) & (damping.amin(1) < _MOST)  # a victim stops when it would by itself
            kept = (value < cost) & (failed == 0) & going[:, None]
            found = torch.where(kept[..., None, None], there, found)
            rest, cost = torch.where(kept[..., None], tried, rest), torch.where(kept, value, cost)
            # damping / 3 after a step that is kept, times 4 after one that is not
            damping = (damping * torch.where(kept, _FALL, _RISE)).clamp_min(_LEAST)
            if not bool(going.any()):
                break
        return found, cost


def recombined(
    terms: Terms,
    weights: Tensors,
    regulariser: Tensor,
    whitener: Tensor,
    found: Float[Tensor, "victims starts points unknowns"],
    fresh: Float[Tensor, "victims starts surplus unknowns"],
    number: int,
) -> Float[Tensor, "victims starts points unknowns"]:
    """New starts: points picked from all starts' by orthogonal matching pursuit, and fresh ones beside them.

    The first start stays as it is; each other one picks from a random share of the points, so that they differ.

    Args:
        found: the best start first.
        number: of the round.
    """
    victims, starts, many, unknowns = found.shape
    size, unit = terms.size, torch.eye(unknowns - terms.size, dtype=found.dtype, device=found.device)
    points = found[..., :size].flatten(1, 2)
    each = torch.cat(
        [points.repeat_interleave(len(unit), 1), unit.repeat(len(points[0]), 1).expand(victims, -1, -1)], 2
    )
    gradients = terms.singly(weights, each) @ whitener
    gradients = gradients.reshape(victims, starts * many, len(unit), -1)
    size_of = gradients.square().sum((2, 3))
    draw = generator("stationary_mmd", "picks", number)
    # the first start picks from 60 % of all points, the last from 10 %
    share = torch.linspace(*PICKED, starts)[:, None]
    barred = (torch.rand(starts, starts * many, generator=draw) > share).to(found.device)
    target = -(regulariser[:, None] @ whitener)
    rest = target.expand(-1, starts, -1)
    picked = torch.zeros(victims, starts, 0, dtype=torch.long, device=found.device)
    elements = torch.arange(victims, device=found.device)[:, None, None]
    coefficients = rest[..., :0]
    for _ in range(many - fresh.shape[2]):
        # matching pursuit: <r, a>^2 / |a|^2 of each point's gradients a
        gain = torch.einsum("vpuk,vsk->vspu", gradients, rest).square().sum(-1) / size_of[:, None].clamp_min(1e-300)
        gain = gain.masked_fill(barred, -1.0).scatter(2, picked, -2.0)
        picked = torch.cat([picked, gain.argmax(-1, keepdim=True)], 2)
        # orthogonal: coefficients of all picked points are refitted, by their normal equations
        columns = gradients[elements, picked].flatten(2, 3)
        gram = columns @ columns.transpose(-1, -2)
        gram += torch.diag_embed(1e-12 * gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).expand(gram.shape[:-1]))
        coefficients, _ = torch.linalg.solve_ex(gram, (columns @ target[:, 0, :, None][:, None])[..., 0])
        # r = target - A c
        rest = target - (coefficients[..., None, :] @ columns)[..., 0, :]
    chosen = torch.cat([points[elements, picked], coefficients.reshape(*picked.shape, len(unit))], -1)
    made = torch.cat([chosen, fresh], 2)
    made[:, 0] = found[:, 0]
    return made


class Terms:
    """A point's term of the sum: the gradient of its logits, combined by its coefficients, at each victim's weights.

    The gradient of a cross-entropy with respect to the logits sums to zero, so a point has one coefficient fewer than
    there are classes: coordinates in an orthonormal basis of the rest.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], classes: int) -> None:
        self.shape, self.size = shape, math.prod(shape)
        # orthonormal basis of the vectors that sum to zero: QR of (1, e_1, e_2, ...), first column dropped
        ones = torch.ones(classes, 1, dtype=torch.float64)
        identity = torch.eye(classes, dtype=torch.float64)[:, : classes - 1]
        self.basis = torch.linalg.qr(torch.cat([ones, identity], dim=1)).Q[:, 1:]
        network = copy.deepcopy(network).eval()

        def logits(weights: Tensors, point: Tensor) -> Tensor:
            found: Tensor = functional_call(network, dict(weights), (point.reshape(1, *shape),))[0]
            return found

        def along(weights: Tensors, unknowns: Tensor) -> Tensor:
            point, coefficients = unknowns[: self.size], unknowns[self.size :]
            total: Tensor = coefficients @ (self.basis.to(point).T @ logits(weights, point))
            return total

        def one(weights: Tensors, unknowns: Tensor) -> Tensor:
            gradient: dict[str, Tensor] = grad(along)(weights, unknowns)
            return torch.cat([tensor.flatten() for tensor in gradient.values()])

        self._logits = vmap(vmap(logits, (None, 0)))
        self._one = vmap(vmap(vmap(one, (None, 0)), (None, 0)))
        self._jacobian = vmap(vmap(vmap(jacfwd(one, argnums=1), (None, 0)), (None, 0)))

    def logits(self, weights: Tensors, points: Tensor) -> Float[Tensor, "victims points classes"]:
        """The model's logits."""
        return self._logits(dict(weights), points)

    def sums(self, weights: Tensors, found: Tensor) -> Float[Tensor, "victims starts entries"]:
        """``Σ_m Σ_k c_mk ∇f_k(z_m)``."""
        return self._one(dict(weights), found).sum(2)

    def singly(self, weights: Tensors, unknowns: Tensor) -> Float[Tensor, "victims points entries"]:
        """Each point's own gradient."""
        gradients: Tensor = self._one(dict(weights), unknowns[:, None])
        return gradients[:, 0]

    def jacobian(self, weights: Tensors, found: Tensor) -> Float[Tensor, "victims starts unknowns entries"]:
        """Derivatives of `sums` with respect to each point's features and coefficients."""
        coefficients: Tensor = self._jacobian(dict(weights), found)
        return coefficients.transpose(-1, -2).flatten(2, 3)

    def directions(self, weights: Tensors, points: Tensor) -> Float[Tensor, "victims gradients entries"]:
        """The gradient of the logits along each basis vector at each point; all victims have the same points."""
        unit = torch.eye(self.basis.shape[1], dtype=points.dtype, device=points.device)
        both = torch.cat([points.repeat_interleave(len(unit), 0), unit.repeat(len(points), 1)], 1)
        return self.singly(weights, both.expand(len(next(iter(weights.values()))), *both.shape))


def regulariser_gradient(leak: Leak) -> dict[str, Float[Tensor, "victims *parameter"]]:
    """∇R at the trained weights: at a stationary point, minus the sum of the private examples' gradients.

    Raises:
        FedtapError: it is zero: the weights were never trained.
    """
    found = Regulariser.parse(leak.protocol.prior).gradient(leak.observed, leak.weights)
    idle = torch.stack([tensor.flatten(1).abs().amax(1) for tensor in found.values()]).amax(0) == 0
    if bool(idle.any()):
        raise FedtapError(
            f"The weights of client {int(leak.clients[idle.cpu()][0])} are at the minimum of {leak.protocol.prior}, "
            "so no example's gradient is in them and none can be found: let the client train."
        )
    return found


def flattened(tensors: Tensors) -> Float[Tensor, "victims entries"]:
    """All parameters' entries in a row."""
    return torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1)


def unexplainable(leak: Leak) -> Float[Tensor, "victims"]:
    """Share of ∇R, as a length, that no points in the number of the private examples explain; 0 tells nothing.

    An example's gradient in a linear layer is ``δ [a, 1]'``, of rank 1, so N of them have rank N at most, and what the
    best approximation of that rank leaves of ∇R is left (Eckart and Young 1936): weights that are no stationary point
    show it where N is below the layer's sizes.
    """
    regulariser = regulariser_gradient(leak)
    left = torch.zeros(len(leak), dtype=torch.float64, device=leak.device)
    for name, module in leak.network.named_modules():
        if isinstance(module, nn.Linear):
            parts = [regulariser[f"{name}.weight"]]
            if module.bias is not None:
                parts.append(regulariser[f"{name}.bias"][:, :, None])
            left += torch.linalg.svdvals(torch.cat(parts, dim=2))[:, leak.protocol.batch :].square().sum(1)
    return (left / flattened(regulariser).square().sum(1)).sqrt()


def _warn(leak: Leak, regulariser: Tensor) -> None:
    least = unexplainable(leak)
    for client, share in zip(leak.clients.tolist(), least.tolist(), strict=True):
        if share > STATIONARY_SHARE:
            warnings.warn(
                f"The weights of client {client} are no stationary point under {leak.protocol.prior}, since "
                f"{leak.protocol.batch} examples leave at least {share:.2g} of the regulariser's gradient "
                "unexplained: it has not trained to the end, or with another regulariser, or what it sent was rounded.",
                stacklevel=4,
            )


def _judged(leak: Leak, terms: Terms, weights: Tensors, found: Tensor, objective: Tensor) -> PseudoData:
    """Labels and weights from the coefficients: ``c = w (p - e_y)``; for max_margin, w is the coefficient itself."""
    points, coefficients = found[..., : terms.size], found[..., terms.size :] @ terms.basis.to(found).T
    # c = w (p - e_y) is negative at the label y alone
    label = coefficients.argmin(-1)
    weight = -coefficients.gather(-1, label[..., None])[..., 0]
    if Regulariser.parse(leak.protocol.prior).name != "max_margin":
        p = terms.logits(weights, points).softmax(-1)
        # c_y = -w (1 - p_y), so w = -c_y / (1 - p_y)
        missing = 1 - p.gather(-1, label[..., None])[..., 0]
        weight = weight / missing.clamp_min(1e-12)
    points = points.reshape(*points.shape[:2], *leak.protocol.shape)
    return PseudoData(points, label, weight.clamp_min(0), objective)
