"""Leaks for the attacks' tests, made with plain PyTorch and smooth synthetic pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simulator.leaks import KINDS, Leak, Protocol, float_buffers
from simulator.models import build


def pictures(victims: int, batch: int, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth colour pictures in [0, 1], `victims batch 3 size size`, and labels out of ten."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(victims * batch, 3, 4, 4, generator=draw)
    images = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return images.unflatten(0, (victims, batch)), torch.randint(10, (victims, batch), generator=draw)


def leak_of(
    images: Tensor,
    labels: Tensor,
    network: nn.Module,
    model: str,
    *,
    kind: str = "gradient",
    steps: int = 1,
    learning_rate: float = 0.05,
    meta: Callable[[], nn.Module] | None = None,
) -> Leak:
    """What honest clients with these batches send: the gradient, or the update of a real SGD loop.

    Args:
        meta: builds the network, where it is none of fedtap's.
    """
    with torch.device("meta"):
        skeleton = meta() if meta else None
    weights = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    answers = []
    for batch, truth in zip(images, labels, strict=True):
        client = copy.deepcopy(network).train()
        sgd = torch.optim.SGD(client.parameters(), learning_rate)
        for _ in range(steps):
            sgd.zero_grad()
            F.cross_entropy(client(batch), truth).backward()
            if kind == "update":
                sgd.step()
        answers.append(
            {
                name: tensor.detach() - weights[name] if kind == "update" else tensor.grad
                for name, tensor in client.named_parameters()
            }
        )
    shape = (images.shape[2], images.shape[3], images.shape[4])
    return KINDS[kind](
        observed={name: torch.stack([answer[name] for answer in answers]) for name in weights},
        protocol=Protocol(
            model=model, shape=shape, classes=10, batch=images.shape[1], steps=steps, learning_rate=learning_rate
        ),
        network=skeleton or build(model, shape, 10),
        weights=weights,
        buffers={name: buffer.clone() for name, buffer in float_buffers(network).items()},
        clients=torch.arange(len(images)),
        rounds=torch.ones(len(images), dtype=torch.long),
        restarts=torch.zeros(len(images), dtype=torch.long),
    )
