"""Noise on what is sent: its spread and its tails."""

from __future__ import annotations

import math

import pytest
import torch

from fedtap.simulator.defences.defence import Update
from fedtap.simulator.defences.laplace import Laplace
from fedtap.simulator.defences.local_dp import LocalDP
from fedtap.simulator.defences.noise import Noise


@pytest.mark.parametrize(
    ("defence", "spread", "tail"),
    [(Noise(0.3), 0.3, 3.0), (Laplace(0.3), 0.3 * math.sqrt(2), 6.0), (LocalDP(1e9, 0.3, 2.0, 0.05), None, 3.0)],
    ids=repr,
)
def test_noise_has_the_spread_and_the_tails_it_says(defence: Update, spread: float | None, tail: float) -> None:
    gradient = {"b": torch.ones(3, 50000), "a": torch.zeros(50000)}
    one, two = (defence(gradient, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for name, tensor in gradient.items():
        noise = one[name] - tensor
        wanted = spread or 0.3 * math.sqrt(2 * math.log(1.25 / 0.05)) / 2.0
        assert float(noise.std()) == pytest.approx(wanted, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0, abs=0.02)
        assert float((noise / noise.std()).pow(4).mean()) == pytest.approx(tail, rel=0.1)  # kurtosis
        assert not torch.isclose(one[name], two[name]).all()
