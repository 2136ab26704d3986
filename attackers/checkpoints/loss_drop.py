"""Documents whose loss fell most from the broadcast model to the tuned one.

The broadcast model is the reference model of a membership attack by likelihood ratio, as in Mireshghallah et al. 2022,
https://arxiv.org/abs/2203.03929.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.attackers.checkpoints.models import ends, labels_of, losses
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.leaks import CheckpointLeak


@dataclass(frozen=True)
class LossDrop(Selector):
    """The largest ``loss at θ_0 - loss at θ_f``."""

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """Membership is a candidate's drop."""
        before, after = ends(leak, corpus.device)
        (first, first_asked), (last, last_asked) = (
            losses(corpus, self.pass_named(leak, name), net, after)
            for name, net in (("before", before), ("after", after))
        )
        drops, chosen = (first - last).topk(corpus.selected)
        return Chosen(chosen, labels_of(corpus, after, chosen), first_asked - last_asked, -float(drops.mean()))
