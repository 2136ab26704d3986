"""Fine-tuning of a model of texts: what clients do, and an attacker after them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from fedtap.simulator.leaks import Protocol
from fedtap.simulator.models.text_model import TextModel


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned: epochs over shuffled documents, in batches."""

    epochs: int = 1
    """Passes over the documents."""
    batch: int = 16
    """Documents in a step."""
    optimiser: str = "adamw"
    """`sgd` or `adamw`, with torch's other settings by default."""
    learning_rate: float = 1e-3
    """Step size of the optimiser."""

    @staticmethod
    def of(protocol: Protocol, examples: int) -> FineTuning:
        """As clients train that follow a protocol, each with its share of these examples."""
        batch = protocol.batch // protocol.summed
        steps = math.ceil(examples / protocol.summed / batch)
        return FineTuning(max(1, protocol.local_steps // steps), batch, protocol.optimiser, protocol.learning_rate)

    def __call__(
        self,
        net: TextModel,
        ids: Int[Tensor, "documents tokens"],
        labels: Int[Tensor, "documents"] | None,
        draw: torch.Generator,
    ) -> None:
        """Train those of the net's parameters that have a gradient, in place.

        Args:
            draw: shuffles the documents.
        """
        net.train()
        device = next(net.parameters()).device
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        kinds: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        optimiser = kinds[self.optimiser](trained, lr=self.learning_rate)  # type: ignore[call-arg]
        for _ in range(self.epochs):
            for some in torch.split(torch.randperm(len(ids), generator=draw), self.batch):
                optimiser.zero_grad()
                known = None if labels is None else labels[some].to(device)
                net.losses(ids[some].to(device), known).mean().backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        net.eval()
