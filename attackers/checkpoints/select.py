"""SELECT: choose public documents whose gradients add up to what fine-tuning did to the weights.

Morris et al. 2025, https://arxiv.org/abs/2506.15553. A document scores by the cosine between its gradient g and the
change θ_0 - θ_f; the greedy rule adds the one with which the sum of all that are chosen points there best,
``argmax_i cos(g_i + sum_chosen g, θ_0 - θ_f)``. A classifier's documents are labelled by the tuned model.

Departs from the released code in what is the default: gradients are taken at the broadcast weights, as the paper's text
says, over all tokens, and without a projection, since inner products with the last layer's gradient need none. Where
there is a projection, the last layer's is a sketch of outer products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.attackers.checkpoints.models import ends, labelled, labels_of, model
from fedtap.attackers.checkpoints.per_document import DocumentGradients, LastLayer, WholeModel
from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.errors import FedtapError, unknown
from fedtap.simulator.leaks import CheckpointLeak, Leak
from fedtap.simulator.models.text_model import TextModel

Rule = Literal["top", "balanced", "greedy", "greedy_batches"]

MOST = 2**30
"""Numbers of all documents' sketches, or of their gradients, that the greedy rule keeps: 4 GiB."""

ROUNDED = 1e-6
"""Share of ``||g||^2 + ||S||^2`` below which ``||g + S||^2`` counts as that share."""


@dataclass(frozen=True)
class Select(Selector):
    """Documents by the cosine between their gradients and the change of the weights."""

    rule: Rule = "top"
    """`top`: the highest cosines; `balanced`: as many of each label; `greedy`: one after the other, each beside those
    before it; `greedy_batches`: several at a time."""
    at: Literal["broadcast", "tuned"] = "broadcast"
    """The weights at which gradients are taken."""
    layer: Literal["last", "all"] = "last"
    """The parameters of which they are."""
    tokens: Literal["all", "last"] = "all"
    """The places whose loss they are of."""
    projection: int = 0
    """Numbers to which a gradient is projected, at random; 0: none, which `greedy` can afford for small models
    alone."""
    batches: int = 8
    """Batches of the rule `greedy_batches`, each of which is a pass over the corpus."""
    pseudo_experts: int = 0
    """Models between both ends, equally far apart, at which gradients are taken besides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, batches=1)
        for name, choices in (("rule", Rule), ("at", Literal["broadcast", "tuned"]), ("layer", Literal["last", "all"])):
            if getattr(self, name) not in get_args(choices):
                raise unknown(f"{name} of select", str(getattr(self, name)), get_args(choices))
        if self.tokens not in ("all", "last"):
            raise unknown("tokens of select", str(self.tokens), ("all", "last"))
        if not (self.projection <= 2**16 and self.batches <= 2**16 and self.pseudo_experts <= 64):
            raise FedtapError(
                "select takes a projection from 0 to 65,536, batches from 1 to 65,536 and pseudo_experts from 0 to 64: "
                "give values in these ranges."
            )
        if self.rule == "greedy_batches" and self.projection:
            raise FedtapError(
                "select(rule='greedy_batches') goes over the corpus once a batch and needs no projection: leave it "
                "out, or use rule='greedy'."
            )
        if self.layer == "all" and self.tokens == "last":
            raise FedtapError("select takes the last token's gradient of the last layer alone: leave tokens, or layer.")

    def accepts(self, leak: Leak) -> None:
        """Leaks in which the layer is trained, and labels where it balances them."""
        super().accepts(leak)
        net = leak.network
        assert isinstance(net, TextModel)
        if self.layer == "last" and (leak.protocol.adapter or not net.output):
            raise FedtapError(
                "The last layer comes back as it was sent, since clients train others alone: use select(layer='all')."
            )
        if self.rule == "balanced" and net.generative:
            raise FedtapError(
                "The rule balanced chooses as many of each label, and a language model has none: use top."
            )

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """By the rule; `membership` is each candidate's own cosine."""
        before, after = ends(leak, corpus.device)
        gradients = self._gradients(leak, corpus, before, after)
        change = gradients.change(dict(before.named_parameters()), dict(after.named_parameters()))
        target = gradients.sketch(change, self.projection, seed) if self.projection else change.flatten()

        def cosines(ids: Tensor) -> Tensor:
            labels = labelled(after, ids)
            if not self.projection:
                return _cosines(gradients.products(ids, labels, [change]), float(change.norm()))
            rows = gradients.sketches(ids, labels, self.projection, seed)
            return torch.cosine_similarity(rows, target[None])

        if self.rule == "greedy":
            rows = self._rows(leak, corpus, after, gradients, seed)
            chosen = greedy(rows, target.cpu(), corpus.selected)
        elif self.rule == "greedy_batches":
            chosen = self._in_batches(leak, corpus, after, gradients, change)
        else:
            scores = corpus.passed(self.pass_named(leak, f"cosines {seed}"), cosines, gradients.batch)
            chosen = scores.topk(corpus.selected).indices
            if self.rule == "balanced":
                chosen = self._balanced(leak, corpus, after, scores)
        total = self._total(corpus, after, gradients, chosen)
        return Chosen(
            chosen=chosen,
            labels=labels_of(corpus, after, chosen),
            membership=corpus.asked(cosines, gradients.batch),
            objective=1 - float(torch.cosine_similarity(total.flatten(), change.flatten(), 0)),
        )

    def _gradients(
        self, leak: CheckpointLeak, corpus: Corpus, before: TextModel, after: TextModel
    ) -> DocumentGradients:
        sent, back = leak.broadcast(0), leak.tuned(0)
        nets = [before if self.at == "broadcast" else after]
        for number in range(1, self.pseudo_experts + 1):
            share = number / (self.pseudo_experts + 1)
            nets.append(model(leak, {name: torch.lerp(sent[name], back[name], share) for name in sent}, corpus.device))
        if self.layer == "last":
            return LastLayer(nets, self.tokens, leak.protocol.shape[0] + 1)
        moved = [name for name, _ in before.named_parameters() if not torch.equal(sent[name], back[name])]
        if not moved:
            raise FedtapError(
                "The client's checkpoint is the one that it was sent, so nothing was learned from: ask another."
            )
        return WholeModel(nets, moved)

    def _rows(
        self, leak: CheckpointLeak, corpus: Corpus, after: TextModel, gradients: DocumentGradients, seed: int
    ) -> Float[Tensor, "documents size"]:
        """Of every document, what the greedy rule adds up."""

        def some(ids: Tensor) -> Tensor:
            labels = labelled(after, ids)
            if self.projection:
                return gradients.sketches(ids, labels, self.projection, seed)
            return gradients.laid_out(ids, labels)

        with torch.no_grad():
            size = some(corpus.ids[:1].to(corpus.device)).shape[1]
        if size * len(corpus) > MOST:
            raise FedtapError(
                f"The greedy rule keeps {size:,} numbers of each of {len(corpus):,} documents, which fill "
                f"{size * len(corpus) / 2**28:.0f} GiB: give a projection, such as 1024, or use greedy_batches."
            )
        return corpus.passed(self.pass_named(leak, f"rows {seed}"), some, max(1, min(gradients.batch, 2**26 // size)))

    def _in_batches(
        self, leak: CheckpointLeak, corpus: Corpus, after: TextModel, gradients: DocumentGradients, change: Tensor
    ) -> Int[Tensor, "selected"]:
        """In each batch those with the highest cosine beside all of the batches before."""
        total, chosen = torch.zeros_like(change), torch.zeros(0, dtype=torch.long)
        for part in torch.arange(corpus.selected).tensor_split(min(self.batches, corpus.selected)):

            def some(ids: Tensor, total: Tensor = total) -> Tensor:
                return gradients.products(ids, labelled(after, ids), [change, total])

            name = self.pass_named(leak, f"products {chosen.tolist()}")
            along, beside, norms = corpus.passed(name, some, gradients.batch).double().unbind(1)
            # cos(g + S, D) = (g.D + S.D) / (||g + S|| ||D||)
            length = _lengths(norms + float(total.double().square().sum()), beside)
            scores = (along + float((total * change).double().sum())) / length
            scores[chosen] = -torch.inf
            chosen = torch.cat([chosen, scores.topk(len(part)).indices])
            total = self._total(corpus, after, gradients, chosen)
        return chosen

    def _balanced(
        self, leak: CheckpointLeak, corpus: Corpus, after: TextModel, scores: Float[Tensor, "documents"]
    ) -> Int[Tensor, "selected"]:
        """As many of each label, as far as there are; the highest cosines of all for the rest."""
        labels = corpus.passed(self.pass_named(leak, "labels"), lambda ids: labelled(after, ids), 256)  # type: ignore[arg-type, return-value]
        order = scores.argsort(descending=True)
        share = corpus.selected // leak.protocol.classes
        firsts = torch.cat([order[labels[order] == label][:share] for label in range(leak.protocol.classes)])
        rest = order[~torch.isin(order, firsts)]
        return torch.cat([firsts, rest])[: corpus.selected]

    def _total(
        self, corpus: Corpus, after: TextModel, gradients: DocumentGradients, chosen: Int[Tensor, "selected"]
    ) -> Tensor:
        """The sum of the chosen documents' gradients, as it is without a projection."""
        parts = torch.split(corpus.ids[chosen].to(corpus.device), gradients.batch)
        with torch.no_grad():
            total = gradients.total(parts[0], labelled(after, parts[0]))
            for some in parts[1:]:
                total += gradients.total(some, labelled(after, some))
            return total


def greedy(rows: Float[Tensor, "documents size"], target: Float[Tensor, "size"], most: int) -> Int[Tensor, "most"]:
    """The documents that bring the sum of their rows nearest to the target's direction, one after the other.

    With D the target and S the sum so far: ``cos(g + S, D) = (g.D + S.D) / (||g + S|| ||D||)``, where
    ``||g + S||^2 = ||g||^2 + 2 g.S + ||S||^2``, and g.S is kept up to date by one product with the last row.
    """
    along, norms = (rows @ target).double(), rows.square().sum(1).double()
    beside = torch.zeros_like(along)
    total, total_along, total_norm = torch.zeros_like(target), 0.0, 0.0
    chosen: list[int] = []
    for _ in range(most):
        scores = (along + total_along) / _lengths(norms + total_norm, beside)
        scores[chosen] = -torch.inf
        best = int(scores.argmax())
        chosen.append(best)
        total = total + rows[best]
        total_along, total_norm = float(total.double() @ target.double()), float(total.double().square().sum())
        beside += (rows @ rows[best]).double()
    return torch.tensor(chosen)


def _lengths(squares: Float[Tensor, "documents"], beside: Float[Tensor, "documents"]) -> Float[Tensor, "documents"]:
    """||g + S|| from ``||g||^2 + ||S||^2`` and g.S; where both cancel, what is left of float32 is rounding alone."""
    return (squares + 2 * beside).clamp_min(ROUNDED * squares).clamp_min(1e-300).sqrt()


def _cosines(products: Float[Tensor, "documents 2"], length: float) -> Float[Tensor, "documents"]:
    """Of documents' gradients with a direction of this length."""
    along, norms = products.unbind(1)
    return along / (norms.sqrt() * length).clamp_min(1e-30)
