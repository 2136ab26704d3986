"""A client that fine-tunes a model of texts on its documents, and replies with the checkpoint: weights, or a LoRA."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedtap.clients.mod import defended
from fedtap.clients.training import receive, weights_reply
from fedtap.simulator.data.documents import Documents
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.models.adapters import Lora, adapter_of, inject
from fedtap.simulator.models.fine_tuning import FineTuning
from fedtap.simulator.models.text_model import TextModel


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
    """The reply to a checkpoint message: a LoRA after fine-tuning on all of the client's documents, without the
    weights.

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
