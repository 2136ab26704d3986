"""The only file that imports torchvision and lpips: CIFAR-10's arrays, and the LPIPS network with no download."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError

LPIPS_FEATURES = Path(__file__).with_name("lpips_alexnet_features.safetensors")
"""AlexNet's convolutions, as torchvision trained them, in float16 (LPIPS moves by less than 2e-5)."""

_schemas: list[torch.library.Library] = []  # a schema lives as long as the object that defined it


def torchvision() -> ModuleType:
    """torchvision, also where its build is for CUDA and torch's is not.

    Such a build cannot load its compiled operators, and stops at `nms` for want of a schema. Nothing here calls `nms`,
    so the schema alone is enough.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    if not _schemas:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _schemas.append(library)
    return importlib.import_module("torchvision")


def torchvision_datasets() -> ModuleType:
    """The module torchvision.datasets, as `torchvision` gives it.

    Raises:
        ImportError, OSError, RuntimeError: there is none that can be imported.
    """
    torchvision()
    return importlib.import_module("torchvision.datasets")


def cifar10_arrays(data_root: Path) -> dict[str, UInt8[np.ndarray, "*shape"]]:
    """CIFAR-10 through torchvision, downloaded into `data_root` where it is not there yet.

    Returns:
        `x_train y_train x_test y_test`; images are 50,000 and 10,000 of 32 x 32 x 3, in [0, 255].

    Raises:
        FedtapError: torchvision cannot be imported, or the download fails.
    """
    try:
        datasets = torchvision_datasets()
        sides = {
            side: datasets.CIFAR10(str(data_root), train=side == "train", download=True) for side in ("train", "test")
        }
    except (ImportError, OSError, RuntimeError) as error:
        raise FedtapError(
            f"CIFAR-10 is not in {data_root} and could not be downloaded ({_reason(error)}): put a cifar10.npz with "
            "x_train y_train x_test y_test there, name its folder with --data-root, or use --dataset photos."
        ) from error
    images = {f"x_{side}": np.asarray(dataset.data, np.uint8) for side, dataset in sides.items()}
    return images | {f"y_{side}": np.asarray(dataset.targets, np.uint8) for side, dataset in sides.items()}


def alexnet_features() -> dict[str, Tensor]:
    """The weights in LPIPS_FEATURES, by torchvision's names.

    Raises:
        OSError, KeyError, ValueError, SafetensorError: the file is absent or damaged.
    """
    return load_file(LPIPS_FEATURES)


@functools.cache
def lpips_alex() -> nn.Module:
    """LPIPS v0.1 on AlexNet, frozen: `network(one, other, normalize=True)` takes pixels in [0, 1].

    Raises:
        FedtapError: a package or the weights cannot be loaded. A network with random features is never returned.
    """
    try:
        torchvision()
        package = importlib.import_module("lpips")
        features = alexnet_features()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips speaks to torchvision in a way it has deprecated
            network: nn.Module = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        trunk = {name: tensor for name, tensor in network.named_parameters() if name.startswith("net.")}
        # lpips cuts AlexNet into slices and keeps each layer's number: net.slice2.3.weight is features.3.weight.
        loaded = {name: features.pop("features." + name.split(".", 2)[2]).to(trunk[name].dtype) for name in trunk}
        if features:
            raise ValueError(f"the file holds {', '.join(sorted(features))} besides")
        network.load_state_dict(loaded, strict=False)
    except (ImportError, OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise FedtapError(
            f"LPIPS cannot be loaded ({_reason(error)}): install fedtap again, pip install -e ."
        ) from error
    return network.eval().requires_grad_(False)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
