"""The client with texts: one step of SGD on them from the broadcast weights, and weights back, as FedAvg wants it."""

from __future__ import annotations

import torch
from flwr.app import Message
from jaxtyping import Int
from torch import Tensor, nn

from fedtap.clients.mod import defended
from fedtap.clients.training import carried, receive, sgd, weights_reply
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.language import LanguageModel


def train_on_texts(
    message: Message,
    net: LanguageModel,
    texts: Int[Tensor, "batch tokens"],
    labels: Int[Tensor, "batch"],
    client: int,
    learning_rate: float,
    defence: str,
    draw: torch.Generator,
) -> Message:
    """The reply to a train message; `draw` gives a defence's noise."""
    before = receive(net, message.content.array_records["arrays"])
    sgd(net, texts, labels, 1, len(texts), learning_rate, _backward)
    after = {name: parameter.detach() for name, parameter in net.named_parameters()}
    after = defended(parse(defence).update, before, after, learning_rate, draw)
    net.load_state_dict(after, strict=False)
    return weights_reply(message, carried(net), len(texts), client)


def _backward(net: nn.Module, texts: Tensor, labels: Tensor) -> Tensor:
    assert isinstance(net, LanguageModel)
    loss = net.loss(texts, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def check_defence(defence: str) -> None:
    """Refuse a defence that is none of an update.

    Raises:
        FedtapError: it acts on something else, or cannot be read.
    """
    for part in described(defence):
        if part.hook != "update":
            raise FedtapError(
                f"{part.name} acts on the {part.hook} of an image model, and these clients train on texts: use a "
                "defence of what is sent, such as clip(1.0) or noise(0.001)."
            )
