"""Two checkpoints that lie on this machine, as a leak: a pretrained model's folder, and one that was tuned from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file
from fedtap.simulator.leaks import CheckpointLeak, Protocol, float_buffers
from fedtap.simulator.models.adapters import merged
from fedtap.simulator.models.diffusion import is_diffusion
from fedtap.simulator.models.packages import PICKLED
from fedtap.simulator.models.pretrained import VOCABULARIES, pretrained, tokenizer
from fedtap.simulator.wire.diffusion_checkpoints import diffusion_leak
from fedtap.simulator.wire.lora_files import ADAPTER, is_lora, read_adapter

PRIVATE = 4
"""Images on which a diffusion model was tuned, unless said."""


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder with a model or an adapter, a diffusion model's LoRA, or a file of pickled weights."""
    folder = any(is_file(path / name) for name in (ADAPTER, "config.json", "model_index.json"))
    return folder or any(map(path.match, PICKLED)) or is_lora(path)


def checkpoint_leak(base: str, tuned: Path, tokens: int, private: int = PRIVATE, prompt: str = "") -> CheckpointLeak:
    """What somebody knows who has both.

    Args:
        base: the model that was tuned: a folder of a diffusion model, or a language model as
            `fedtap.simulator.models.pretrained` takes it, a folder or a short name.
        tuned: a folder with all weights, or with a LoRA as peft saves it, which is added to the base's; of a diffusion
            model, also a LoRA as diffusers saves it.
        tokens: to which documents are cut.
        private: images that the client has.
        prompt: their caption, as far as it is known; * is a word that is not.

    Raises:
        FedtapError: a folder is missing or damaged, its weights are pickled, or one is not tuned from the other.
    """
    if not base:
        raise FedtapError(
            f"{short(tuned, 100)} is a checkpoint, and what it tells is its difference to the model that it was tuned "
            "from: name that, --base FOLDER."
        )
    if is_diffusion(base) or is_diffusion(str(tuned)) or is_lora(tuned):
        return diffusion_leak(base, tuned, private, prompt)
    before = pretrained(base, 0)
    known = {name: tensor.detach() for name, tensor in before.named_parameters()}
    if is_file(tuned / ADAPTER):
        adapter, lora = read_adapter(tuned)
        after = merged(known, {f"net.{name}": tensor for name, tensor in adapter.items()}, lora, before)
    else:
        after = _tuned(known, base, tuned)
    # tensors of a leak share no memory, since safetensors refuses those that do
    after = {name: tensor.clone() if tensor is known[name] else tensor for name, tensor in after.items()}
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
