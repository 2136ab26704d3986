"""How often the certificate of exact_batch is wrong, both ways: `python -m fedtap.scenarios.bench.certificates`.

Gradients of batches of eight auxiliary images of CIFAR-10 at half their size, on FedAvg's float32 weights. Each true
batch is attacked, and has to be certified. Each is then made wrong in one image or label: noise that leaves it 15 to 30
dB, a blend with another image of the batch, an image of another batch, or another label; none of these may be.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from fedtap.attackers.gradients.exact_batch import ExactBatch, certificate
from fedtap.simulator import scores
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.data.images import open_dataset
from fedtap.simulator.leaks import ROUNDING, GradientLeak, Protocol
from fedtap.simulator.models.registry import build

_MODEL, _SHAPE, _BATCH, _RATE = "mlp(width=256, depth=1)", (3, 16, 16), 8, 0.1

_TRIES = 20
"""Wrong reconstructions of each batch, five of each kind."""

_RECOVERED = 30.0
"""PSNR in dB below which an image is wrong."""


def main(
    many: Annotated[int, typer.Option(min=1, help="Batches; each gives 20 wrong reconstructions.")] = 500,
    data_root: Annotated[Path, typer.Option(envvar="FEDTAP_DATA_ROOT")] = Path("data"),
) -> None:
    """Count true results that are certified, and wrong ones."""
    torch.set_num_threads(1)
    side = open_dataset("cifar10", data_root).auxiliary
    missed = false = wrong = 0
    for number in range(many):
        images, labels = side.batch(torch.arange(number * _BATCH, (number + 1) * _BATCH) % len(side))
        strangers, _ = side.batch((torch.arange(_BATCH) - (number + 1) * _BATCH) % len(side))
        images, strangers = F.avg_pool2d(images, 2), F.avg_pool2d(strangers, 2)
        leak = _leak(images, labels, seed=number)
        missed += not bool(ExactBatch()(leak).certified)
        there, named = spoiled(images, labels, strangers, torch.Generator().manual_seed(number))
        errors = (there - images).square().flatten(2).mean(2)
        bad = (scores.psnr(errors) < _RECOVERED).any(1) | (named != labels).any(1)
        _, holds = certificate(leak.repeat(_TRIES), there, named)
        wrong += int(bad.sum())
        false += int((holds & bad).sum())
        if (done := number + 1) == many or done % 25 == 0:
            print(f"certified: {done - missed} of {done} true batches, {false} of {wrong} wrong reconstructions")


def spoiled(images: Tensor, labels: Tensor, strangers: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The batch `_TRIES` times, each wrong in one image or label."""
    there, named = images.repeat(_TRIES, 1, 1, 1, 1), labels.repeat(_TRIES, 1)
    for number in range(_TRIES):
        one, other = torch.randperm(_BATCH, generator=draw)[:2].tolist()
        amount = float(torch.rand((), generator=draw))
        if number % 4 == 0:
            size = 10 ** -(0.75 + 0.75 * amount)
            there[number, one] += size * torch.randn(images[one].shape, generator=draw)
        elif number % 4 == 1:
            there[number, one] += (0.2 + 0.8 * amount) * (images[other] - images[one])
        elif number % 4 == 2:
            there[number, one] = strangers[one]
        else:
            named[number, one] = (labels[one] + 1 + int(9 * amount)) % 10
    return there.clamp(0, 1), named


def _leak(images: Tensor, labels: Tensor, seed: int) -> GradientLeak:
    """What a server reads off the float32 weights of a client after one step."""
    network = build(_MODEL, _SHAPE, 10, seed=seed)
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    found = gradients(network, images[None], labels[None])
    one = torch.zeros(1, dtype=torch.long)
    leak = GradientLeak(
        observed={
            name: (weights[name] - (weights[name] - _RATE * gradient)) / _RATE for name, gradient in found.items()
        },
        protocol=Protocol(_MODEL, _SHAPE, 10, _BATCH, learning_rate=_RATE),
        network=build(_MODEL, _SHAPE, 10),
        weights=weights,
        buffers={},
        clients=one,
        rounds=one + 1,
        restarts=one,
    )
    return dataclasses.replace(leak, resolution=ROUNDING / _RATE)


if __name__ == "__main__":
    typer.run(main)
