"""The compromised client: an honest one whose channel the adversary can feed with examples of its own.

It answers `query.practice` with the gradient of each example it is fed, computed as its training would.
"""

from __future__ import annotations

import copy

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torch.nn import functional as F

from clients.training import network, receive
from simulator.records import tensors_of
from simulator.scenario import PrivateData


def practise(order: Message, private: PrivateData) -> Message:
    """Public examples in (`pairs batch channel height width`, in [0, 1]), their gradients out (`pairs *parameter`)."""
    world = private.world
    net = network(private.scenario.model, world.shape, len(world.classes))
    receive(net, order.content.array_records["arrays"])
    examples = tensors_of(order.content.array_records["examples"])
    images, labels = examples["images"], examples["labels"]
    trained = replace_all_batch_norm_modules_(
        copy.deepcopy(net).train()
    )  # BatchNorm by batch statistics, no side effect

    def loss(weights: dict[str, Tensor], some: Tensor, named: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(trained, weights, (some,)), named)

    weights = {name: weight.detach() for name, weight in trained.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=256, randomness="different")(weights, images, labels)
    content = RecordDict(
        {
            "gradients": ArrayRecord({name: gradient.contiguous() for name, gradient in gradients.items()}),
            "metrics": MetricRecord({"num-examples": len(images)}),
        }
    )
    return Message(content, reply_to=order)
