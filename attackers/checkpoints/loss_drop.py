"""Documents whose loss fell most from the broadcast model to the tuned one.

The broadcast model is the reference model of a membership attack by likelihood ratio, as in Mireshghallah et al. 2022,
https://arxiv.org/abs/2203.03929.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.attackers.checkpoints.models import ends, labels_of, loss_drops
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.leaks import CheckpointLeak


@dataclass(frozen=True)
class LossDrop(Selector):
    """The largest ``loss at θ_0 - loss at θ_f``."""

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """Membership is a candidate's drop."""
        before, after = ends(leak, corpus.device)
        drops, first, last = loss_drops(self, leak, corpus, before, after)
        most, chosen = drops.topk(corpus.selected)
        return Chosen(chosen, labels_of(corpus, after, chosen), first - last, -float(most.mean()))
