"""A defence as a Flower client mod, for a ClientApp of one's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from flwr.app import ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from fedtap.simulator.defences.defence import Update
from fedtap.simulator.defences.source import Source
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Tensors
from fedtap.simulator.wire.records import tensors_of

Drawing = TypeVar("Drawing")


def mod_of(
    defence: Update,
    learning_rate: float = 1.0,
    parameters: Collection[str] | None = None,
    draw: Source = None,
) -> Mod:
    """A mod that sends `received weights + defended difference` in the place of a client's weights.

    Write ``ClientApp(mods=[mod_of(Chain((Clip(1.0), Noise(0.01))), learning_rate=0.1)])``.

    Args:
        defence: acts on (received - sent) / `learning_rate`.
        learning_rate: the clients'; 1 means that norms and noise are those of the weights' change itself.
        parameters: names of the arrays to defend; none means all that are floating point. Name them where a model keeps
            others, such as BatchNorm's statistics: those are no gradients, and travel as they are.
        draw: none means that noise comes from the operating system's cryptographic generator. A torch.Generator is
            for simulations alone: whoever finds its seed takes the noise off again.

    Raises (the mod):
        FedtapError: it cannot tell the difference to defend. Nothing is sent then.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        before = tensors_of(_arrays(message, "message")[1])
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        key, record = _arrays(reply, "reply")
        after = tensors_of(record)
        floating = [name for name in after if after[name].is_floating_point()]
        kept = [name for name in floating if parameters is None or name in parameters]
        if strange := [name for name in kept if name not in before or before[name].shape != after[name].shape]:
            raise FedtapError(
                f"The client sends {strange[0]}, and was sent no array of that name and shape, so there "
                "is nothing to compare it with: reply with the arrays that came, or name those to defend, "
                "mod_of(parameters=...)."
            )
        sent = after | defended(defence, before, {name: after[name] for name in kept}, learning_rate, draw)
        reply.content.array_records[key] = ArrayRecord({name: sent[name] for name in after})
        return reply

    return mod


def _arrays(message: Message, what: str) -> tuple[str, ArrayRecord]:
    if len(message.content.array_records) != 1:
        raise FedtapError(
            f"The train {what} holds {len(message.content.array_records)} ArrayRecords, and of one alone is it "
            "known what to defend: send weights in one record."
        )
    return next(iter(message.content.array_records.items()))


def defended(
    defence: Callable[[Tensors, Drawing], dict[str, Tensor]],
    before: Tensors,
    after: Tensors,
    learning_rate: float,
    draw: Drawing,
) -> dict[str, Tensor]:
    """The weights to send in the place of `after`, where `before` were received: a client's, or a stack of exchanges'.

    Args:
        defence: an `Update`, or for a stack its `stacked`, with a source for each exchange.
    """
    gradient = defence({name: (before[name] - after[name]) / learning_rate for name in after}, draw)
    return {name: before[name] - learning_rate * gradient[name] for name in after}
