"""DAGER: read texts off the gradient of the query projections, token by token, exactly.

Petrov, Dimitrov, Baader, Müller and Vechev, NeurIPS 2024. https://arxiv.org/abs/2405.15586
Departs from the paper in four ways: the span's rank is where singular values leave the noise's, which the values beyond
the number of tokens tell; a place keeps the tokens that are far nearer to the span than the vocabulary's median, where
the paper has one fixed threshold; a GPT's texts are kept as a beam of the nearest, without a threshold; and an
encoder's texts are found by exchanging one token after the other, where the paper tries combinations.

The gradient of a projection's weights is ``G = sum_n d_n x_n'`` over the batch's tokens n, with x_n what the projection
was fed. So the rows of G span the x_n, if there are fewer tokens than x has dimensions, and a token is in the batch if
what the projection would have been fed for it lies in that span. In the first block that depends on token and place
alone, so the whole vocabulary can be tried; in the second on the other tokens of the text, which tells them apart.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedtap.attackers.parts.checks import check_fields, check_magnitudes
from fedtap.simulator.attack import Attack, Tokens, generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak
from fedtap.simulator.models.language import LanguageModel, TransformerBlock

PAIRS_AT_ONCE = 2**14
"""Pairs of a text's beginning and a token that go through a block at once, to bound memory."""


@dataclass(frozen=True)
class Read(Tokens):
    """Texts, and what the first block left to choose from."""

    candidates: Float[Tensor, "victims"]
    """Tokens that pass the first block's test at a place, mean over places."""
    rank: Int[Tensor, "victims"]
    """Dimensions of the first block's span: an upper bound on the different tokens that it can tell from noise."""


@dataclass(frozen=True)
class DAGER(Attack[Tokens]):
    """Tokens by the first block's span, texts by the second's.

    The objective is the mean relative distance of a text's tokens from the second block's span.
    """

    leaks = (GradientLeak,)
    reconstructs = Tokens

    closeness: float = 0.25
    """Distance up to which a token is a candidate at a place, as a share of the vocabulary's median there."""
    sweeps: int = 12
    """Passes over the places of an encoder's text."""
    rounds: int = 4
    """Restarts of an encoder's search, each from tokens that are in no text found so far."""

    @classmethod
    def suits(cls, leak: Leak) -> bool:
        """What a language model learned from."""
        return isinstance(leak, GradientLeak | UpdateLeak) and isinstance(leak.network, LanguageModel)

    def __post_init__(self) -> None:
        check_fields(self, closeness=1e-6, sweeps=1, rounds=1)

    def begin(self, leak: Leak, seed: int) -> Tensor:
        """Of each round, text and place, which of the tokens there an encoder's text is begun with: U(0, 1)."""
        names = zip(leak.clients.tolist(), leak.rounds.tolist(), leak.restarts.tolist(), strict=True)
        shape = (self.rounds, leak.protocol.batch, leak.protocol.shape[0] + 2)
        return torch.stack([torch.rand(shape, generator=generator(seed, *name)) for name in names])

    def accepts(self, leak: Leak) -> None:
        """Language models of two blocks or more, and fewer tokens than they are wide."""
        super().accepts(leak)
        net = leak.network
        if not isinstance(net, LanguageModel) or len(net.blocks) < 2:
            raise FedtapError(
                f"dager reads texts off two blocks' query projections, and {leak.protocol.model!r} has none: "
                "use it on a language model, as in `fedtap run text_gradients`."
            )
        check_magnitudes(self, leak)
        if leak.protocol.weight_decay:
            raise FedtapError(
                "Weight decay adds the weights to the gradient, which then spans more than the texts, and dager goes "
                "by what it spans: ask for clients without it."
            )
        if leak.stacked:
            raise FedtapError("dager goes through the vocabulary once, at one model: give it victims of one round.")
        if (tokens := fed_once(net, leak.protocol.batch)[1]) >= net.width:
            raise FedtapError(
                f"The batch feeds the query projection {tokens} tokens, which span all of its {net.width} dimensions, "
                "so that every token seems to be in it: lower --batch or --tokens, or raise --width."
            )

    def reconstruct(self, leak: Leak, start: Tensor) -> Read:
        net, batch = leaked_model(leak), leak.protocol.batch
        first, second = (
            Span.of(leak.observed[f"blocks.{number}.query.weight"], most)
            for number, most in enumerate(fed_once(net, batch))
        )
        with torch.no_grad():
            near = distances(net, first)
            ids, allowed = candidate_tokens(near, self.closeness, batch)
            count = 1 + PAIRS_AT_ONCE // (batch * ids.shape[2])
            parts = []
            for some in torch.split(torch.arange(len(leak), device=ids.device), count):
                block = Second(net, second[some], ids[some], allowed[some])
                parts.append(block.causal(batch) if net.causal else block.both_ways(start[some], self.sweeps))
        texts, objective = (torch.cat(side) for side in zip(*parts, strict=True))
        inside = allowed[:, 1:-1] if not net.causal else allowed[:, 1:]
        return Read(texts, objective, inside.sum(2).double().mean(1), first.rank)


def fed_once(net: LanguageModel, batch: int) -> tuple[int, int]:
    """Tokens, at most, that have a gradient in the first block's query projection, and in the second's.

    The first place of causal attention looks at itself alone, whatever its query, so its gradient is zero; a mark is
    fed to the first block the same in each text.
    """
    if net.causal:
        return batch * (net.places - 1), batch * (net.places - 1)
    return batch * (net.places - 2) + 2, batch * net.places


def leaked_model(leak: Leak) -> LanguageModel:
    """The victims' model, as it was sent to them."""
    net = copy.deepcopy(leak.network).to_empty(device=leak.device)
    assert isinstance(net, LanguageModel)
    net.load_state_dict({**(leak.weights or {}), **leak.buffers})
    return net.requires_grad_(False)


@dataclass(frozen=True)
class Span:
    """What each victim's gradient spans: orthonormal columns, zero beyond the rank."""

    basis: Float[Tensor, "victims width most"]
    """Orthonormal columns that span the inputs; zero beyond the rank."""
    rank: Int[Tensor, "victims"]
    """Dimensions of the span."""

    @staticmethod
    def of(gradient: Float[Tensor, "victims outputs width"], most: int) -> Span:
        """Of the gradient's rows, as far as they stand out of the noise.

        A gradient of `most` tokens has as many singular values at most, so all others are noise, from rounding or a
        defence: they tell its standard error s, and ``s (sqrt(outputs) + sqrt(width))`` is where noise alone ends.
        Of fewer tokens, a little noise is kept, which does less harm than to lose a token's direction.
        """
        _, values, rows = torch.linalg.svd(gradient.double(), full_matrices=False)
        _, outputs, width = gradient.shape
        # s^2 from the singular values beyond the tokens' number
        noise = values[:, most:].square().sum(1).div((outputs - most) * (width - most)).sqrt()
        # largest singular value of an outputs x width matrix of noise s (Geman 1980), and rounding
        edge = noise * (outputs**0.5 + width**0.5) + values[:, 0] * width * torch.finfo(torch.float64).eps
        kept = values[:, :most] > edge[:, None]
        basis = (rows[:, :most] * kept[:, :, None]).transpose(1, 2).contiguous()
        return Span(basis.to(gradient.dtype), kept.sum(1))

    def __getitem__(self, some: Tensor) -> Span:
        return Span(self.basis[some], self.rank[some])

    def distance(self, fed: Float[Tensor, "victims *batch width"]) -> Float[Tensor, "victims *batch"]:
        """Of each vector from its victim's span, as a share of its length: in [0, 1]."""
        flat = fed.flatten(1, -2)
        # x - B B'x
        apart = flat - flat @ self.basis @ self.basis.transpose(1, 2)
        lengths = flat.square().sum(-1).clamp_min(1e-30)
        share = (apart.square().sum(-1) / lengths).sqrt()
        return share.view(fed.shape[:-1])


def distances(net: LanguageModel, span: Span) -> Float[Tensor, "victims vocabulary places"]:
    """How far from the span the first block would be fed each token at each place, as `Span.distance`; to about 1e-3.

    What is fed is ``g (t + p) / s + b``, with t and p the embeddings of token and place less their means, s the
    standard deviation of their sum, g and b the normalisation's. With N the projection off the span,

        |N (g t + g p + s b)|^2 = |N g t|^2 + |N g p|^2 + s^2 |N b|^2 + 2 g t.N g p + 2 s g t.N b + 2 s g p.N b

    so that the vocabulary is projected once, and not once for each place.
    """
    norm = net.first_norm
    t, p = (part - part.mean(1, keepdim=True) for part in (net.embedding, net.position))
    # s^2 = |t + p|^2 / width + eps: means are taken off already
    s = ((t.square().sum(1)[:, None] + p.square().sum(1) + 2 * t @ p.T) / net.width + norm.eps).sqrt()
    t, p, b = t * norm.weight, p * norm.weight, norm.bias
    length = (t.square().sum(1)[:, None] + p.square().sum(1) + s.square() * b.square().sum()) + 2 * (
        t @ p.T + s * ((t @ b)[:, None] + p @ b)
    )
    found = []
    for basis in span.basis:  # a vocabulary's worth of memory for each
        p_off, b_off = p - p @ basis @ basis.T, b - basis @ (basis.T @ b)
        off = (t.square().sum(1) - (t @ basis).square().sum(1))[:, None] + p_off.square().sum(1)
        off = off + s.square() * b_off.square().sum()
        off = off + 2 * (t @ p_off.T + s * ((t @ b_off)[:, None] + p @ b_off))
        found.append((off.clamp_min(0) / length).sqrt())
    return torch.stack(found)


def candidate_tokens(
    near: Float[Tensor, "victims vocabulary places"], closeness: float, batch: int
) -> tuple[Int[Tensor, "victims places tokens"], Bool[Tensor, "victims places tokens"]]:
    """Which tokens may be at each place, the nearest first, and which of those that fill the rows are allowed.

    Those within `closeness` of the median's distance, and at least as many as there are texts.
    """
    # most of the vocabulary is not in the batch, so its median distance is that of a wrong token
    limit = closeness * near.median(1).values
    most = max(int((near <= limit[:, None]).sum(1).max()), min(batch, near.shape[1]))
    by_distance = near.topk(most, dim=1, largest=False)
    counted = torch.arange(most, device=near.device)[:, None] < batch
    return by_distance.indices.transpose(1, 2), ((by_distance.values <= limit[:, None]) | counted).transpose(1, 2)


class Second:
    """The second block's test: what it is fed depends on all tokens that a text's token looks at.

    Args:
        span: of its query projection's gradient.
        ids: which tokens may be at each place; those of `allowed` count.
    """

    def __init__(
        self,
        net: LanguageModel,
        span: Span,
        ids: Int[Tensor, "victims places tokens"],
        allowed: Bool[Tensor, "victims places tokens"],
    ) -> None:
        first, second = net.blocks[0], net.blocks[1]
        assert isinstance(first, TransformerBlock)
        assert isinstance(second, TransformerBlock)
        self.first, self.second, self.span, self.ids, self.allowed = first, second, span, ids, allowed
        ids[:, 0], allowed[:, 0] = net.start, False
        allowed[:, 0, 0] = True
        if not net.causal:
            ids[:, -1], allowed[:, -1] = net.end, False
            allowed[:, -1, 0] = True
        places = torch.arange(net.places, device=ids.device)[None, :, None].expand_as(ids)
        self.hidden = net.embedded(ids, places)
        self.query, self.key, self.value = first.projected(self.hidden)  # victims places tokens heads size

    def _apart(
        self,
        victims: Int[Tensor, "elements"],
        hidden: Float[Tensor, "elements tries width"],
        query: Float[Tensor, "elements tries heads size"],
        seen: tuple[Tensor, Tensor],
        tried: tuple[Tensor, Tensor],
        place: int,
    ) -> Float[Tensor, "elements tries"]:
        """How far what the second block is fed is from the span, for each token that is tried at a place.

        Args:
            hidden: of the token that looks, whose `query` it is.
            seen: keys and values of an element's text, `elements places heads size`.
            tried: those of the tokens that are tried in the text at `place`, `elements tries heads size`.
        """
        # q_i'k_j / sqrt(size)
        scores = torch.einsum("lchs,lnhs->lchn", query, seen[0])
        scores[..., place] = (query * tried[0]).sum(-1)
        shares = (scores * query.shape[-1] ** -0.5).softmax(-1)
        own = shares[..., place, None].clone()
        shares[..., place] = 0
        mixed = torch.einsum("lchn,lnhs->lchs", shares, seen[1]) + own * tried[1]
        fed = self.second.queried(self.first.finished(hidden, mixed.flatten(2)))
        return self.span[victims].distance(fed)

    def _of(self, part: Tensor, victims: Int[Tensor, "elements"], state: Int[Tensor, "elements places"]) -> Tensor:
        """Of each element's text, the chosen tokens' part."""
        return part[victims[:, None], torch.arange(state.shape[1], device=state.device), state]

    def causal(self, batch: int) -> tuple[Int[Tensor, "victims batch tokens"], Float[Tensor, "victims"]]:
        """The `batch` texts whose tokens are nearest to the span: all are built from the start at once.

        Whether a beginning is right does not depend on the other texts, and there are at most `batch` right ones: the
        `batch` nearest are kept.
        """
        count, places, tokens = self.ids.shape
        device = self.ids.device
        victims, state = torch.arange(count, device=device), self.ids.new_zeros(count, 1)  # one element each, the start
        sums = self.hidden.new_zeros(count)
        for place in range(1, places):
            seen = [self._of(part, victims, state) for part in (self.key, self.value)]
            seen = [torch.cat([part, part[:, :1]], 1) for part in seen]  # its last place is that which is tried
            parts = [part[victims, place] for part in (self.hidden, self.query, self.key, self.value)]
            apart = self._apart(victims, parts[0], parts[1], (seen[0], seen[1]), (parts[2], parts[3]), place)
            total = (sums[:, None] + apart).masked_fill(~self.allowed[victims, place], torch.inf)
            total = total.view(count, -1)
            best = total.topk(min(batch, total.shape[1]), dim=1, largest=False)
            elements = (
                best.indices // tokens + len(state) // count * torch.arange(count, device=device)[:, None]
            ).flatten()
            state = torch.cat([state[elements], (best.indices % tokens).view(-1, 1)], 1)
            victims, sums = victims[elements], best.values.flatten()
        texts = self._of(self.ids, victims, state)[:, 1:].view(count, -1, places - 1)
        sums = sums.view(count, -1).nan_to_num(posinf=places - 1.0)
        kept = torch.arange(batch, device=device) % texts.shape[1]  # where there are fewer, they are repeated
        return texts[:, kept], sums[:, kept].mean(1) / (places - 1)

    def both_ways(
        self, start: Float[Tensor, "victims rounds batch places"], sweeps: int
    ) -> tuple[Int[Tensor, "victims batch tokens"], Float[Tensor, "victims"]]:
        """Texts of which each token is nearer to the span than any that could be in its place.

        Each is begun with tokens at random, and gone through from place to place, where the token is taken with which
        the text's tokens there and at one other place, another one each time, are nearest. A text is sure if no other
        token comes near at any place. What is in a sure text is left out of those that are begun afterwards, until
        their last two sweeps.
        """
        count, rounds, batch, places = start.shape
        device = self.ids.device
        owners = torch.arange(count, device=device)[:, None].expand(-1, batch)
        victims = owners.flatten()  # an element for each text that is begun
        texts = self.ids.new_zeros(count, 0, places)
        apart = self.hidden.new_zeros(count, 0)
        sure = torch.zeros(count, 0, dtype=torch.bool, device=device)
        pool = self.allowed
        for number in range(rounds):
            sizes, listed = pool.sum(2), _listed(pool)
            drawn = (start[:, number].flatten(0, 1) * sizes[victims]).long()
            state = listed[victims].gather(2, drawn[:, :, None])[:, :, 0]
            open_ = torch.arange(len(state), device=device)
            for turn in range(sweeps):
                state[open_], margin = self._swept(victims[open_], state[open_], pool, turn)
                open_ = open_[margin > SURE_MARGIN]
                if not len(open_):
                    break
            for turn in range(2):
                state, margin = self._swept(victims, state, self.allowed, sweeps + turn)
            texts = torch.cat([texts, state.view(count, batch, places)], 1)
            apart = torch.cat([apart, self._miss(victims, state).view(count, batch)], 1)
            sure = torch.cat([sure, (margin <= SURE_MARGIN).view(count, batch)], 1)
            fresh = _firsts(texts)
            rank = (apart + 2.0 * ~sure + 4.0 * ~fresh).topk(batch, dim=1, largest=False).indices  # apart is below 1
            texts, apart, sure = (_pick(part, rank) for part in (texts, apart, sure & fresh))
            if bool(sure.all()):
                break
            pool = self.allowed.clone()
            pool[owners[sure][:, None], torch.arange(places, device=device), texts[sure]] = False
            pool |= self.allowed & ~pool.any(2, keepdim=True)
        found = self._of(self.ids, victims, texts.flatten(0, 1))
        return found[:, 1:-1].view(count, batch, -1), apart.mean(1)

    def _swept(
        self,
        victims: Int[Tensor, "elements"],
        state: Int[Tensor, "elements places"],
        pool: Bool[Tensor, "victims places tokens"],
        turn: int,
    ) -> tuple[Int[Tensor, "elements places"], Float[Tensor, "elements"]]:
        """Each place in turn given its best token, and how far that is at most, as a share of the runner-up."""
        state, elements, places = state.clone(), torch.arange(len(state), device=state.device), state.shape[1]
        margin = self.hidden.new_zeros(len(state))
        for place in range(1, places - 1):
            size = int(pool[:, place].sum(1).max())
            tries = _listed(pool[:, place])[victims, :size]
            hidden, query, key, value = (
                part[victims[:, None], place, tries] for part in (self.hidden, self.query, self.key, self.value)
            )
            seen = self._of(self.key, victims, state), self._of(self.value, victims, state)
            total = self._apart(victims, hidden, query, seen, (key, value), place)
            other = (place + 1 + turn % (places - 1)) % places
            looks = [part[victims, other, state[:, other]][:, None] for part in (self.hidden, self.query)]
            total = total + self._apart(
                victims, looks[0].expand_as(hidden), looks[1].expand_as(query), seen, (key, value), place
            )
            total = total.masked_fill(~pool[victims, place].gather(1, tries), torch.inf)
            best = total.topk(min(2, size), dim=1, largest=False)
            state[:, place] = tries[elements, best.indices[:, 0]]
            if size > 1:
                margin = torch.maximum(margin, best.values[:, 0] / best.values[:, 1])
        return state, margin

    def _miss(
        self, victims: Int[Tensor, "elements"], state: Int[Tensor, "elements places"]
    ) -> Float[Tensor, "elements"]:
        """The mean distance of a text's tokens from the span."""
        fed = self.second.queried(self.first(self._of(self.hidden, victims, state)))
        return self.span[victims].distance(fed).mean(1)


SURE_MARGIN = 0.5
"""Distance of a text's token from the span, as a share of the runner-up's, below which a text is sure."""


def _listed(pool: Bool[Tensor, "*batch tokens"]) -> Int[Tensor, "*batch tokens"]:
    """The places of those that are true, in order, and then all others."""
    return pool.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)


def _firsts(texts: Int[Tensor, "victims texts places"]) -> Bool[Tensor, "victims texts"]:
    """Which of a victim's texts are the first of their kind."""
    same = (texts[:, :, None] == texts[:, None]).all(3)
    return same.int().argmax(2) == torch.arange(texts.shape[1], device=texts.device)


def _pick(rows: Tensor, which: Int[Tensor, "victims kept"]) -> Tensor:
    """Of each victim the chosen rows."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], which]
