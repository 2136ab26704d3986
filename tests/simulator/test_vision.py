"""torchvision loads also where its build does not fit torch's, LPIPS needs no download, and neither is loaded early."""

from __future__ import annotations

import base64
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save

from fedtap.simulator.data import vision
from fedtap.simulator.errors import FedtapError


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    vision.lpips_alex.cache_clear()
    yield
    vision.lpips_alex.cache_clear()


def test_scores_and_report_and_datasets_do_not_load_torchvision() -> None:
    code = (
        "import sys, fedtap.simulator.scores, fedtap.simulator.report.page, fedtap.simulator.data.images; "
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_torchvision_loads_and_a_second_time_too() -> None:
    first = vision.torchvision()
    assert vision.torchvision() is first
    assert importlib.import_module("torchvision.datasets").CIFAR10


def test_a_torchvision_with_another_fault_is_not_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("driver too old\nand more")

    monkeypatch.setattr(vision.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="driver too old"):
        vision.torchvision()
    with pytest.raises(FedtapError, match=r"LPIPS cannot be loaded \(driver too old\): install fedtap again"):
        vision.lpips_alex()


def test_lpips_is_quiet_frozen_and_leaves_the_random_numbers_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    network = vision.lpips_alex()
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert vision.lpips_alex() is network


def test_lpips_has_every_feature_from_the_file() -> None:
    features = vision.alexnet_features()
    held = {name: p for name, p in vision.lpips_alex().named_parameters() if name.startswith("net.")}
    assert len(held) == len(features) == 10
    for name, parameter in held.items():
        assert torch.equal(parameter, features["features." + name.split(".", 2)[2]].float())


@pytest.mark.parametrize("fault", ["absent", "truncated", "a layer missing", "a layer too many", "misshapen"])
def test_lpips_without_sound_weights_is_refused(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "features.json", vision.alexnet_features()

    def write(tensors: dict[str, torch.Tensor]) -> None:
        path.write_text(json.dumps({"safetensors": base64.b64encode(save(tensors)).decode()}))

    if fault == "truncated":
        path.write_bytes(vision.LPIPS_FEATURES.read_bytes()[:1000])
    elif fault == "a layer missing":
        write({name: tensor for name, tensor in whole.items() if name != "features.8.bias"})
    elif fault == "a layer too many":
        write(whole | {"features.12.bias": torch.zeros(1)})
    elif fault == "misshapen":
        write(whole | {"features.8.bias": torch.zeros(1)})
    monkeypatch.setattr(vision, "LPIPS_FEATURES", path)
    with pytest.raises(FedtapError, match="LPIPS cannot be loaded"):
        vision.lpips_alex()


def test_cifar10_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision.torchvision()

    def dataset(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert (root, download) == (str(tmp_path), True)
        count = 5 if train else 2
        return SimpleNamespace(data=np.full((count, 32, 32, 3), count, np.uint8), targets=list(range(count)))

    monkeypatch.setattr(importlib.import_module("torchvision.datasets"), "CIFAR10", dataset)
    arrays = vision.cifar10_arrays(tmp_path)
    assert {name: array.shape for name, array in arrays.items()} == {
        "x_train": (5, 32, 32, 3),
        "y_train": (5,),
        "x_test": (2, 32, 32, 3),
        "y_test": (2,),
    }
    assert arrays["y_test"].tolist() == [0, 1]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision.torchvision()

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(importlib.import_module("torchvision.datasets"), "CIFAR10", offline)
    with pytest.raises(
        FedtapError, match=r"no route to host.*put a cifar10\.npz .* --data-root, or use --dataset photos"
    ):
        vision.cifar10_arrays(tmp_path)
