"""Optional packages that pretrained models need, and how their files are read: nothing pickled, nothing downloaded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fedtap.simulator.data.vision import torchvision
from fedtap.simulator.errors import FedtapError, short

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Files of weights that may run code when they are read."""

LOCAL = {"trust_remote_code": False, "local_files_only": True}
"""No code of a model's author is run, and nothing is downloaded."""


def cache() -> Path:
    """The folder in which this user's models are kept: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedtap"


def text_package(name: str) -> ModuleType:
    """An optional package that texts need.

    Raises:
        FedtapError: it is not installed.
    """
    return optional_package(name, "Pretrained language models and LoRA", "text")


def diffusion_package(name: str) -> ModuleType:
    """An optional package that diffusion models need.

    Raises:
        FedtapError: it is not installed.
    """
    return optional_package(name, "Diffusion models", "diffusion")


def optional_package(name: str, what: str, extra: str) -> ModuleType:
    """A package that comes with an extra of ours.

    Args:
        what: needs it, as the beginning of a sentence.

    Raises:
        FedtapError: it is not installed.
    """
    torchvision()  # transformers, diffusers and peft import it, and cannot where it is built for another torch
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise FedtapError(
            f"{what} need the package {name}, which cannot be imported ({short(error)}): pip install 'fedtap[{extra}]'."
        ) from error


@contextmanager
def model_reading(path: Path, what: str, *packages: str) -> Iterator[None]:
    """Keep transformers and these packages quiet, and turn what they raise into a sentence.

    Args:
        what: is read, such as `a language model`.
    """
    names = ("transformers", *packages)
    with ExitStack() as after:
        for name in names:
            _quiet(text_package(name).utils.logging, after)
        try:
            yield
        except FedtapError:
            raise
        except Exception as error:  # they raise all sorts of a damaged file
            raise FedtapError(
                f"{short(path, 120)} cannot be read as {what} ({short(error, 120)}): it is damaged, or needs another "
                f"version of {' or '.join(names[::-1])}."
            ) from error


def _quiet(log: Any, after: ExitStack) -> None:
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity(log.CRITICAL)
    after.callback(log.set_verbosity, level)
    if bars:
        after.callback(log.enable_progress_bar)


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are not safetensors.

    Raises:
        FedtapError: they are pickled, or there are none.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickled = next((file.name for pattern in PICKLED for file in sorted(folder.glob(pattern))), None)
    if pickled is None:
        raise FedtapError(f"{short(folder, 120)} has no *.safetensors, in which weights are read: fetch them too.")
    raise FedtapError(
        f"{short(folder, 120)} has its weights in {short(pickled)}, which is pickled and may run code when it is read: "
        "load it where you trust it, and save it with save_pretrained(folder, safe_serialization=True)."
    )
