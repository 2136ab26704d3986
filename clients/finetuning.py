"""A client that fine-tunes a model of texts on its documents, and replies with the checkpoint: weights, or a LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from jaxtyping import Int
from torch import Tensor

from fedtap.clients.mod import defended
from fedtap.clients.training import receive, weights_reply
from fedtap.simulator.data.documents import Documents
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.models.adapters import Lora, adapter_of, inject
from fedtap.simulator.models.text_model import TextModel

OPTIMISERS = ("sgd", "adamw")
"""How clients fine-tune; both have torch's other settings by default."""


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned: epochs over shuffled documents, in batches."""

    epochs: int = 1
    """Passes over the documents."""
    batch: int = 16
    """Documents in a step."""
    optimiser: str = "adamw"
    """`sgd` or `adamw`."""
    learning_rate: float = 1e-3
    """Step size of the optimiser."""

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
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        kinds: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        optimiser = kinds[self.optimiser](trained, lr=self.learning_rate)  # type: ignore[call-arg]
        for _ in range(self.epochs):
            for some in torch.split(torch.randperm(len(ids), generator=draw), self.batch):
                optimiser.zero_grad()
                net.losses(ids[some], None if labels is None else labels[some]).mean().backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        net.eval()


def checkpoint_reply(
    message: Message,
    net: TextModel,
    documents: Documents,
    client: int,
    how: FineTuning,
    defence: str,
    draw: torch.Generator,
) -> Message:
    """The reply to a checkpoint message: the weights after fine-tuning on all of the client's documents.

    Args:
        defence: acts on the change of the weights, in their own units.
        draw: shuffles, and gives a defence's noise.

    Raises:
        KeyError, RuntimeError: the server sent another model's weights.
    """
    before = receive(net, message.content.array_records["arrays"])
    how(net, documents.ids, documents.labels, draw)
    after = {name: parameter.detach() for name, parameter in net.named_parameters()}
    net.load_state_dict(defended(parse(defence).update, before, after, 1.0, draw), strict=False)
    return weights_reply(message, net, len(documents), client)


def adapter_reply(
    message: Message,
    net: TextModel,
    lora: Lora,
    documents: Documents,
    client: int,
    how: FineTuning,
    defence: str,
    draw: torch.Generator,
    seed: int,
) -> Message:
    """As `checkpoint_reply`, with a LoRA that is trained beside the weights, and sent in their place.

    Args:
        seed: of the adapter before it is trained, the same for all clients.
    """
    receive(net, message.content.array_records["arrays"])
    tuned = inject(net, lora, seed)
    before = {name: tensor.detach().clone() for name, tensor in adapter_of(tuned).items()}
    how(tuned, documents.ids, documents.labels, draw)
    after = {name: tensor.detach() for name, tensor in adapter_of(tuned).items()}
    sent = defended(parse(defence).update, before, after, 1.0, draw)
    metrics = MetricRecord({"num-examples": len(documents), "partition": client})
    return Message(RecordDict({"arrays": ArrayRecord(sent), "metrics": metrics}), reply_to=message)
