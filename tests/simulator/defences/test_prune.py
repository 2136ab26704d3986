"""Pruning."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtap.simulator.defences.prune import Prune
from tests.support.defences import drawn, flat, update


@given(share=st.floats(0, 0.999), seed=st.integers(0, 99), levels=st.integers(1, 4))
def test_prune_keeps_the_largest(share: float, seed: int, levels: int) -> None:
    gradient = {name: (tensor * levels).round() / levels for name, tensor in update(seed=seed).items()}  # with ties
    sent = Prune(share)(gradient, drawn())
    order = sorted(range(17), key=lambda place: (float(flat(gradient)[place].abs()), place))
    wanted = flat(gradient).clone()
    wanted[order[: min(round(share * 17), 16)]] = 0
    assert torch.equal(flat(sent), wanted)
