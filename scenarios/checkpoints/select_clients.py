"""Does averaging hide on which texts each client was tuned, if the server sees the mean of several checkpoints alone?

Expect: the domains of all clients of the mean are found, since the changes add up; which client has which is hidden,
and a document of one client has a share of the mean's change that falls with the number of clients.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.scenarios.checkpoints.select_topic import SelectTopic
from fedtap.simulator.options import sweep


@dataclass(frozen=True)
class SelectClients(SelectTopic):
    """Means of 1, 2, 5 and 10 clients, each with a topic; there are eight topics, so that ten share some."""

    victims: int = 1
    averaged: int = sweep(1, 2, 5, 10)
    attack: str = "random_selection,lowest_loss,loss_drop,select,select(rule='greedy_batches')"
