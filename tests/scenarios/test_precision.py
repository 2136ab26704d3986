"""The bench of wire precision: a leak's stated resolution is the error that its weights' format really causes."""

from __future__ import annotations

import copy

import pytest
import torch

from fedtap.scenarios.bench.precision import exchanged
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.models.registry import build


@pytest.mark.parametrize(
    ("wire", "rate"),
    [
        (torch.float64, 1.0),
        (torch.float64, 0.001),
        (torch.float32, 0.1),
        (torch.float32, 0.001),
        (torch.bfloat16, 1.0),
        (torch.bfloat16, 0.01),
        (torch.float16, 0.1),
        (torch.float16, 0.001),
    ],
)
def test_rounded_weights_err_as_the_leak_says(wire: torch.dtype, rate: float) -> None:
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.rand(2, 3, 32, 32, generator=draw), torch.tensor([1, 7])
    network = build("lenet", (3, 32, 32), 10, seed=1234)
    leak = exchanged(network, images, labels, rate, wire)
    assert leak.weights is not None
    client = copy.deepcopy(network).double()
    client.load_state_dict(dict(leak.weights))
    true = gradients(client, images[:, None].double(), labels[:, None])
    errors = torch.cat([(leak.observed[name].double() - true[name]).flatten() for name in true])
    assert 0.5 < float(errors.square().mean().sqrt()) / leak.resolution < 1.6
