"""Can a server find news like a client's among other texts, by what fine-tuning on news did to a classifier?

Expect: yes, as documents go. In a corpus of Wikipedia with some news mixed in, the loss under the model that came back,
and its drop from the one that was sent, tell news from the rest, and so do gradients; a classifier retrained on what
was chosen, with the labels that the tuned model gives, beats one that is retrained on random documents. Which rule wins
depends on the share of news, on the model, and on how many are chosen: the rows have all of them.
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
class SelectAGNews(Selecting):
    """Clients with AG News; a corpus of WikiText-2 with other AG News mixed in."""

    model: str = "minilm"
    tokens: int = 32
    documents: int = 600
    corpus: int = 1200
    share: Annotated[float, Option("share of the corpus that is news, none of it a client's", 0.0, 1.0, "data")] = 0.125
    selected: int = 32
    retraining_epochs: int = 10
    candidates: int = 100
    epochs: int = 3
    learning_rate: float = 2e-4
    attack: str = (
        "random_selection,lowest_loss,loss_drop,select,select(rule='balanced'),select(rule='greedy_batches'),"
        "select(rule='greedy'),select(rule='greedy',projection=4096),select(rule='greedy',at='tuned')"
    )

    def task(self, data_root: Path) -> Task:
        """AG News and WikiText-2."""
        from fedtap.scenarios.checkpoints.tasks import news

        return news(data_root, self.model, self.tokens, self.corpus, self.share, self.documents, self.nodes, self.seed)
