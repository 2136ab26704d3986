"""Leaks for the attacks' tests, made with plain PyTorch and smooth synthetic pictures."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.simulator.auxiliary import Auxiliary, Pairs, Provenance, digest, digest_of, gradients
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.leaks import KINDS, GradientLeak, Leak, Protocol, float_buffers
from fedtap.simulator.models.registry import build


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

    Parameters that are frozen in `network` are so in the leak, and nothing is sent for them but zeros.

    Args:
        meta: builds the network, where it is none of fedtap's.
    """
    shape = (images.shape[2], images.shape[3], images.shape[4])
    with torch.device("meta"):
        skeleton = meta() if meta else build(model, shape, 10)
    for bare, parameter in zip(skeleton.parameters(), network.parameters(), strict=True):
        bare.requires_grad_(parameter.requires_grad)
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
                name: tensor.detach() - weights[name]
                if kind == "update"
                else (torch.zeros_like(weights[name]) if tensor.grad is None else tensor.grad)
                for name, tensor in client.named_parameters()
            }
        )
    return KINDS[kind](
        observed={name: torch.stack([answer[name] for answer in answers]) for name in weights},
        protocol=Protocol(
            model=model, shape=shape, classes=10, batch=images.shape[1], local_steps=steps, learning_rate=learning_rate
        ),
        network=skeleton,
        weights=weights,
        buffers={name: buffer.clone() for name, buffer in float_buffers(network).items()},
        clients=torch.arange(len(images)),
        rounds=torch.ones(len(images), dtype=torch.long),
        restarts=torch.zeros(len(images), dtype=torch.long),
    )


def auxiliary_for(
    leak: Leak, folder: Path, pairs: int = 40, seed: int = 100, network: nn.Module | None = None
) -> Auxiliary:
    """Pairs at the leak's weights, of other pictures than `pictures` makes by default, under noise that is announced.

    Args:
        network: the leak's own on the CPU, where it is none of fedtap's.
    """
    protocol = dataclasses.replace(leak.protocol, local_steps=1)
    network = network or copy.deepcopy(leak.network).to_empty(device="cpu")
    network.load_state_dict({**(leak.weights or {}), **leak.buffers}, strict=False)
    images, labels = pictures(pairs, protocol.batch, protocol.shape[1], seed)
    about = Provenance(
        protocol, "pictures", pairs, digest=f"{digest(leak.weights or {})}, {digest({'images': images})}"
    )

    def chunks() -> Iterator[Pairs]:
        draw = torch.Generator().manual_seed(seed)
        for some, named in zip(images.split(16), labels.split(16), strict=True):
            count = torch.arange(len(some))
            sent = {
                name: tensor + sigma(protocol) * torch.randn(tensor.shape, generator=draw)
                for name, tensor in gradients(network, some, named).items()
            }
            heard = GradientLeak(sent, protocol, leak.network, leak.weights, leak.buffers, count, count, count)
            yield Pairs(heard, some, named)

    return Auxiliary.record(folder / digest_of(about), about, leak.network, chunks())


class OfTheUsers(nn.Module):
    """Attention and dropout as people write them; `noisy` draws random numbers in its forward pass."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3 * 16, 16), nn.Linear(16, 10)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.dropout, self.noisy = nn.Dropout(0.5), noisy

    def forward(self, images: Tensor) -> Tensor:
        rows = self.embed(images.permute(0, 2, 1, 3).flatten(2))
        rows = self.dropout(rows + self.attention(rows, rows, rows)[0])
        if self.noisy:
            rows = rows + torch.randn_like(rows)
        return self.head(rows.mean(1))  # type: ignore[no-any-return]


class WithConstant(nn.Module):
    """Keeps its mean as a plain attribute, or as a buffer."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 10)
        if buffer:
            self.register_buffer("mean", torch.tensor([0.5]))
        else:
            self.mean = torch.tensor([0.5])

    def forward(self, images: Tensor) -> Tensor:
        return self.fc((images - self.mean).flatten(1))  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """Writes into two tensors that were equal when they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3 * 16 * 16, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.first(images.flatten(1)))
        one, other = hidden.new_zeros(hidden.shape), hidden.new_zeros(hidden.shape)
        one.add_(hidden)
        other.sub_(2 * hidden)
        return self.last(torch.tanh(self.middle(one)) + other * other)  # type: ignore[no-any-return]


def conv_head() -> nn.Module:
    """A network without a linear layer."""
    return nn.Sequential(nn.Conv2d(3, 10, 16), nn.Flatten())
