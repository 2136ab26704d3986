"""Signs."""

from __future__ import annotations

import torch

from fedtap.simulator.defences.sign import Sign
from tests.support.defences import drawn


def test_sign_says_no_size() -> None:
    sent = Sign()({"a": torch.tensor([-3.0, 0.0, 1e-9])}, drawn())
    assert sent["a"].tolist() == [-1.0, 0.0, 1.0]
