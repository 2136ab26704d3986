"""Clients of any convention, in plain PyTorch: what they send over the wire, told of it truly or not."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.simulator.leaks import GradientLeak, Leak, Protocol, UpdateLeak, float_buffers
from fedtap.simulator.wire.threat_models import ROUNDING


def loss_of(protocol: Protocol, logits: Tensor, labels: Tensor) -> Tensor:
    """torch's own, of one-hot labels where it wants such."""
    if protocol.loss == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction=protocol.reduction)
    target = labels[:, None].float() if protocol.classes == 1 else F.one_hot(labels, protocol.classes).float()
    loss = F.binary_cross_entropy_with_logits if protocol.loss == "bce" else F.mse_loss
    return loss(logits, target, reduction=protocol.reduction)


def trained(network: nn.Module, images: Tensor, labels: Tensor, protocol: Protocol) -> nn.Module:
    """The network after a client's local steps with torch's own optimiser.

    Args:
        images: `batch channel height width`, pixels in [0, 1].
    """
    client = copy.deepcopy(network).train(protocol.batchnorm == "train")
    adam, options = protocol.optimiser == "adam", {"lr": protocol.learning_rate, "weight_decay": protocol.weight_decay}
    optimiser: torch.optim.Optimizer = (
        torch.optim.Adam(client.parameters(), **options)
        if adam
        else torch.optim.SGD(client.parameters(), momentum=protocol.momentum, nesterov=protocol.nesterov, **options)
    )
    low, high = (torch.tensor(end).reshape(-1, 1, 1) for end in (protocol.low, protocol.high))
    batches = -(-protocol.batch // protocol.step_batch) if protocol.step_batch else 1
    for step in range(protocol.local_steps):
        optimiser.zero_grad()
        own = slice(step % batches, None, batches)
        loss_of(protocol, client(low + (high - low) * images[own]), labels[own]).backward()
        optimiser.step()
    return client


def heard(network: nn.Module, images: Tensor, labels: Tensor, true: Protocol, told: Protocol | None = None) -> Leak:
    """What the server observes of clients of the `true` convention, read as the protocol that it is `told`.

    Args:
        images: `victims batch channel height width`, pixels in [0, 1].
    """
    told = told or true
    weights = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    scale = -1 / told.learning_rate if told.local_steps == 1 else 1.0
    answers = []
    for batch, truth in zip(images, labels, strict=True):
        after = dict(trained(network, batch, truth, true).named_parameters())
        answers.append(
            {name: ((after[name].detach().double() - old.double()) * scale).float() for name, old in weights.items()}
        )
    return (GradientLeak if told.local_steps == 1 else UpdateLeak)(
        observed={name: torch.stack([answer[name] for answer in answers]) for name in weights},
        protocol=told,
        network=copy.deepcopy(network).to("meta"),
        weights=weights,
        buffers={name: buffer.clone() for name, buffer in float_buffers(network).items()},
        clients=torch.arange(len(images)),
        rounds=torch.ones(len(images), dtype=torch.long),
        restarts=torch.zeros(len(images), dtype=torch.long),
        resolution=ROUNDING * abs(scale),
    )


def protocol(**said: Any) -> Protocol:
    """LeNet's on CIFAR-10, one image and one step, but for what is said."""
    return Protocol(
        **({"model": "lenet", "shape": (3, 32, 32), "classes": 10, "batch": 1, "learning_rate": 0.1} | said)
    )
