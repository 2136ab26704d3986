"""Does averaging hide on which texts each client was tuned, if the server sees the mean of several checkpoints alone?

Expect: the clients' domains are found, since their changes add up, but not evenly. The documents with the highest
scores are all of the domain that changed the weights most, and a model retrained on those is worse than one retrained
on random documents; the greedy rule, which asks what is still missing, finds some of each. Which client has which
domain is hidden, and a client's documents hide behind the others': membership falls to chance at ten clients.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.scenarios.checkpoints.select_topic import SelectTopic
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class SelectClients(SelectTopic):
    """Means of 1, 2, 5 and 10 clients, on four topics in turns; the corpus is on eight."""

    topics: int = 4
    averaged: int = sweep(1, 2, 5, 10)
    attack: str = "lowest_loss,loss_drop,select,select(rule='greedy_batches')"
