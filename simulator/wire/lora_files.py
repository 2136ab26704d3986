"""LoRAs in files, as peft saves them, and as diffusers saves those of a U-Net. What is pickled is not read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file, parse_json, read_json, read_tensors
from fedtap.simulator.models.adapters import Lora
from fedtap.simulator.models.packages import diffusion_package

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter's folder, as peft saves it."""

LORA_WEIGHTS, PICKLED_LORA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
"""The file of a LoRA's folder, as diffusers saves it, and as its former versions did."""

OTHERWISE = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
)
"""Settings of an adapter with which it does something else than add ``alpha / r B A``."""

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings, in the header of a LoRA's file."""

FUSE = (
    "merge it in diffusers (load_lora_weights, fuse_lora, unload_lora_weights, unet.save_pretrained(FOLDER)) and give "
    "that FOLDER."
)
"""The way for a LoRA that is not read here."""


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], Lora]:
    """Layers of an adapter that peft saved, by the plain names of `fedtap.simulator.models.adapters`, and its sizes.

    Raises:
        FedtapError: it is damaged, its weights are pickled, or it is no plain LoRA.
    """
    about = read_json(folder / ADAPTER)
    if about.get("peft_type") != "LORA" or not _plain(about):
        raise FedtapError(
            f"{short(folder, 100)} holds an adapter that is no plain LoRA: merge it, "
            "model.merge_and_unload().save_pretrained(FOLDER), and give that folder."
        )
    if not is_file(folder / ADAPTER_WEIGHTS):
        raise FedtapError(
            f"{short(folder, 100)} has no {ADAPTER_WEIGHTS}, and pickled ones are not read: load the adapter where you "
            "trust it, and save it with save_pretrained(FOLDER)."
        )
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    adapter = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}
    try:
        return adapter, Lora(about["r"], float(about["lora_alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FedtapError(
            f"{short(folder / ADAPTER, 100)} does not say r and lora_alpha, by which a LoRA counts: save it again."
        ) from error


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, none of which is read.

    Raises:
        FedtapError: it is of another format, or cut short.
    """
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FedtapError(
            f"{short(file, 120)} cannot be read as safetensors ({short(error)}): it is truncated or of another format; "
            "save it again."
        ) from error


def is_lora(path: Path) -> bool:
    """Whether this is a LoRA as diffusers saves it, a file or a folder, and no leak with a LoRA in it."""
    if any(is_file(path / name) for name in (LORA_WEIGHTS, PICKLED_LORA)):
        return True
    if path.suffix != ".safetensors" or not is_file(path) or is_file(path.with_suffix(".json")):
        return False
    try:
        names = stored_shapes(path)
    except FedtapError:
        return False
    return "clients" not in names and any("lora" in name for name in names)


def read_lora(path: Path) -> list[tuple[dict[str, Tensor], Lora]]:
    """Layers of a U-Net's LoRA that diffusers saved, by their plain names, those of a rank and an alpha together.

    Layers of the text encoder are left out, with a warning.

    Args:
        path: the file, or the folder with it.

    Raises:
        FedtapError: it is damaged or pickled, or no plain LoRA on linear layers of a U-Net.
    """
    file = path / LORA_WEIGHTS if path.is_dir() else path
    if not is_file(file):
        raise FedtapError(
            f"{short(path, 100)} has its LoRA in {PICKLED_LORA}, which is pickled and may run code when it is read: "
            "load it where you trust it, and save it with save_lora_weights(FOLDER, safe_serialization=True)."
        )
    tensors = read_tensors(file)
    names = [name for name in tensors if not name.startswith("text_encoder")]
    if not names:
        raise FedtapError(
            f"{short(file, 100)} holds no LoRA of a U-Net, from whose change images are extracted: give one that was "
            "tuned on images."
        )
    if len(names) < len(tensors):
        warnings.warn(left_out(file), stacklevel=4)
    peft = diffusion_package("diffusers").utils.convert_unet_state_dict_to_peft
    layers: dict[str, Tensor] = peft({name.removeprefix("unet."): tensors[name] for name in names})
    alphas = {name: layers.pop(name) for name in list(layers) if name.endswith(".alpha")}
    adapted = dict.fromkeys(name.partition(".lora_")[0] for name in layers)
    halves = {layer: (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight") for layer in adapted}
    strange = set(layers) ^ {name for both in halves.values() for name in both}
    strange |= {name for name in alphas if name.removesuffix(".alpha") not in adapted or alphas[name].numel() != 1}
    if strange:
        raise FedtapError(
            f"{short(file, 80)} holds {short(min(strange), 40)}, which is no part of a plain LoRA of diffusers: {FUSE}"
        )
    if folded := [name for name in layers if layers[name].ndim != 2]:
        raise FedtapError(
            f"{short(file, 60)} adapts convolutions ({short(min(folded), 40)}), and LoRAs of linear layers alone are "
            f"read here: {FUSE}"
        )
    about = _settings(file)
    found: dict[Lora, dict[str, Tensor]] = {}
    for layer, (a, b) in halves.items():
        rank, alpha = about or (len(layers[a]), float(len(layers[a])))
        if f"{layer}.alpha" in alphas:
            alpha = float(alphas[f"{layer}.alpha"])
        found.setdefault(_lora(rank, alpha, file), {}).update({name: layers[name].float() for name in (a, b)})
    return [(adapter, lora) for lora, adapter in found.items()]


def left_out(path: Path) -> str:
    """The warning of a text encoder that was tuned too."""
    return (
        f"{short(path, 100)} changes the text encoder too, which is left out: samples are drawn by the text encoder of "
        "--base, and their captions mean less to it."
    )


def _settings(file: Path) -> tuple[Any, Any] | None:
    """Rank and alpha that diffusers wrote into the header of a U-Net's LoRA; None where there are none."""
    with safe_open(file, "pt") as opened:
        raw = (opened.metadata() or {}).get(METADATA)
    if raw is None:
        return None
    told = parse_json(raw.encode(), file)
    about = {name.removeprefix("unet."): value for name, value in told.items()} if isinstance(told, dict) else {}
    if not _plain(about):
        raise FedtapError(f"{short(file, 100)} holds an adapter that is no plain LoRA: {FUSE}")
    return (about["r"], about["lora_alpha"]) if {"r", "lora_alpha"} <= about.keys() else None


def _plain(about: Mapping[str, Any]) -> bool:
    begun = about.get("init_lora_weights", True)  # some ways to begin an adapter change the base
    return not any(map(about.get, OTHERWISE)) and begun in (True, False, "gaussian")


def _lora(rank: Any, alpha: Any, file: Path) -> Lora:
    try:
        return Lora(rank, alpha)
    except FedtapError as error:
        raise FedtapError(
            f"{short(file, 100)} says a rank or an alpha that no LoRA has ({short(error)}): save it again."
        ) from error
