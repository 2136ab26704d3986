"""Quantisation."""

from __future__ import annotations

import math

import pytest
import torch

from fedtap.simulator.defences.quantise import Quantise
from tests.support.defences import drawn, update


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_quantise_rounds_to_its_grid_without_bias(bits: int) -> None:
    gradient = update(seed=4) | {"constant": torch.full((3,), 0.7)}
    draws = [Quantise(bits)(gradient, drawn(trial)) for trial in range(100)]
    for name, tensor in gradient.items():
        sent = torch.stack([draw[name] for draw in draws])
        step = float(tensor.max() - tensor.min()) / (2**bits - 1)
        assert (sent - tensor).abs().max() <= step * 1.001 + 1e-6
        if step:
            place = (sent.double() - tensor.min()) / step
            assert (place - place.round()).abs().max() < 1e-2
        assert (sent.mean(0) - tensor).abs().max() < 5 * step / math.sqrt(100) + 1e-6
