"""Tell the examples of a batch apart in the gradient of a linear layer that a ReLU and another linear layer follow.

With D the gradients ``dL/dz`` of the examples, a column each, and X their inputs, a row each, the layer's gradient is
``G = D X``. Its column space, of basis U, holds ``d_i = U q_i``. A column is what the next layer sends back where the
unit is on, and zero where it is off:

    d_i = (W2' s_i) * [z_i > 0]        with s_i in the column space of the next layer's gradient, W2' s_i = B r_i

so each row j, a unit, gives an equation that is quadratic in q and r and linear in their products:

    (U_j q) (U_j q - B_j r) = 0

Where there are more units than products, b (b + 1) / 2 + b k with b examples and k columns of B, the solutions of
these equations are the linear combinations of the examples' own, ``sum_i c_i q_i q_i'``. Two of these matrices have the
q_i as generalised eigenvectors. So no search is needed: a union of two hyperplanes for each example, fitted as in
generalised principal component analysis (Vidal, Ma and Sastry 2005, https://arxiv.org/abs/1202.4002), all examples at
once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_OVERSAMPLED = 8
"""Columns beyond the batch that the search for the column space takes along, so that its noise shows."""

_POWERS = 4
"""Power iterations of that search; signal and noise are four orders of magnitude apart."""

_ABOVE_NOISE = 10
"""A singular value counts as signal from this many times the largest one of the noise."""

MOST_PRODUCTS = 2**13
"""Products of unknowns, at most: the float64 matrix of their normal equations takes 512 MiB."""

_MOST = 0.8
"""Share of the units whose equations an example fulfils; along several local steps it switches some on and off."""

_SHARPENINGS = 24
"""Halvings, at most, from a misfit to the noise."""

_PENCILS = 8
"""Pairs of matrices whose eigenvectors are computed; those of the best condition are taken."""

_GAP = 30.0
"""How far the smallest singular value that is not zero stands above the largest that is, where examples are told
apart."""

_ALIKE = 1 - 1e-6
"""Cosine from which two directions are one."""

INDEPENDENT = 1e-3
"""Smallest singular value of directions of length 1 that count as independent."""

_AT_ONCE = 2**24
"""Entries of a temporary tensor: 128 MiB of float64."""


@dataclass(frozen=True)
class ColumnSpace:
    """``[G, g] = U diag(s) V`` of the layer's weight and bias, and the next layer's B."""

    u: Float[Tensor, "units rank"]
    """Orthonormal basis of the column space."""
    s: Float[Tensor, "rank"]
    """Singular values, falling."""
    v: Float[Tensor, "rank inputs"]
    """Orthonormal basis of the row space; the last input is the constant 1 of the bias."""
    noise: float
    """The largest singular value that is none of the batch's."""
    back: Float[Tensor, "units next"]
    """B: what the next layer can send back."""

    def alive(self) -> ColumnSpace:
        """The same for the units that some example switches on: of the others all equations hold for every q."""
        size = self.u.norm(dim=1)
        # a row that is zero has the standard error noise / (s sqrt(units)) in each entry
        error = self.noise * self.s.reciprocal().norm() / len(self.u) ** 0.5
        on = size > torch.maximum(10 * error, 1e-6 * size.max())
        return dataclasses.replace(self, u=self.u[on], back=self.back[on])


def column_space(matrix: Float[Tensor, "units inputs"], batch: int, draw: torch.Generator) -> tuple[Tensor, ...]:
    """U, s, V of up to `batch` singular values above the noise, and the noise, by randomised subspace iteration."""
    width = min(batch + _OVERSAMPLED, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], width, generator=draw, dtype=matrix.dtype).to(matrix.device)
    basis = matrix @ sketch
    for _ in range(_POWERS):
        basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    least = torch.finfo(matrix.dtype).eps * max(matrix.shape) * s[0]
    noise = torch.maximum(s[batch], least) if len(s) > batch else least
    rank = int((s[:batch] > _ABOVE_NOISE * noise).sum())
    return (basis @ u)[:, :rank], s[:rank], v[:rank], noise


def solutions(space: ColumnSpace, rounds: int, draw: torch.Generator) -> Float[Tensor, "rank rank rank"] | None:
    """Matrices ``sum_i c_i q_i q_i'`` that solve the quadratic equations; None where these leave more than such sums.

    Args:
        rounds: how often the equations are solved, each time with less weight on those that hold less well: units that
            an example switches on in some of the local steps alone are outliers.
    """
    u, back, rank = space.u, space.back, space.u.shape[1]
    one, other = torch.triu_indices(rank, rank, device=u.device)
    if len(one) + rank * back.shape[1] > min(len(u), MOST_PRODUCTS):
        return None
    # rows (U_j q)^2 - (U_j q)(B_j r), in the products q_a q_b (a <= b) and q_a r_k
    equations = torch.cat([u[:, one] * u[:, other], -(u[:, :, None] * back[:, None]).flatten(1)], dim=1)
    equations = equations / (size := equations.norm(dim=0).clamp_min(1e-300))
    weights = torch.ones_like(equations[:, :1])
    for _ in range(rounds):
        values, null = _smallest(weights * equations, rank + 1, draw)
        weights = _trusted((equations @ null[:, :rank]).norm(dim=1, keepdim=True))
    if not float(values[rank]) > _GAP * float(values[rank - 1]) and rounds == 1:
        return None
    matrices = u.new_zeros(rank, rank, rank)
    # q_a q_b of a < b stands for two entries of the symmetric matrix
    matrices[:, one, other] = (null[:, :rank] / size[:, None])[: len(one)].T / 2
    return matrices + matrices.transpose(1, 2)


def _trusted(error: Tensor) -> Tensor:
    """Square roots of the weights ``1 / (1 + (error / scale)^2)``, the scale of a column three times its median."""
    scale = 3 * error.abs().median(0, keepdim=True).values.clamp_min(1e-300)
    return (1 + (error / scale).square()).rsqrt()


def _smallest(matrix: Tensor, many: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The smallest singular values, rising, and their right singular vectors as columns, by inverse iteration."""
    normal = matrix.T @ matrix
    size = normal.shape[0]
    many = min(many, size)
    # a trace of ridge keeps rounding from making it indefinite; vectors stay as they are
    shifted = normal + 1e-13 * normal.trace() / size * torch.eye(size, dtype=normal.dtype, device=normal.device)
    factor = torch.linalg.cholesky(shifted)
    found = torch.randn(size, min(many + _OVERSAMPLED, size), generator=draw, dtype=normal.dtype).to(normal.device)
    for _ in range(3 * _POWERS):
        found = torch.cholesky_solve(torch.linalg.qr(found).Q, factor)
    found = torch.linalg.qr(found).Q
    # singular values from the matrix itself, since the normal equations lose those below 1e-8
    _, values, mix = torch.linalg.svd(matrix @ found, full_matrices=False)
    return values.flip(0)[:many], (found @ mix.T).flip(1)[:, :many]


def told_apart(matrices: Float[Tensor, "rank rank rank"], draw: torch.Generator) -> Float[Tensor, "rank found"]:
    """Q of ``A_n = Q diag(c_n) Q'`` for all n, columns of length 1: eigenvectors of ``A B^-1`` for two random sums."""
    where, matrices, least = matrices, matrices.cpu(), float("inf")
    best = matrices[0, :, :0]
    for _ in range(_PENCILS):
        mix = torch.randn(2, len(matrices), generator=draw, dtype=matrices.dtype)
        a, b = torch.einsum("pn,nij->pij", mix, matrices)
        try:
            vectors = torch.linalg.eig(torch.linalg.solve(b, a, left=False)).eigenvectors
        except RuntimeError:  # a singular sum
            continue
        real = torch.nn.functional.normalize(vectors.real, dim=0)
        condition = float(torch.linalg.cond(real))
        if condition < least:
            best, least = real, condition
    return best.to(where)


def refitted(space: ColumnSpace, q: Float[Tensor, "rank found"], steps: int) -> tuple[Tensor, Tensor]:
    """Each direction after turns of telling which units are on and solving for (q, r); and its misfit.

    A row's equation is ``U_j q = 0`` of a unit that is off and ``U_j q = B_j r`` of one that is on, whichever is
    nearer; (q, r) is the least right singular vector of these rows, weighted so that outliers count little. The misfit
    is what remains on most of the rows, relative to the root mean square of U q: 0 of an example, large of a mixture.
    """
    parts = [_refitted(space, some, steps) for some in _chunks(q, _AT_ONCE // space.u.numel())]
    return torch.cat([directions for directions, _ in parts], 1), torch.cat([misfit for _, misfit in parts])


def _refitted(space: ColumnSpace, q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    u, back, rank = space.u, space.back, space.u.shape[1]
    on = (u @ q).abs() > (u @ q).square().mean(0).sqrt() / 2
    r = _sent_back(space, q, on)
    for step in range(steps):
        column, sent = u @ q, back @ r
        before, on = on, column.abs() > (column - sent).abs()
        if step > 2 and bool((on == before).all()):
            break
        weights = _trusted(torch.where(on, column - sent, column)).square()
        # rows [U_j, 0] of units that are off and [U_j, -B_j] of those that are on
        every, some = (each.T[:, :, None] for each in (weights, weights * on))
        whole, cross, square = u.T @ (every * u), -(u.T @ (some * back)), back.T @ (some * back)
        normal = torch.cat([torch.cat([whole, cross], 2), torch.cat([cross.transpose(1, 2), square], 2)], 1)
        least = torch.linalg.eigh(normal).eigenvectors[:, :, 0].T
        size = least[:rank].norm(dim=0).clamp_min(1e-300)
        q, r = least[:rank] / size, least[rank:] / size
    column = u @ q
    rest = torch.minimum(column.abs(), (column - back @ r).abs())
    most = rest.kthvalue(int(_MOST * (len(rest) - 1)) + 1, dim=0).values
    return q, (most / column.square().mean(0).sqrt()).nan_to_num(torch.inf)


def _sent_back(space: ColumnSpace, q: Tensor, on: Tensor) -> Float[Tensor, "next found"]:
    """r by least squares, ``B_j r = U_j q`` over the units that are on."""
    masks = on.T[:, :, None].to(space.u)
    normal = space.back.T @ (masks * space.back)
    normal.diagonal(dim1=1, dim2=2).add_(1e-12 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-300)
    right = torch.einsum("mk,sm,ms->sk", space.back, masks[:, :, 0], space.u @ q)
    solved: Tensor = torch.linalg.solve(normal, right[:, :, None])
    return solved[:, :, 0].T.nan_to_num(0.0, 0.0, 0.0)


def sparse_directions(
    space: ColumnSpace, starts: int, steps: int, draw: torch.Generator
) -> Float[Tensor, "rank starts"]:
    """Directions q with many zeros in U q, by iteratively reweighted least squares from random starts, all at once.

    ``w = 1 / ((U q)^2 + e^2)``, q the least eigenvector of ``U' diag(w) U``, e falling by a fifth a step (SPEAR looks
    for such directions in submatrices: Dimitrov et al. 2024, https://arxiv.org/abs/2403.03945).
    """
    u, rank = space.u, space.u.shape[1]
    starts = max(1, min(starts, _AT_ONCE // u.numel()))
    # a start is orthogonal to as many random rows as a direction can be
    rows = torch.stack([torch.randperm(len(u), generator=draw)[: rank - 1] for _ in range(starts)]).to(u.device)
    q = _least(u[rows].transpose(1, 2) @ u[rows])
    narrow = (u @ q).abs().quantile(0.3, dim=0)
    for _ in range(steps):
        weights = 1 / ((u @ q).square() + narrow.square() + 1e-300)
        weights = weights / weights.amax(0)
        q = _least(u.T @ (weights.T[:, :, None] * u))
        narrow = (narrow * 0.8).clamp_min(1e-9)
    return q


def _least(normal: Float[Tensor, "found rank rank"]) -> Float[Tensor, "rank found"]:
    vectors: Tensor = torch.linalg.eigh(normal).eigenvectors
    return vectors[:, :, 0].T


def _chunks(columns: Tensor, most: int) -> list[Tensor]:
    """The columns, at most so many at once."""
    return list(torch.split(columns, max(1, most), dim=1))


def sharpened(space: ColumnSpace, q: Float[Tensor, "rank found"], misfit: Tensor) -> Float[Tensor, "rank found"]:
    """Each direction by the units that are off alone, reweighted as in `sparse_directions`, from its misfit down to the
    noise: where the next layer's weights are not quite known, as along several local steps, zeros are exact still.
    """
    u = space.u
    narrow = misfit * (u @ q).square().mean(0).sqrt()
    for _ in range(_SHARPENINGS):
        column = u @ q
        error = _error(space, q)
        weights = 1 / (column.square() + torch.maximum(narrow, 3 * error).square())
        weights = weights / weights.amax(0)
        parts = _chunks(weights, _AT_ONCE // u.numel())
        q = torch.cat([_least(u.T @ (some.T[:, :, None] * u)) for some in parts], 1)
        if bool((narrow < 3 * error).all()):
            break
        narrow = narrow / 2
    return q


def _error(space: ColumnSpace, q: Float[Tensor, "rank found"]) -> Float[Tensor, "found"]:
    """The standard error of U_j q, or what rounding leaves."""
    noise = space.noise / space.s / len(space.u) ** 0.5
    spread = (q.square() * noise.square()[:, None]).sum(0).sqrt()
    return torch.maximum(spread, (space.u @ q).abs().amax(0) * 1e-9)


def not_zero(space: ColumnSpace, q: Float[Tensor, "rank found"]) -> Float[Tensor, "found"]:
    """Share of the units where U q is not zero to five standard errors; NaN of a direction that is not finite."""
    return torch.where(q.isfinite().all(0), ((space.u @ q).abs() > 5 * _error(space, q)).to(q).mean(0), torch.nan)


def independent(q: Float[Tensor, "rank found"], misfit: Float[Tensor, "found"]) -> tuple[Tensor, Tensor]:
    """Of all directions, those of least misfit that are independent, at most as many as the rank; and their misfit."""
    chosen: list[int] = []
    sound = misfit.isfinite() & q.isfinite().all(0)
    q, misfit = q[:, sound], misfit[sound]
    for number in misfit.argsort().tolist():
        if len(chosen) == len(q):
            break
        if chosen and float((q[:, chosen].T @ q[:, number]).abs().max()) > _ALIKE:
            continue
        if float(torch.linalg.svdvals(q[:, [*chosen, number]])[-1]) > INDEPENDENT:
            chosen.append(number)
    return q[:, chosen], misfit[chosen]
