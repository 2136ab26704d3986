"""One thread (two are many times slower on small tensors), no telemetry, and where the shared data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.shapes import check_shapes

torch.set_num_threads(1)
check_shapes()
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # diffusion models would take every core


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The data root that holds CIFAR-10; skips the test where there is none."""
    root = Path(os.environ.get("FEDTAP_DATA_ROOT", "data"))
    if not (root / "cifar10_32k.npz").is_file():
        pytest.skip(f"{root / 'cifar10_32k.npz'} is absent: set FEDTAP_DATA_ROOT to the folder that holds it")
    return root
