"""One attention block as a function of its input, with its Jacobian in closed form, for many inputs at once.

With tokens x_i, normalised or not to u_i, the score of i on j in a head is ``s_ij = u_i^T W u_j + w^T u_j``, and

    P = softmax(s),  y_j = V^T u_j,  F_i = sum_j P_ij y_j
    dF_i/du_j = P_ij [ (y_j - F_i)(W^T u_i + w)^T + V^T ] + [i = j] sum_k P_ik (y_k - F_i)(W u_k)^T

(W = Q K^T, scaled where the scores are; w is what a bias of the queries leaves; one of the keys cancels in softmax.)
Heads stand side by side, or go through one linear layer; a residual branch adds x; LayerNorm is per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import jvp, vjp

from fedtap.attackers.parts.newton import conjugate_gradients
from fedtap.simulator.attack import Inputs, generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.attention import Attention, Patches

CG_STEPS = 300
"""Iterations of conjugate gradients in each step, at most."""

BlockInput = Float[Tensor, "elements n d"]
BlockOutput = Float[Tensor, "elements n m"]


@dataclass(frozen=True)
class Norm:
    """LayerNorm of a token; its Jacobian is ``diag(gain) (I - 1 1^T / d - z z^T / d) / std``, z standardised."""

    gain: Float[Tensor, "d"]
    """Factor of each of the d features; the layer's weight."""
    shift: Float[Tensor, "d"]
    """Summand of each of the d features; the layer's bias."""
    eps: float
    """Added to the variance before its root is taken."""

    def __call__(self, x: Float[Tensor, "*elements d"]) -> Float[Tensor, "*elements d"]:
        return self.standard(x)[0] * self.gain + self.shift

    def standard(
        self, x: Float[Tensor, "*elements d"]
    ) -> tuple[Float[Tensor, "*elements d"], Float[Tensor, "*elements 1"]]:
        """Tokens of mean 0 and variance 1, and the standard deviations that they had."""
        # z = (x - mean) / sqrt(variance + eps)
        centred = x - x.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred / std, std

    def jacobian(self, x: BlockInput) -> Float[Tensor, "elements n d d"]:
        """Of each token by itself."""
        z, std = self.standard(x)
        # (I - 1 1'/d - z z'/d) / std, with the gain on the left
        flat = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - 1 / x.shape[-1]
        inner = flat - z[..., :, None] * z[..., None, :] / x.shape[-1]
        return self.gain[:, None] * inner / std[..., None]


@dataclass(frozen=True)
class AttentionBlock:
    """An attention block as a function of its input, made of its weights, in float64."""

    bilinear: Float[Tensor, "heads d d"]
    """W = scale Q K^T of each head."""
    offset: Float[Tensor, "heads d"]
    """w of each head: what a bias of the queries adds to the scores."""
    value: Float[Tensor, "heads d columns"]
    """V of each head, from width d to the head's columns."""
    project: Float[Tensor, "both m"] | None
    """From the heads side by side (heads times columns) to the output; None leaves them side by side."""
    bias: Float[Tensor, "m"]
    """Added to each token's output."""
    residual: bool
    """Whether the input is added to the output."""
    before: Norm | None
    """LayerNorm of the attention's input, which the residual branch bypasses."""
    after: Norm | None
    """LayerNorm of the output, after the residual sum."""
    embed: tuple[Float[Tensor, "p d"], Float[Tensor, "n d"]] | None = None
    """Embedding of p input numbers into d features: a matrix, and a summand for each token. None: no embedding."""

    def __call__(self, x: BlockInput) -> BlockOutput:
        """The output."""
        x = self._embedded(x)
        return self._whole(x, self._heads(self.before(x) if self.before else x)[0])

    def _embedded(self, x: Float[Tensor, "elements n p"]) -> Float[Tensor, "elements n d"]:
        return x if self.embed is None else x @ self.embed[0] + self.embed[1]

    def _heads(self, u: BlockInput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The heads' outputs side by side; and of each head P, y and F."""
        # u_i' W u_j of each head
        scores = torch.einsum("lic,hcd,ljd->lhij", u, self.bilinear, u)
        # P = softmax(s), with the bias's share w' u_j added to the scores
        attends = (scores + torch.einsum("hc,ljc->lhj", self.offset, u)[:, :, None]).softmax(-1)
        # y_j = V' u_j
        values = torch.einsum("ljc,hcm->lhjm", u, self.value)
        # F_i = sum_j P_ij y_j
        mixed = attends @ values
        return mixed.transpose(1, 2).flatten(2), attends, values, mixed

    def _whole(self, x: Float[Tensor, "elements n d"], heads: Float[Tensor, "elements n both"]) -> BlockOutput:
        out = self._sum(x, heads)
        return self.after(out) if self.after else out

    def _sum(self, x: Float[Tensor, "elements n d"], heads: Float[Tensor, "elements n both"]) -> BlockOutput:
        out = (heads if self.project is None else heads @ self.project) + self.bias
        return out + x if self.residual else out

    def linearised(self, x: BlockInput) -> tuple[BlockOutput, Float[Tensor, "elements outputs inputs"]]:
        """The output and its Jacobian, by the equations above; both sides are flattened token by token."""
        given, x = x, self._embedded(x)
        u = self.before(x) if self.before else x
        inner = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)[None, None]  # of u_j on the input's token j
        whole = inner if self.embed is None else self.embed[0].mT[None, None]  # of x_j
        inner = self.before.jacobian(x) @ whole if self.before else whole
        heads, attends, values, mixed = self._heads(u)
        spread = attends[..., None] * (values[:, :, None] - mixed[:, :, :, None])  # P_ij (y_j - F_i)
        queries = torch.einsum("lic,hcd->lhid", u, self.bilinear) + self.offset[:, None]  # W^T u_i + w
        keys = torch.einsum("hcd,ljd->lhjc", self.bilinear, u)  # W u_k
        # [i = j] sum_k P_ik (y_k - F_i) (W u_k)'
        own = torch.einsum("lhikm,lhkc->lhimc", spread, keys) @ inner[:, None]
        query_bias = (queries[:, :, None] @ inner[:, None]).transpose(2, 3)  # elements heads i j q, or one j for all
        # elements heads i m j q, laid out as the output's tokens: i before heads
        elements, many, n, _, columns = spread.shape
        laid = x.new_empty(elements, n, many, columns, n, inner.shape[-1])
        jacobian = laid.transpose(1, 2)
        torch.mul(spread.transpose(-1, -2)[..., None], query_bias[:, :, :, None], out=jacobian)
        through_values = (self.value.mT[:, None] @ inner[:, None]).transpose(
            2, 3
        )  # elements heads m j q, or one for all
        # + P_ij V'
        jacobian.addcmul_(attends[:, :, :, None, :, None], through_values[:, :, None])
        # the term [i = j] is on the diagonal of output token and input token
        jacobian.diagonal(dim1=2, dim2=4).add_(own.permute(0, 1, 3, 4, 2))
        jacobian = laid.flatten(2, 3)  # elements i (heads m) j q
        if self.project is not None:
            jacobian = torch.einsum("lipjq,pm->limjq", jacobian, self.project)
        if self.residual:
            jacobian.diagonal(dim1=1, dim2=3).add_(whole[0, 0, :, :, None])
        if self.after:
            jacobian = torch.einsum("lipm,limjq->lipjq", self.after.jacobian(self._sum(x, heads)), jacobian)
        return self._whole(x, heads), jacobian.reshape(len(x), -1, given[0].numel())


def block_of(leak: Leak) -> AttentionBlock:
    """The block behind an attention leak, with the weights that were broadcast.

    Raises:
        FedtapError: the network is no attention block of `fedtap.simulator.models.attention`.
    """
    network, weights = leak.network, {name: tensor.double() for name, tensor in (leak.weights or {}).items()}
    attention = network if isinstance(network, Attention) else getattr(network, "attention", None)
    if not isinstance(attention, Attention):
        raise FedtapError(
            f"{leak.protocol.model} is no block of fedtap.simulator.models.attention, so its Jacobian is not "
            "known in closed form: attack the output of one that is."
        )
    prefix = "" if network is attention else "attention."

    def matrix(name: str) -> tuple[Tensor, Tensor | None]:
        return weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias")

    def norm(name: str, layer: nn.LayerNorm | None) -> Norm | None:
        return None if layer is None else Norm(*matrix(name), layer.eps)  # type: ignore[arg-type]

    (query, query_bias), (key, _), (value, shown) = (matrix(name) for name in ("query", "key", "value"))
    heads = attention.heads
    keys = key.unflatten(0, (heads, -1))  # type: ignore[no-untyped-call]
    project, bias = matrix("project") if attention.project is not None else (None, None)
    # rows of attention sum to 1, so that a bias of the values comes through as it is
    added = value.new_zeros(()) if shown is None else shown
    added = added if project is None else (added @ project.mT if added.ndim else added)
    added = added if bias is None else added + bias
    return AttentionBlock(
        # W = scale Q' K of each head: rows of Q and K are the head's columns
        bilinear=attention.scale * torch.einsum("hkc,hkd->hcd", query.unflatten(0, (heads, -1)), keys),  # type: ignore[no-untyped-call]
        # w = scale K' b_Q: (Q u_i + b_Q)' K u_j = u_i' Q'K u_j + (K' b_Q)' u_j
        offset=attention.scale * torch.einsum("hk,hkd->hd", _rows(query_bias, heads, keys), keys),
        value=value.unflatten(0, (heads, -1)).mT,  # type: ignore[no-untyped-call]
        project=None if project is None else project.mT,
        bias=added.expand(attention.width),
        residual=attention.residual,
        before=norm("before", attention.before),
        after=norm("after", attention.after),
        embed=(weights["embed.weight"].mT, weights["embed.bias"] + weights["position"])
        if isinstance(network, Patches)
        else None,
    )


def _rows(bias: Tensor | None, heads: int, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape[:2]) if bias is None else bias.unflatten(0, (heads, -1))  # type: ignore[no-untyped-call]


def nearest_embeddings(
    block: AttentionBlock, x: BlockInput, table: Float[Tensor, "vocabulary d"]
) -> Int[Tensor, "elements n"]:
    """Of each token's vector, the number of the nearest embedding, among what the block can tell apart."""
    table = table.to(x.dtype)
    if block.before and not block.residual:
        x, table = block.before.standard(x)[0], block.before.standard(table)[0]
    return torch.cdist(x, table).argmin(-1)


def begun(leak: Leak, seed: int) -> BlockInput:
    """A starting point for each entry, without knowing more than the leak.

    Where the input was added to the output, that output; before an embedding of pixels, grey; else normal numbers.
    Restarts after a victim's first add normal numbers to either, of standard deviation 1, and 0.25 for pixels.
    """
    names = zip(leak.clients.tolist(), leak.rounds.tolist(), leak.restarts.tolist(), strict=True)
    draws = [generator(seed, *name) for name in names]
    drawn = torch.stack([torch.randn(leak.protocol.shape, generator=draw, dtype=torch.float64) for draw in draws])
    drawn = drawn.to(leak.device)
    block, output = block_of(leak), leak.observed["output"].double()
    again = (leak.restarts > 0).to(drawn)[:, None, None]
    if block.embed is not None:
        # grey, and restarts around it by a quarter of the pixel range
        return 0.5 + 0.25 * again * drawn
    return output + again * drawn if block.residual else drawn


def float64_problem(leak: Leak, start: Tensor, starts: int) -> tuple[AttentionBlock, BlockOutput, BlockInput]:
    """The block, its observed output and the starting points, in float64; a victim's entry is repeated for each start.

    Raises:
        FedtapError: the start is not finite, or of another shape.
    """
    wanted = (len(leak) * starts, *leak.protocol.shape)
    if tuple(start.shape) != wanted:
        raise FedtapError(
            f"The start has shape {tuple(start.shape)}, and this leak needs {wanted}: give a start of that shape."
        )
    if not bool(start.isfinite().all()):
        raise FedtapError("The start holds NaN or infinity, from where no step leads anywhere: give finite numbers.")
    return block_of(leak), leak.observed["output"].double().repeat_interleave(starts, dim=0), start.double()


def lowest(
    starts: int,
    x: BlockInput,
    loss: Float[Tensor, "elements"],
    steps: Int[Tensor, "elements"],
    converged: Bool[Tensor, "elements"],
) -> Inputs:
    """Of each victim's starts, which stand in a row, the one that ended at the lowest loss."""
    which = loss.nan_to_num(nan=float("inf")).reshape(-1, starts).argmin(1)
    rows = torch.arange(len(which), device=x.device) * starts + which
    return Inputs(x[rows], loss[rows], steps[rows], converged[rows])


class Dense:
    """A block at some inputs, its Jacobian written out; steps by Cholesky's factors."""

    def __init__(self, block: AttentionBlock, x: BlockInput) -> None:
        self.out, self.jacobian = block.linearised(x)

    def times(self, v: Float[Tensor, "elements inputs"]) -> Float[Tensor, "elements outputs"]:
        """J v."""
        return (self.jacobian @ v[..., None])[..., 0]

    def transposed_times(self, r: Float[Tensor, "elements outputs"]) -> Float[Tensor, "elements inputs"]:
        """J^T r."""
        return (self.jacobian.mT @ r[..., None])[..., 0]

    def solve(
        self, right: Float[Tensor, "elements inputs"], added: Float[Tensor, "elements"]
    ) -> Float[Tensor, "elements inputs"]:
        """d of ``(J^T J + added) d = right``; NaN in elements where the matrix is singular."""
        # J'J + added I
        normal = self.jacobian.mT @ self.jacobian
        normal.diagonal(dim1=1, dim2=2).add_(added[:, None])
        factor, failed = torch.linalg.cholesky_ex(normal)
        found = torch.cholesky_solve(right[..., None], factor)[..., 0]
        return torch.where(failed[:, None] == 0, found, torch.nan)


class Products:
    """A block at some inputs, its Jacobian in products alone; steps by conjugate gradients."""

    def __init__(self, block: AttentionBlock, x: BlockInput) -> None:
        self.block, self.x = block, x
        self.out, self._transposed = vjp(block, x)  # type: ignore[misc]

    def times(self, v: Float[Tensor, "elements inputs"]) -> Float[Tensor, "elements outputs"]:
        """J v."""
        return jvp(self.block, (self.x,), (v.reshape(self.x.shape),))[1].flatten(1)  # type: ignore[no-any-return]

    def transposed_times(self, r: Float[Tensor, "elements outputs"]) -> Float[Tensor, "elements inputs"]:
        """J^T r."""
        return self._transposed(r.reshape(self.out.shape))[0].flatten(1)  # type: ignore[no-any-return]

    def solve(
        self, right: Float[Tensor, "elements inputs"], added: Float[Tensor, "elements"]
    ) -> Float[Tensor, "elements inputs"]:
        """d of ``(J^T J + added) d = right``, nearly."""
        return conjugate_gradients(lambda v: self.transposed_times(self.times(v)) + added[:, None] * v, right, CG_STEPS)
