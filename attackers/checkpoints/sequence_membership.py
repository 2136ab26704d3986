"""Membership from a client's checkpoints over rounds: what it trains on is better known to each than to models like it.

A federation sends a client's weights in every round, and membership adds up over them (Nasr, Shokri and Houmansadr
2019, https://arxiv.org/abs/1812.00910). How hard a document is by itself is taken off by reference models (Watson, Guo,
Cormode and Sablayrolles 2022, https://arxiv.org/abs/2111.08440): trained from the same weights in the same way, on
public documents of the client's domain, which are those whose loss fell most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.checkpoints.models import at_once, ends, labels_for, labels_of, loss_drops, losses, model
from fedtap.simulator.attack import generator
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak
from fedtap.simulator.models.adapters import Lora, inject
from fedtap.simulator.models.fine_tuning import FineTuning
from fedtap.simulator.models.text_model import TextModel

POOL = 2
"""Public documents from which references are trained, as a multiple of the victim's number of documents."""

SHARE = 0.25
"""Share of the corpus that they are, at most, so that they are of the victim's domain."""


@dataclass(frozen=True)
class SequenceMembership(Selector):
    """The sum over rounds of ``mean loss under references - loss under the checkpoint``.

    What it says of a victim in a round uses all of the victim's rounds up to that one. It chooses documents as
    `loss_drop` does, by the sum of their drops.
    """

    references: int = 3
    """Reference models in each round; 0: the weights that were broadcast are the reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.references) is not int or not 0 <= self.references <= 1000:
            raise FedtapError("sequence_membership trains from 0 to 1,000 references a round: give a whole number.")

    def _each(self, leak: CheckpointLeak, corpus: Corpus, start: Tensor) -> Iterator[Chosen]:
        sums: dict[int, tuple[Tensor, Tensor]] = {}
        found: dict[int, Chosen] = {}
        for victim in sorted(range(len(leak)), key=lambda victim: int(leak.rounds[victim])):
            client = int(leak.clients[victim])
            before, after = ends(leak[victim], corpus.device)
            drops, asked = self.told(leak[victim], corpus, before, after, int(start[victim]))
            if client in sums:
                drops, asked = drops + sums[client][0], asked + sums[client][1]
            sums[client] = drops, asked
            most, chosen = drops.topk(corpus.selected)
            found[victim] = Chosen(chosen, labels_of(corpus, after, chosen), asked, -float(most.mean()))
        yield from (found[victim] for victim in range(len(leak)))

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """By a single checkpoint."""
        return next(self._each(leak, corpus, torch.tensor([seed])))

    def told(
        self, leak: CheckpointLeak, corpus: Corpus, before: TextModel, after: TextModel, seed: int
    ) -> tuple[Float[Tensor, "documents"], Float[Tensor, "candidates"]]:
        """By one checkpoint: how far each document's loss falls, and how far a candidate's is below the references'."""
        drops, first, last = loss_drops(self, leak, corpus, before, after)
        if not self.references or not len(corpus.candidates):
            return drops, first - last
        asked = torch.zeros_like(last)
        for number in range(self.references):
            net = self._reference(leak, corpus, after, drops, generator(seed, "reference", number))
            asked += corpus.asked(losses(net, after), at_once(net, corpus.ids.shape[1])) / self.references
        return drops, asked - last

    def _reference(
        self,
        leak: CheckpointLeak,
        corpus: Corpus,
        after: TextModel,
        drops: Float[Tensor, "documents"],
        draw: torch.Generator,
    ) -> TextModel:
        """A model trained as the victim was, on as many public documents of its domain; of a sum, a mean of models."""
        protocol = leak.protocol
        examples = corpus.selected if leak.examples is None else int(leak.examples[0])
        each, how = min(max(1, examples // protocol.summed), len(corpus)), FineTuning.of(protocol, examples)
        pool = drops.topk(min(POOL * examples, max(each, int(SHARE * len(corpus))))).indices
        trained: list[dict[str, Tensor]] = []
        for _ in range(protocol.summed):
            net = model(leak, leak.broadcast(0), corpus.device).requires_grad_(True)
            if protocol.adapter:
                net = inject(net, Lora.parse(protocol.adapter), draw.initial_seed() % 2**31)
            some = corpus.ids[pool[torch.randperm(len(pool), generator=draw)[:each]]]
            how(net, some, labels_for(after, some), draw)
            trained.append({name: tensor.detach() for name, tensor in net.named_parameters()})
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(torch.stack([one[name] for one in trained]).mean(0))
        return net
