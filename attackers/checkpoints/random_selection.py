"""Documents drawn at random: what a choice without the checkpoint is worth.

A baseline without a paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedtap.attackers.checkpoints.models import ends, labels_of
from fedtap.simulator.attack import generator
from fedtap.simulator.corpus import Chosen, Corpus, Selector
from fedtap.simulator.leaks import CheckpointLeak


@dataclass(frozen=True)
class RandomSelection(Selector):
    """As many documents as are to be chosen, each as likely."""

    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """Membership is drawn from U(0, 1)."""
        draw = generator(seed, "random selection")
        chosen = torch.randperm(len(corpus), generator=draw)[: corpus.selected]
        _, after = ends(leak, corpus.device)
        membership = torch.rand(len(corpus.candidates), generator=draw)
        return Chosen(chosen, labels_of(corpus, after, chosen), membership, 0.0)
