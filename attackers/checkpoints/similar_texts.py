"""Documents whose embeddings are near those of what the tuned model writes.

A baseline without a paper. The embedding is the mean of the features from which the broadcast model predicts. With the
mean embedding of the corpus as the origin, a document scores by the cosine to the mean of the written ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtap.attackers.checkpoints.models import at_once, check_generative, embedded, ends, labels_of, written_by
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.leaks import CheckpointLeak, Leak


@dataclass(frozen=True)
class SimilarTexts(Selector):
    """Documents with the highest cosine between their embedding and the mean of what the tuned model wrote."""

    def accepts(self, leak: Leak) -> None:
        """Models of the next token."""
        super().accepts(leak)
        check_generative(self, leak)

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """Membership is a candidate's cosine."""
        before, after = ends(leak, corpus.device)
        written = embedded(before, written_by(after, corpus, seed)).cpu()

        def some(ids: Tensor) -> Tensor:
            return embedded(before, ids)

        batch = at_once(before, corpus.ids.shape[1])
        documents = corpus.passed(self.pass_named(leak, "embeddings"), some, batch)
        origin = documents.mean(0)
        wanted = written.mean(0) - origin
        scores, chosen = torch.cosine_similarity(documents - origin, wanted[None]).topk(corpus.selected)
        asked = corpus.asked(some, batch).view(-1, len(origin))
        membership = torch.cosine_similarity(asked - origin, wanted[None])
        return Chosen(chosen, labels_of(corpus, after, chosen), membership, 1 - float(scores.mean()))
