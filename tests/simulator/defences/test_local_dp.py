"""Flower's mod as a defence."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.clientapp.mod import LocalDpMod

from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.local_dp import LocalDP
from fedtap.simulator.errors import FedtapError
from tests.support.defences import drawn, update


def test_local_dp_is_flowers_own_mod() -> None:
    gradient, state = update(), np.random.get_state()[1]
    sent = LocalDP(0.5, 1.0, 1e9, 1e-5)(gradient, drawn())  # so large an ε leaves no noise to see
    torch.testing.assert_close(sent, Clip(0.5)(gradient, drawn()), rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.asarray(state), np.asarray(np.random.get_state()[1])), "numpy's generator was moved"
    LocalDpMod(1.0, 1.0, 0.0, 1e-5)  # Flower takes ε = 0, and then sends infinite noise
    with pytest.raises(FedtapError, match="above 0"):
        LocalDP(1.0, 1.0, 0.0, 1e-5)


def test_flowers_mod_is_quiet_in_a_simulation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flwr"):
        LocalDP(1.0, 2.0, 1.0, 1e-5).stacked({"w": torch.ones(1, 3)}, [torch.Generator().manual_seed(0)])
    assert not caplog.records
