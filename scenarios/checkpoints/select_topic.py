"""Do the weights of a fine-tuned language model tell on which texts it was tuned?

Expect: the topic, yes. Documents whose loss fell, or whose gradient points where the weights went, are all of the
client's topic, and a model retrained on them is nearly as good as one trained on the private documents. The documents
themselves, in part: told from others of the same topic, each is a little better known to the tuned model, the more so
the longer it was tuned. Finding the domain is not finding the documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fedtap.scenarios.checkpoints.selection import Selecting
from fedtap.simulator.options import Option

if TYPE_CHECKING:
    from fedtap.scenarios.checkpoints.tasks import Task


@dataclass(frozen=True)
class SelectTopic(Selecting):
    """Clients whose documents are each on one of eight topics, made up from a grammar; a corpus on all of them."""

    epochs: int = 8
    topics: Annotated[
        int, Option("topics of clients' documents, in turns; the corpus is on all eight", 1, 8, "data")
    ] = 8
    attack: str = (
        "random_selection,similar_texts,lowest_loss,loss_drop,select,select(projection=1024),"
        "select(rule='greedy',projection=1024),sequence_membership"
    )

    def task(self, data_root: Path) -> Task:
        """Made up."""
        from fedtap.scenarios.checkpoints.tasks import topics

        return topics(self.model, self.tokens, self.corpus, self.documents, self.nodes, self.topics, self.seed)
