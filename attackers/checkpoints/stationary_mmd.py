"""Training data from a trained model: weighted points whose gradients balance the regulariser's at the weights.

Wynne 2025, https://arxiv.org/abs/2507.18372, theorem 4.3: at a stationary point of ``R(θ) + Σ_n l(θ, x_n, y_n)`` the
private data are a zero of

    |∇R(θ) + Σ_m w_m ∇l(θ, z_m)|²,  w ≥ 0,

a squared MMD with the kernel <∇l(θ, z), ∇l(θ, z')>. With FedProx's R it is a federation's own leak: the server knows
the weights that it sent, the ones that come back, and μ. Haim et al. 2022, https://arxiv.org/abs/2206.07758, and
Buzaglo et al. 2023, https://arxiv.org/abs/2307.01827, are the case of homogeneous networks without regulariser.

Departs from the papers in six ways. Solved by Levenberg-Marquardt (Nocedal and Wright 2006, chapter 10), where they
use gradient descent. A point's unknowns are z and the slopes c of its logits, in which the sum is linear: for
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
from fedtap.simulator.leaks import Leak, Protocol, StationaryLeak, Tensors
from fedtap.simulator.models.regulariser import Regulariser
from fedtap.simulator.progress import progress

EXPLAINED = 1e-5
"""Share of ∇R left over, as a length, up to which the points explain the weights."""

SOLVED, ENDED = 1e-22, 1e-12
"""Squared share of the whitened ∇R left over at which a round ends, and one at whose end no further one is needed."""

PICKED = (0.6, 0.1)
"""Share of all starts' points that a new start may pick from: the first start's, the last's, and evenly between."""

GIVE, TAKE, LEAST, MOST = 1 / 3, 4.0, 1e-15, 1e10
"""The damping's change after a step that is kept, after one that is not, its least, and where a lane is stuck."""

MOST_ENTRIES = 2**29
"""Of the Jacobians of all victims and starts, at most."""

FAINTEST = 1e-7
"""Singular value of the made-up gradients, as a share of the largest, below which a direction is left out."""


@dataclass(frozen=True)
class StationaryMMD(Attack[PseudoData]):
    """Levenberg-Marquardt on the whitened residual, from several starts that are recombined; the lowest is kept.

    The objective is the plain residual, ``|∇R + sum|² / |∇R|²``.

    Args:
        restarts: starts of each victim.
        rounds: times that they are solved, and recombined between.
        steps: of each start in a round, at most.
        surplus: points sought for each private example.
        faint: of starting slopes, against points drawn from N(0, 1).
        whiten: added to the variances of the made-up gradients, as a share of the largest, before they are divided
            by; the larger, the less is whitened.
        inputs: made-up inputs, drawn from N(0, 1), at least.
    """

    leaks = (StationaryLeak,)
    guesses = PseudoData

    restarts: int = 16
    rounds: int = 6
    steps: int = 40
    surplus: float = 1.2
    faint: float = 0.05
    whiten: float = 1e-3
    inputs: int = 400

    def __post_init__(self) -> None:
        check_fields(self, restarts=1, rounds=1, steps=1, surplus=1, inputs=2)

    @property
    def starts(self) -> int:
        """As many as there are restarts."""
        return self.restarts

    def accepts(self, leak: Leak) -> None:
        """Classifiers, with a regulariser that is known."""
        super().accepts(leak)
        Regulariser.parse(leak.protocol.prior)
        if leak.protocol.classes < 2:
            raise FedtapError(
                "stationary_mmd reads labels and weights off the slopes of a cross-entropy, and a model with "
                f"{leak.protocol.classes} output has none: use one with two classes."
            )

        entries = sum(parameter.numel() for parameter in leak.network.parameters())
        self.check_size(len(leak), leak.protocol, entries)

    def check_size(self, victims: int, protocol: Protocol, entries: int) -> None:
        """Refuse what would fill the memory.

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
        """N(0, 1) for the points, and as much smaller for the slopes as the attack says."""
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
        slope, weights = flat(pull(leak)), {name: tensor.double() for name, tensor in leak.observed.items()}
        _warn(leak, slope)
        terms = Terms(leak.network, leak.protocol.shape, leak.protocol.classes)
        start = start.reshape(len(leak), self.starts, *start.shape[1:])
        draw = generator("stationary_mmd", "inputs")
        made_up = torch.randn(max(self.inputs, 2 * start[0, 0].numel()), terms.size, generator=draw, dtype=start.dtype)
        whitener = self._whitener(terms, weights, made_up.to(start.device))
        whitener = whitener / (slope[:, None] @ whitener).norm(dim=-1, keepdim=True)
        found, active = start.clone(), torch.arange(len(leak), device=start.device)
        for number in range(self.rounds):
            own = {name: tensor[active] for name, tensor in weights.items()}
            here = found[active]
            if number:
                fresh = start[active].roll(number, 1)[:, :, leak.protocol.batch :]
                here = recombined(terms, own, slope[active], whitener[active], here, fresh, number)
            here, cost = self._solve(terms, own, slope[active], whitener[active], here)
            order = cost.argsort(1)
            found[active] = here.gather(1, order[..., None, None].expand_as(here))  # the best first
            active = active[cost.amin(1) > ENDED]
            if not len(active):
                break
        found = found[:, 0]
        rest = slope + terms.sums(weights, found[:, None])[:, 0]
        return _judged(leak, terms, weights, found, rest.square().sum(1) / slope.square().sum(1))

    def _whitener(self, terms: Terms, weights: Tensors, inputs: Tensor) -> Float[Tensor, "victims entries directions"]:
        """``V (S² + whiten s_1²)^-½``, with S V the made-up gradients' root mean squares and their directions."""
        rows = terms.directions(weights, inputs) / math.sqrt(len(inputs))
        _, spread, across = torch.linalg.svd(rows, full_matrices=False)
        largest = spread[:, :1]
        scale: Tensor = torch.where(spread > FAINTEST * largest, (spread**2 + self.whiten * largest**2).rsqrt(), 0.0)
        divided: Tensor = across * scale[:, :, None]
        return divided.transpose(1, 2)

    def _solve(
        self, terms: Terms, weights: Tensors, slope: Tensor, whitener: Tensor, found: Tensor
    ) -> tuple[Tensor, Float[Tensor, "victims starts"]]:
        """Lower ``|(slope + sum) W|²`` for each victim and start by ``(J'J + damping diag J'J) d = -J'r``."""
        target = slope[:, None] @ whitener
        rest = target + terms.sums(weights, found) @ whitener
        cost = rest.square().sum(-1).nan_to_num(torch.inf)
        damping = torch.full_like(cost, 0.1)
        for _ in progress(self.steps, "stationary_mmd"):
            jacobian = terms.jacobian(weights, found)
            jacobian = (jacobian.flatten(1, 2) @ whitener).reshape(*found.shape[:2], -1, whitener.shape[2])
            normal = jacobian @ jacobian.transpose(-1, -2)
            diagonal = normal.diagonal(dim1=-2, dim2=-1)
            ridge = damping[..., None] * diagonal + 1e-14 * diagonal.amax(-1, keepdim=True)
            factor, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))
            step = torch.cholesky_solve(jacobian @ rest[..., None], factor)
            there = found - step.reshape(found.shape)
            tried = target + terms.sums(weights, there) @ whitener
            value = tried.square().sum(-1)
            going = (cost.amin(1) > SOLVED) & (damping.amin(1) < MOST)  # a victim stops when it would by itself
            kept = (value < cost) & (failed == 0) & going[:, None]
            found = torch.where(kept[..., None, None], there, found)
            rest, cost = torch.where(kept[..., None], tried, rest), torch.where(kept, value, cost)
            damping = (damping * torch.where(kept, GIVE, TAKE)).clamp_min(LEAST)
            if not bool(going.any()):
                break
        return found, cost


def recombined(
    terms: Terms,
    weights: Tensors,
    slope: Tensor,
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
    pulls = terms.singly(weights, each) @ whitener
    pulls = pulls.reshape(victims, starts * many, len(unit), -1)
    size_of = pulls.square().sum((2, 3))
    draw = generator("stationary_mmd", "picks", number)
    share = torch.linspace(*PICKED, starts)[:, None]
    barred = (torch.rand(starts, starts * many, generator=draw) > share).to(found.device)
    target = -(slope[:, None] @ whitener)
    rest = target.expand(-1, starts, -1)
    picked = torch.zeros(victims, starts, 0, dtype=torch.long, device=found.device)
    lanes = torch.arange(victims, device=found.device)[:, None, None]
    slopes = rest[..., :0]
    for _ in range(many - fresh.shape[2]):
        gain = torch.einsum("vpuk,vsk->vspu", pulls, rest).square().sum(-1) / size_of[:, None].clamp_min(1e-300)
        gain = gain.masked_fill(barred, -1.0).scatter(2, picked, -2.0)
        picked = torch.cat([picked, gain.argmax(-1, keepdim=True)], 2)
        columns = pulls[lanes, picked].flatten(2, 3)
        gram = columns @ columns.transpose(-1, -2)
        gram += torch.diag_embed(1e-12 * gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).expand(gram.shape[:-1]))
        slopes, _ = torch.linalg.solve_ex(gram, (columns @ target[:, 0, :, None][:, None])[..., 0])
        rest = target - (slopes[..., None, :] @ columns)[..., 0, :]
    chosen = torch.cat([points[lanes, picked], slopes.reshape(*picked.shape, len(unit))], -1)
    made = torch.cat([chosen, fresh], 2)
    made[:, 0] = found[:, 0]
    return made


class Terms:
    """A point's pull at the weights: the gradient of its logits, along its slopes, for each lane of victims' weights.

    Slopes of a cross-entropy's logits sum to zero, so a point has one fewer than there are classes: coordinates in an
    orthonormal basis of what is left.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], classes: int) -> None:
        self.shape, self.size = shape, math.prod(shape)
        ones = torch.ones(classes, 1, dtype=torch.float64)
        identity = torch.eye(classes, dtype=torch.float64)[:, : classes - 1]
        self.basis = torch.linalg.qr(torch.cat([ones, identity], dim=1)).Q[:, 1:]
        network = copy.deepcopy(network).eval()

        def logits(weights: Tensors, point: Tensor) -> Tensor:
            answered: Tensor = functional_call(network, dict(weights), (point.reshape(1, *shape),))[0]
            return answered

        def along(weights: Tensors, unknowns: Tensor) -> Tensor:
            point, slopes = unknowns[: self.size], unknowns[self.size :]
            total: Tensor = slopes @ (self.basis.to(point).T @ logits(weights, point))
            return total

        def one(weights: Tensors, unknowns: Tensor) -> Tensor:
            gradient: dict[str, Tensor] = grad(along)(weights, unknowns)
            return torch.cat([tensor.flatten() for tensor in gradient.values()])

        self._logits = vmap(vmap(logits, (None, 0)))
        self._one = vmap(vmap(vmap(one, (None, 0)), (None, 0)))
        self._jacobian = vmap(vmap(vmap(jacfwd(one, argnums=1), (None, 0)), (None, 0)))

    def logits(self, weights: Tensors, points: Tensor) -> Float[Tensor, "victims points classes"]:
        """The model's answers."""
        return self._logits(dict(weights), points)

    def sums(self, weights: Tensors, found: Tensor) -> Float[Tensor, "victims starts entries"]:
        """``Σ_m Σ_k c_mk ∇f_k(z_m)``."""
        return self._one(dict(weights), found).sum(2)

    def singly(self, weights: Tensors, unknowns: Tensor) -> Float[Tensor, "victims points entries"]:
        """Each point's pull by itself."""
        pulls: Tensor = self._one(dict(weights), unknowns[:, None])
        return pulls[:, 0]

    def jacobian(self, weights: Tensors, found: Tensor) -> Float[Tensor, "victims starts unknowns entries"]:
        """Its derivatives by each point's features and slopes."""
        slopes: Tensor = self._jacobian(dict(weights), found)
        return slopes.transpose(-1, -2).flatten(2, 3)

    def directions(self, weights: Tensors, points: Tensor) -> Float[Tensor, "victims gradients entries"]:
        """The gradient of each basis slope's logit at each point; the points are the same for all victims."""
        unit = torch.eye(self.basis.shape[1], dtype=points.dtype, device=points.device)
        both = torch.cat([points.repeat_interleave(len(unit), 0), unit.repeat(len(points), 1)], 1)
        return self.singly(weights, both.expand(len(next(iter(weights.values()))), *both.shape))


def pull(leak: Leak) -> dict[str, Float[Tensor, "victims *parameter"]]:
    """∇R at the trained weights, which minus the examples' gradients would equal.

    Raises:
        FedtapError: it is zero: the weights were never trained.
    """
    found = Regulariser.parse(leak.protocol.prior).slope(leak.observed, leak.weights)
    idle = torch.stack([tensor.flatten(1).abs().amax(1) for tensor in found.values()]).amax(0) == 0
    if bool(idle.any()):
        raise FedtapError(
            f"The weights of client {int(leak.clients[idle.cpu()][0])} are where {leak.protocol.prior} pulls them, so "
            "no example pulls at them and none can be found: let the client train."
        )
    return found


def flat(tensors: Tensors) -> Float[Tensor, "victims entries"]:
    """All parameters' entries in a row."""
    return torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1)


def unexplainable(leak: Leak) -> Float[Tensor, "victims"]:
    """Share of ∇R, as a length, that no points in the number of the private examples explain; 0 tells nothing.

    An example's gradient in a linear layer is ``δ [a, 1]'``, of rank 1, so N of them have rank N at most, and what the
    best approximation of that rank leaves of ∇R is left (Eckart and Young 1936): weights that are no stationary point
    show it where N is below the layer's sizes.
    """
    slope = pull(leak)
    left = torch.zeros(len(leak), dtype=torch.float64, device=leak.device)
    for name, module in leak.network.named_modules():
        if isinstance(module, nn.Linear):
            parts = [slope[f"{name}.weight"]]
            if module.bias is not None:
                parts.append(slope[f"{name}.bias"][:, :, None])
            left += torch.linalg.svdvals(torch.cat(parts, dim=2))[:, leak.protocol.batch :].square().sum(1)
    return (left / flat(slope).square().sum(1)).sqrt()


def _warn(leak: Leak, slope: Tensor) -> None:
    least = unexplainable(leak)
    for client, share in zip(leak.clients.tolist(), least.tolist(), strict=True):
        if share > EXPLAINED:
            warnings.warn(
                f"The weights of client {client} are no stationary point under {leak.protocol.prior}, since "
                f"{leak.protocol.batch} examples leave at least {share:.2g} of the regulariser's pull unexplained: it "
                "has not trained to the end, or with another regulariser, or what it sent was rounded.",
                stacklevel=4,
            )


def _judged(leak: Leak, terms: Terms, weights: Tensors, found: Tensor, objective: Tensor) -> PseudoData:
    """Labels and weights from the slopes: ``c = w (p - e_y)``, or ``w`` times the margin's where that is the loss."""
    points, slopes = found[..., : terms.size], found[..., terms.size :] @ terms.basis.to(found).T
    label = slopes.argmin(-1)
    weight = -slopes.gather(-1, label[..., None])[..., 0]
    if Regulariser.parse(leak.protocol.prior).name != "max_margin":
        answered = terms.logits(weights, points).softmax(-1)
        missing = 1 - answered.gather(-1, label[..., None])[..., 0]
        weight = weight / missing.clamp_min(1e-12)
    points = points.reshape(*points.shape[:2], *leak.protocol.shape)
    return PseudoData(points, label, weight.clamp_min(0), objective)
