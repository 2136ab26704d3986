"""A client of split learning: it runs its half of the model on its own input and sends the output."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fedtap.simulator.attack import generator
from fedtap.simulator.wire.records import tensors_of


def activation_reply(
    message: Message, half: nn.Module, private: Tensor, client: int, noise: float = 0.0, seed: int = 0
) -> Message:
    """The reply: output of the half at the message's weights, for this input.

    Args:
        half: the client's part of the model; the message's `arrays` are loaded into it.
        private: what it is given, without a batch axis.
        noise: standard deviation of what the client adds, as a share of the output's root mean square.

    Raises:
        RuntimeError: the message carries another model's weights.
    """
    half.load_state_dict(tensors_of(message.content.array_records["arrays"]))
    with torch.no_grad():
        output = half.eval()(private[None])[0]
    if noise:
        drawn = torch.randn(output.shape, generator=generator(seed, "noise", client), dtype=output.dtype)
        output = output + noise * output.square().mean().sqrt() * drawn
    content = {"attention": ArrayRecord({"output": output}), "metrics": MetricRecord({"partition": client})}
    return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]
