"""A client that trains its model to the end: to a stationary point of its loss and the announced regulariser.

It works in double precision and sends back what any client sends: weights, and the number of its examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Tensors
from fedtap.simulator.models.regulariser import Regulariser
from fedtap.simulator.wire.records import tensors_of

TRAININGS = ("lbfgs", "adam")
"""L-BFGS to a stationary point, or 300 steps of Adam at 0.01, which seldom reach one."""

PRECISIONS = ("float64", "float32", "float16")
"""Floating point formats in which weights are sent back."""

CLOSE = 1e-8
"""Length of the whole gradient, as a share of the regulariser's, at which a training has ended."""

HISTORY, AT_ONCE, ADAM_STEPS, ADAM_RATE = 50, 500, 300, 0.01


@dataclass(frozen=True)
class Training:
    """How a client trains: what it minimises, and by which optimiser.

    Raises:
        FedtapError: a regulariser that cannot be trained with.
    """

    regulariser: Regulariser
    """R, added to the sum of the examples' losses."""
    optimiser: str = "lbfgs"
    """`lbfgs` or `adam`."""
    steps: int = 6_000
    """Steps of L-BFGS, at most."""

    def __post_init__(self) -> None:
        if self.regulariser.name == "max_margin":
            raise FedtapError(
                "max_margin is where training without a regulariser goes and never arrives: train with a small "
                "weight_decay, such as weight_decay(1e-4)."
            )

    def __call__(
        self,
        network: nn.Module,
        broadcast: Tensors,
        inputs: Float[Tensor, "examples features"],
        labels: Int[Tensor, "examples"],
    ) -> tuple[dict[str, Tensor], float]:
        """The trained weights, and what is left of the gradient, as a share of the regulariser's.

        Args:
            network: the architecture; its own weights do not matter.
            broadcast: parameter name -> tensor.

        Raises:
            FedtapError: the private data are no finite numbers.
        """
        if not bool(inputs.isfinite().all()):
            raise FedtapError("A client's data hold NaN or infinity, with which no training ends: clean them first.")
        sizes = {name: tensor.shape for name, tensor in broadcast.items()}
        anchor = torch.cat([tensor.double().flatten() for tensor in broadcast.values()])
        if self.regulariser.name == "weight_decay":
            start, anchor = anchor.clone(), torch.zeros_like(anchor)
        else:
            start = anchor.clone()
        weights = start.requires_grad_()
        inputs = inputs.double()

        def parts(flat: Tensor) -> dict[str, Tensor]:
            split = torch.split(flat, [size.numel() for size in sizes.values()])
            return {name: part.reshape(size) for (name, size), part in zip(sizes.items(), split, strict=True)}

        def loss() -> Tensor:
            logits = functional_call(network, parts(weights), (inputs,))
            held = 0.5 * self.regulariser.strength * (weights - anchor).square().sum()
            return F.cross_entropy(logits, labels, reduction="sum") + held

        def closure() -> Tensor:
            value = loss()
            (weights.grad,) = torch.autograd.grad(value, weights)
            return value

        def left() -> float:
            (gradient,) = torch.autograd.grad(loss(), weights)
            held = self.regulariser.strength * (weights.detach() - anchor)
            return float(gradient.norm() / held.norm().clamp_min(1e-300))

        if self.optimiser == "adam":
            adam = torch.optim.Adam([weights], lr=ADAM_RATE)
            for _ in range(ADAM_STEPS):
                adam.step(closure)
        rest = [math.inf, math.inf]
        for number in range(self.steps // AT_ONCE if self.optimiser == "lbfgs" else 0):
            rest.append(left())
            if rest[-1] < CLOSE or rest[-1] > rest[-3] / 2:  # it has ended, or ReLU's kinks leave it nowhere to end
                break
            # near the end the loss no longer tells two steps apart, and the gradient alone leads on
            search = "strong_wolfe" if number % 2 == 0 else None
            torch.optim.LBFGS(  # type: ignore[no-untyped-call]
                [weights],
                max_iter=AT_ONCE,
                history_size=HISTORY,
                tolerance_grad=0,
                tolerance_change=0,
                line_search_fn=search,
            ).step(closure)
        return parts(weights.detach()), left()


def train_to_the_end(
    message: Message,
    client: int,
    network: nn.Module,
    inputs: Float[Tensor, "examples features"],
    labels: Int[Tensor, "examples"],
    training: Training,
    precision: str,
) -> Message:
    """Train from the weights of the message, and reply with the trained ones, as FedAvg expects them.

    Raises:
        KeyError: the message carries another model's weights.
    """
    sent = tensors_of(message.content.array_records["arrays"])
    if sent.keys() != dict(network.named_parameters()).keys():
        raise KeyError(f"the server sent {len(sent)} tensors that are not those of this client's model")
    trained, left = training(network, sent, inputs, labels)
    arrays = ArrayRecord({name: tensor.to(getattr(torch, precision)) for name, tensor in trained.items()})
    metrics = MetricRecord({"num-examples": len(inputs), "partition": client, "left": left})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
