"""The clip."""

from __future__ import annotations

import torch

from fedtap.simulator.defences.clip import Clip
from tests.support.defences import drawn, flat, update


def test_clip_shortens_what_is_too_long_and_nothing_else() -> None:
    gradient = update()
    length = float(flat(gradient).norm())
    torch.testing.assert_close(Clip(length * 1.01)(gradient, drawn()), gradient)
    for name, tensor in Clip(0.5)(gradient, drawn()).items():
        torch.testing.assert_close(tensor, gradient[name] * 0.5 / length)
