"""Two diffusion models that lie on this machine, as a leak: a base, and a U-Net or a LoRA that was tuned from it.

Both are in diffusers' format. What is tuned is the U-Net; of a pipeline, all else is taken from the base.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file, read_json, read_tensors
from fedtap.simulator.leaks import CheckpointLeak, Protocol, float_buffers
from fedtap.simulator.models.adapters import Lora, merged
from fedtap.simulator.models.diffusion import Denoiser, denoiser, frozen, is_diffusion
from fedtap.simulator.models.packages import PICKLED, check_weights
from fedtap.simulator.models.pretrained import PACKAGED
from fedtap.simulator.wire.lora_files import ADAPTER, is_lora, left_out, read_adapter, read_lora, stored_shapes

WEIGHTS = "diffusion_pytorch_model"
"""What diffusers' files of weights begin with."""


def diffusion_leak(base: str, tuned: Path, private: int, prompt: str) -> CheckpointLeak:
    """What somebody knows who has both.

    Args:
        base: a folder with a U-Net, or with a pipeline.
        tuned: such a folder, a LoRA as diffusers saves it, or an adapter's folder as peft does.
        private: images that the client has.
        prompt: their caption, as far as it is known; * is a word that is not.

    Raises:
        FedtapError: a folder is missing or damaged, its weights are pickled, or one is not tuned from the other.
    """
    _check_kinds(base, tuned)
    architecture = denoiser(base, None)
    adapters = []
    if is_diffusion(str(tuned)):
        _check_tuned(base, tuned, architecture)
    else:
        adapters = [read_adapter(tuned)] if is_file(tuned / ADAPTER) else read_lora(tuned)
        _with_adapters(_parameters(architecture), adapters, architecture)  # before any weight is read
    image_shape = frozen(base).image_shape
    before = denoiser(base, 0)
    known = _parameters(before)
    after = _with_adapters(known, adapters, before) if adapters else _parameters(denoiser(str(tuned), 0))
    # tensors of a leak share no memory, since safetensors refuses those that do
    after = {name: tensor.clone() if tensor is known[name] else tensor for name, tensor in after.items()}
    one = torch.ones(1, dtype=torch.long)
    leak = CheckpointLeak(
        observed={name: tensor[None] for name, tensor in after.items()},
        protocol=Protocol(
            model=str(Path(base).expanduser().resolve()),
            shape=image_shape,
            classes=1,
            batch=1,
            optimiser="adamw",
            prompt=prompt.strip(),
        ),
        network=architecture,
        weights=known,
        buffers=float_buffers(before),
        clients=0 * one,
        rounds=one,
        restarts=0 * one,
        examples=private * one,
    )
    leak.check()
    return leak


def _parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in net.named_parameters()}


def _with_adapters(
    known: Mapping[str, Tensor], adapters: Sequence[tuple[dict[str, Tensor], Lora]], net: Denoiser
) -> dict[str, Tensor]:
    """The weights with all adapters added; on the meta device, where these are, only names and shapes are checked."""
    found = dict(known)
    for adapter, lora in adapters:
        placed = {f"net.{name}": tensor.to(next(iter(found.values())).device) for name, tensor in adapter.items()}
        found = merged(found, placed, lora, net)
    return found


def _check_kinds(base: str, tuned: Path) -> None:
    """Refuse a language model beside a diffusion model, and what is neither weights nor a LoRA."""
    if not is_diffusion(base):
        if base in PACKAGED or base.endswith(".gguf") or _is_language(Path(base).expanduser()):
            raise FedtapError(
                f"{short(tuned, 100)} is tuned from a diffusion model, and {short(base, 80)} is a language model: name "
                "the folder of the diffusion model, --base FOLDER."
            )
        return  # `denoiser` says what is missing
    if is_diffusion(str(tuned)) or is_file(tuned / ADAPTER) or is_lora(tuned):
        return
    if any(map(tuned.match, PICKLED)):
        raise FedtapError(
            f"{short(tuned, 100)} is pickled, and may run code when it is read: load it where you trust it "
            "(StableDiffusionPipeline.from_single_file), and save it with save_pretrained(FOLDER)."
        )
    what = "a language model" if _is_language(tuned) else "no U-Net and no LoRA"
    raise FedtapError(
        f"{short(tuned, 100)} holds {what}, and {short(base, 80)} is a diffusion model: give a folder that was tuned "
        "from it, or name another --base."
    )


def _is_language(folder: Path) -> bool:
    """Whether there is a model of transformers in this folder: its config says its type, and diffusers' do not."""
    return is_file(folder / "config.json") and "model_type" in read_json(folder / "config.json")


def _check_tuned(base: str, tuned: Path, ours: Denoiser) -> None:
    """Refuse a U-Net that was not tuned from the base's, by its configuration and the shapes of its weights; warn of a
    text encoder that was tuned too."""
    theirs = denoiser(str(tuned), None)
    for name, value in ours.net.config.items():
        if not name.startswith("_") and theirs.net.config[name] != value:
            raise _not_tuned(base, tuned, f"{name} is {short(theirs.net.config[name], 40)}", short(value, 40))
    folder = tuned / "unet" if is_file(tuned / "model_index.json") else tuned
    check_weights(folder)
    whole = folder / f"{WEIGHTS}.safetensors"
    files = [whole] if is_file(whole) else sorted(folder.glob(f"{WEIGHTS}-*.safetensors"))
    stored = {name: shape for file in files for name, shape in stored_shapes(file).items()}
    for name, tensor in ours.net.named_parameters() if stored else ():
        if stored.get(name) != tuple(tensor.shape):
            what = f"{short(name)} is {stored.get(name, 'missing')}"
            raise _not_tuned(base, tuned, what, str(tuple(tensor.shape)))
    known, changed = (_text_encoder(Path(folder).expanduser()) for folder in (base, tuned))
    if known and changed and not (known.keys() == changed.keys() and all(_alike(known[n], changed[n]) for n in known)):
        warnings.warn(left_out(tuned), stacklevel=4)


def _not_tuned(base: str, tuned: Path, theirs: str, ours: str) -> FedtapError:
    return FedtapError(
        f"{short(tuned, 80)} was not tuned from {short(base, 60)}, since {theirs} there and {ours} here: name its own "
        "--base."
    )


def _text_encoder(folder: Path) -> dict[str, Tensor]:
    """Its weights by the names that all versions of transformers have in common; none where the folder has none."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = read_tensors(file) if is_file(file) else {}
    return {
        name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.half(), other.half())  # one of the two may be saved in half precision
