"""Membership from a client's checkpoints over rounds: how far a document's loss falls each time that the client trains.

A federation sends a client's weights in every round, and what a client trains on falls in each of them, as in Nasr,
Shokri and Houmansadr 2019, https://arxiv.org/abs/1812.00910. From the drop of a document in a round is taken what other
documents that were as likely before drop by: public ones, chosen for the client's domain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.checkpoints.models import ends, labels_of, losses
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.leaks import CheckpointLeak


@dataclass(frozen=True)
class SequenceMembership(Selector):
    """The sum over rounds of ``loss before - loss after``, beside that of documents of the same domain.

    What it says of a victim in a round uses all of the victim's rounds up to that one.
    """

    def _each(self, leak: CheckpointLeak, corpus: Corpus, start: Tensor) -> Iterator[Chosen]:
        sums: dict[int, tuple[Tensor, Tensor]] = {}
        order = sorted(range(len(leak)), key=lambda victim: int(leak.rounds[victim]))
        found: dict[int, Chosen] = {}
        for victim in order:
            client = int(leak.clients[victim])
            documents, candidates = self.drops(leak[victim], corpus)
            if client in sums:
                documents, candidates = documents + sums[client][0], candidates + sums[client][1]
            sums[client] = documents, candidates
            drops, chosen = documents.topk(corpus.selected)
            _, after = ends(leak[victim], corpus.device)
            found[victim] = Chosen(chosen, labels_of(corpus, after, chosen), candidates, -float(drops.mean()))
        yield from (found[victim] for victim in range(len(leak)))

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """By a single checkpoint."""
        return next(self._each(leak, corpus, torch.tensor([seed])))

    def drops(
        self, leak: CheckpointLeak, corpus: Corpus
    ) -> tuple[Float[Tensor, "documents"], Float[Tensor, "candidates"]]:
        """Of one checkpoint, how far each document's loss falls."""
        before, after = ends(leak, corpus.device)
        (first, first_asked), (last, last_asked) = (
            losses(corpus, self.pass_named(leak, name), net, after)
            for name, net in (("before", before), ("after", after))
        )
        return first - last, first_asked - last_asked
