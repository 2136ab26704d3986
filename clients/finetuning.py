"""A client that fine-tunes a model on its documents or images, and replies with the checkpoint: weights, or a LoRA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedtap.clients.mod import defended
from fedtap.clients.training import carried, receive, weights_reply
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.models.adapters import Lora, Network, adapter_of, inject


def checkpoint_reply(
    message: Message,
    net: Network,
    tune: Callable[[Network], None],
    examples: int,
    client: int,
    defence: str,
    draw: torch.Generator,
) -> Message:
    """The reply to a checkpoint message: the weights after fine-tuning on all of the client's examples.

    Args:
        tune: trains the network's parameters that have a gradient, in place.
        defence: acts on the change of the weights, in their own units.
        draw: gives a defence's noise.

    Raises:
        KeyError, RuntimeError: the server sent another model's weights.
    """
    before = receive(net, message.content.array_records["arrays"])
    tune(net)
    after = {name: parameter.detach() for name, parameter in net.named_parameters()}
    net.load_state_dict(defended(parse(defence).update, before, after, 1.0, draw), strict=False)
    return weights_reply(message, carried(net), examples, client)


def adapter_reply(
    message: Message,
    net: Network,
    lora: Lora,
    tune: Callable[[Network], None],
    examples: int,
    client: int,
    defence: str,
    draw: torch.Generator,
    seed: int,
) -> Message:
    """The reply to a checkpoint message: a LoRA after fine-tuning on all of the client's examples, without the weights.

    Args:
        seed: of the adapter before it is trained, the same for all clients.
    """
    receive(net, message.content.array_records["arrays"])
    tuned = inject(net, lora, seed)
    before = {name: tensor.detach().clone() for name, tensor in adapter_of(tuned).items()}
    tune(tuned)
    after = {name: tensor.detach() for name, tensor in adapter_of(tuned).items()}
    sent = defended(parse(defence).update, before, after, 1.0, draw)
    metrics = MetricRecord({"num-examples": examples, "partition": client})
    return Message(RecordDict({"arrays": ArrayRecord(sent), "metrics": metrics}), reply_to=message)
