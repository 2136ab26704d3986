"""How the wire's precision and the learning rate bound Exact-GIT: `python -m fedtap.scenarios.bench.precision`.

A FedAvg client sends weights, and a server divides their change by the learning rate: rounding of the weights becomes
an error of the gradient that grows as the rate falls. One step of LeNet (weights of seed 1234) on each of the first
test images of CIFAR-10, weights known, PSNR without the usual cap of 100 dB. Weights of 16 bits are rounded before they
are sent out, too, so that the client trains at the rounded ones, in float32.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.data.images import open_dataset
from fedtap.simulator.leaks import Leak, Protocol, stack
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.threat_models import leak_of_exchange

_RATES = (1.0, 0.1, 0.01, 0.001)
_WIRES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def main(
    victims: Annotated[int, typer.Option(min=1, help="Images, each a victim of its own.")] = 64,
    data_root: Annotated[Path, typer.Option(envvar="FEDTAP_DATA_ROOT")] = Path("data"),
) -> None:
    """Print the median PSNR, and the worst, for each precision of the weights on the wire and each learning rate."""
    torch.set_num_threads(1)
    images, labels = open_dataset("cifar10", data_root).target.batch(slice(victims))
    network = build("lenet", (3, 32, 32), 10, seed=1234)
    print("weights on the wire: PSNR in dB, median (worst), at learning rate", *_RATES, sep="   ")
    for wire in _WIRES:
        cells = []
        for rate in _RATES:
            leak = exchanged(network, images, labels, rate, wire)
            decibels = _psnr(ExactGIT().reconstruct(leak, images[:, None]).images[:, 0], images)
            cells.append(f"{decibels.quantile(0.5):.1f} ({decibels.min():.1f})")
        print(str(wire).removeprefix("torch."), *cells, sep="   ", flush=True)


def exchanged(network: nn.Module, images: Tensor, labels: Tensor, rate: float, wire: torch.dtype) -> Leak:
    """What a server reads off the weights that clients of one image each send back in this precision."""
    before = {name: weight.detach().to(wire) for name, weight in network.named_parameters()}
    worked = torch.float64 if wire == torch.float64 else torch.float32
    client = copy.deepcopy(network).to(worked)
    client.load_state_dict(before)
    found = gradients(client, images[:, None].to(worked), labels[:, None])
    after = {name: (before[name].to(worked) - rate * gradient).to(wire) for name, gradient in found.items()}
    protocol, skeleton = Protocol("lenet", (3, 32, 32), 10, 1, learning_rate=rate), build("lenet", (3, 32, 32), 10)
    leak = stack(
        [
            leak_of_exchange(
                before, {name: sent[victim] for name, sent in after.items()}, protocol, skeleton, victim, 1
            )
            for victim in range(len(images))
        ]
    )
    if wire == torch.float64:  # whose difference the tap keeps in float32
        observed = {name: (before[name] - sent) / rate for name, sent in after.items()}
        leak = dataclasses.replace(leak, observed=observed, weights=before)
    return leak


def _psnr(found: Tensor, images: Tensor) -> Tensor:
    return -10 * (found.double().clamp(0, 1) - images).square().mean((1, 2, 3)).log10()


if __name__ == "__main__":
    typer.run(main)
