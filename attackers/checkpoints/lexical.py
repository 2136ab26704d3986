"""Documents that share rare words with what the tuned model writes.

A baseline without a paper. Documents are ranked by BM25 (Robertson and Zaragoza 2009,
https://doi.org/10.1561/1500000019), by the package rank-bm25; the query is all that the model wrote.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.attackers.checkpoints.models import check_generative, ends, labels_of, written_by
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak, Leak
from fedtap.simulator.models.text_model import PAD


@dataclass(frozen=True)
class Lexical(Selector):
    """Documents with the highest BM25 score for what the tuned model wrote."""

    def accepts(self, leak: Leak) -> None:
        """Models of the next token, where rank-bm25 is installed."""
        super().accepts(leak)
        check_generative(self, leak)
        if importlib.util.find_spec("rank_bm25") is None:
            raise FedtapError(
                "lexical ranks documents by BM25 with the package rank-bm25, which is not installed: pip install "
                "'fedtap[text]', or use similar_texts."
            )

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """Membership is a candidate's score in the corpus with all candidates added."""
        _, after = ends(leak, corpus.device)
        query = Counter(token for token in written_by(after, corpus, seed).flatten().tolist() if token != PAD)
        best, chosen = bm25(corpus.ids, query).topk(corpus.selected)
        membership = bm25(torch.cat([corpus.ids, corpus.candidates]), query)[len(corpus) :]
        return Chosen(chosen, labels_of(corpus, after, chosen), membership, -float(best.mean()))


def bm25(ids: Int[Tensor, "documents tokens"], query: Counter[int]) -> Float[Tensor, "documents"]:
    """Scores of documents for the tokens of a query, each as often as it stands there."""
    from rank_bm25 import BM25Okapi

    index = BM25Okapi([[token for token in row if token != PAD] for row in ids.tolist()])
    found = np.zeros(len(ids))
    for token, times in query.items():
        found += times * index.get_scores([token])
    return torch.from_numpy(found).float()
