"""Two checkpoints that lie on this machine, as a leak: a pretrained model's folder, and one that was tuned from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file, read_json, read_tensors
from fedtap.simulator.leaks import CheckpointLeak, Protocol, float_buffers
from fedtap.simulator.models.adapters import Lora, merged
from fedtap.simulator.models.pretrained import PICKLED, VOCABULARIES, Pretrained, pretrained, tokenizer

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter's folder, as peft saves it."""

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

PREFIXES = ("base_model.model.", "net.")
"""What peft puts before a layer's name, and what `Pretrained` does."""


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder with a model or an adapter, or a file of pickled weights."""
    return any(is_file(path / name) for name in (ADAPTER, "config.json")) or any(map(path.match, PICKLED))


def checkpoint_leak(base: str, tuned: Path, tokens: int) -> CheckpointLeak:
    """What somebody knows who has both.

    Args:
        base: the model that was tuned, as `fedtap.simulator.models.pretrained` takes it: a folder or a short name.
        tuned: a folder with all weights, or with a LoRA as peft saves it, which is added to the base's.
        tokens: to which documents are cut.

    Raises:
        FedtapError: a folder is missing or damaged, its weights are pickled, or one is not tuned from the other.
    """
    if not base:
        raise FedtapError(
            f"{short(tuned, 100)} is a checkpoint, and what it tells is its difference to the model that it was tuned "
            "from: name that, --base FOLDER."
        )
    before = pretrained(base, 0)
    known = {name: tensor.detach() for name, tensor in before.named_parameters()}
    adapted = is_file(tuned / ADAPTER)
    after = _adapted(before, known, tuned) if adapted else _tuned(known, base, tuned)
    one = torch.ones(1, dtype=torch.long)
    leak = CheckpointLeak(
        observed={name: tensor[None] for name, tensor in after.items()},
        protocol=Protocol(model=base, shape=(tokens,), classes=len(tokenizer(base)), batch=1, optimiser="adamw"),
        network=pretrained(base, None),
        weights=known,
        buffers=float_buffers(before),
        clients=0 * one,
        rounds=one,
        restarts=0 * one,
    )
    leak.check()
    return leak


def _tuned(known: dict[str, Tensor], base: str, folder: Path) -> dict[str, Tensor]:
    if any(map(folder.match, PICKLED)):
        raise FedtapError(
            f"{short(folder, 100)} is pickled, and may run code when it is read: load it where you trust it, and save "
            "it with save_pretrained(FOLDER, safe_serialization=True)."
        )
    own = tokenizer(str(folder)) if any(is_file(folder / name) for name in VOCABULARIES) else None
    if own is not None and own.own.get_vocab() != tokenizer(base).own.get_vocab():
        raise FedtapError(
            f"{short(folder, 80)} has another vocabulary than {short(base, 60)}, so that the same tokens are other "
            "words: name the model that it was tuned from, --base."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in pretrained(str(folder), None).named_parameters()}
    for name in [*known, *shapes]:  # before any weight is read
        ours, theirs = tuple(known[name].shape) if name in known else None, shapes.get(name)
        if ours != theirs:
            raise FedtapError(
                f"{short(folder, 80)} was not tuned from {short(base, 60)}, or has another vocabulary, since "
                f"{short(name)} is {theirs or 'missing'} there and {ours or 'missing'} here: name its own --base."
            )
    return {name: tensor.detach() for name, tensor in pretrained(str(folder), 0).named_parameters()}


def _adapted(before: Pretrained, known: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The base's weights with an adapter added."""
    about = read_json(folder / ADAPTER)
    begun = about.get("init_lora_weights", True)  # some ways to begin an adapter change the base
    if about.get("peft_type") != "LORA" or any(map(about.get, OTHERWISE)) or begun not in (True, False, "gaussian"):
        raise FedtapError(
            f"{short(folder, 100)} holds an adapter that is no plain LoRA: merge it, "
            "model.merge_and_unload().save_pretrained(FOLDER), and give that folder."
        )
    if not is_file(folder / ADAPTER_WEIGHTS):
        raise FedtapError(
            f"{short(folder, 100)} has no {ADAPTER_WEIGHTS}, and pickled ones are not read: load the adapter where you "
            "trust it, and save it with save_pretrained(FOLDER)."
        )
    adapter = {
        f"{PREFIXES[1]}{name.removeprefix(PREFIXES[0])}": tensor.float()
        for name, tensor in read_tensors(folder / ADAPTER_WEIGHTS).items()
    }
    try:
        lora = Lora(about["r"], float(about["lora_alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FedtapError(
            f"{short(folder / ADAPTER, 100)} does not say r and lora_alpha, by which a LoRA counts: save it again."
        ) from error
    return merged(known, adapter, lora, before)
