"""Documents that the tuned model predicts best: p_min, the strongest baseline of SELECT.

Morris et al. 2025, https://arxiv.org/abs/2506.15553, where it is the lowest loss of the expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.attackers.checkpoints.models import at_once, ends, labels_of, losses
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.leaks import CheckpointLeak


@dataclass(frozen=True)
class LowestLoss(Selector):
    """The lowest cross-entropy under the weights that came back."""

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """Membership is the negative loss."""
        _, after = ends(leak, corpus.device)
        batch, loss = at_once(after, corpus.ids.shape[1]), losses(after, after)
        documents = corpus.passed(self.pass_named(leak, "after"), loss, batch)
        lowest, chosen = documents.topk(corpus.selected, largest=False)
        return Chosen(chosen, labels_of(corpus, after, chosen), -corpus.asked(loss, batch), float(lowest.mean()))
