"""Pretraining of a small text-conditional diffusion model from nothing, on public images, once: what clients tune.

A U-Net on pixels that predicts noise (Ho, Jain, Abbeel, NeurIPS 2020, https://arxiv.org/abs/2006.11239) on the cosine
schedule (Nichol, Dhariwal, ICML 2021, https://arxiv.org/abs/2102.09672), and at times sees no caption, so that it can
be guided (Ho, Salimans 2022, https://arxiv.org/abs/2207.12598). Departs from them in two ways: captions are read by a
frozen all-MiniLM-L6-v2, and the network and its training are far smaller, so that samples are coarse.

Cost: at 32 pixels and width 48 (5.7 million weights), with one thread on a core of an AMD EPYC that other work shared,
a step took 1.6 to 2.2 s of processor time for 16 images, and 3.5 to 4.5 s for 32. The default, 1,500 steps of 16, is
then 40 to 55 minutes of one core. Neither several cores nor a GPU were timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fedtap.simulator.attack import generator
from fedtap.simulator.data.images import NO_LABELS, Dataset, open_dataset
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import check_writable, is_file, read_json, read_tensors, remove_leftovers, write_atomically
from fedtap.simulator.models.diffusion import Denoiser, Frozen, all_threads, frozen
from fedtap.simulator.models.diffusion_training import DiffusionTraining
from fedtap.simulator.models.packages import diffusion_package
from fedtap.simulator.progress import progress

TEMPLATES = ("a photo of a {}", "a picture of a {}", "{}")
"""Captions of an image, with the name of its class; one is drawn each time."""

NULL = 0.12
"""Share of the images that are shown under the empty caption, the null condition of guidance."""

DECAY = 0.999
"""Of the moving average of the weights; at step t of a young training (1 + t) / (10 + t), where that is less."""

WARM_UP = 100
"""Steps in which the learning rate rises to its value."""

STEEPEST = 1.0
"""Norm to which a step's gradient is cut."""

EVERY = 200
"""Steps between checkpoints."""

PRETRAINED_SIZES, WIDTHS = range(16, 129, 4), range(16, 513, 16)
"""Pixels a side, which are halved twice; base channels, which group normalisation has in 16 groups."""

UNFINISHED, ABOUT = "unfinished", "fedtap.json"
_MODEL = ("diffusion_pytorch_model.safetensors", "scheduler_config.json", "config.json")


@dataclass(frozen=True)
class Pretraining:
    """What a diffusion model is pretrained on, and how.

    Raises:
        FedtapError: a value with which nothing can be trained.
    """

    datasets: tuple[str, ...] = ("photos",)
    """Names or paths, as `open_dataset` takes them. Their auxiliary and training sides are read, never the target's."""
    size: int = 32
    """Pixels a side, one of PRETRAINED_SIZES."""
    width: int = 48
    """Channels of the U-Net's first block, one of WIDTHS; the others have twice and 8/3 of it."""
    steps: int = 1500
    """Of the optimiser, AdamW with torch's other settings."""
    batch: int = 16
    """Images in a step."""
    learning_rate: float = 5e-4
    """Of the optimiser, after the warm-up."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise FedtapError("A diffusion model cannot be pretrained on no images: name a --dataset, such as photos.")
        if self.size not in PRETRAINED_SIZES:
            raise FedtapError(
                f"The U-Net halves its images twice and takes {PRETRAINED_SIZES[0]} to {PRETRAINED_SIZES[-1]} pixels a "
                f"side, so {short(self.size)} cannot be: give a --size that 4 divides, such as 32."
            )
        if self.width not in WIDTHS:
            raise FedtapError(
                f"The U-Net normalises its channels in 16 groups, so a width of {short(self.width)} cannot be: give a "
                f"--width of {WIDTHS[0]} to {WIDTHS[-1]} that 16 divides, such as 48."
            )
        for name, value, most in (("steps", self.steps, 10**7), ("batch", self.batch, 4096)):
            if not 1 <= value <= most:
                raise FedtapError(f"Nothing can be trained with --{name} {short(value)}: give 1 to {most:,}.")
        if not 0 < self.learning_rate <= 1:
            raise FedtapError(
                f"A learning rate of {short(self.learning_rate)} trains nothing: give --learning-rate above 0 and at "
                "most 1, such as 5e-4."
            )
        if not 0 <= self.seed < 2**63:
            raise FedtapError(f"A seed of {short(self.seed)} is none of a generator's: give --seed of 0 or more.")

    def unet(self) -> dict[str, Any]:
        """The configuration of diffusers' UNet2DConditionModel."""
        return {
            "sample_size": self.size,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (self.width, 2 * self.width, 16 * round(self.width / 6)),
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "attention_head_dim": 4,  # which diffusers reads as the number of heads
            "cross_attention_dim": 384,  # of MiniLM
        }


def cache_folder(size: int = Pretraining.size) -> Path:
    """Where the model of this size lies where no other folder is named: in XDG_CACHE_HOME, or ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fedtap" / f"diffusion-{size}"


def cached_model() -> Path:
    """The folder of the model that `fedtap pretrain diffusion` left in the cache.

    Raises:
        FedtapError: there is none, or its training is not finished.
    """
    folder = cache_folder()
    if all(is_file(folder / name) for name in (*_MODEL, ABOUT)):
        return folder
    begun = "only begun" if is_file(folder / UNFINISHED / ABOUT) else "not trained yet"
    raise FedtapError(
        f"The diffusion model that is used where none is named is {begun} ({short(folder, 80)}): run `fedtap pretrain "
        "diffusion`, which takes a while once, or give --weights FOLDER."
    )


def pretrain(
    out: Path,
    setting: Pretraining,
    data_root: Path,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    every: int = EVERY,
) -> None:
    """Train a diffusion model and leave it in a folder, in diffusers' format; one that is there already stays.

    A training that was killed goes on from its last checkpoint and ends, up to rounding, as if nothing had been: what
    is drawn in a step is a function of the seed and the step.

    Args:
        out: of the finished model: config.json, diffusion_pytorch_model.safetensors, scheduler_config.json, and
            fedtap.json, which says what it was trained on. Until then, checkpoints are in its folder `unfinished`.
        data_root: where datasets lie.
        overwrite: remove what another, or the same, pretraining left in the folder.
        every: steps between checkpoints.

    Raises:
        FedtapError: a package or dataset is missing, images are of another size, the folder cannot be written, holds
            something else, or a training with other settings, or the training diverged.
    """
    diffusers = diffusion_package("diffusers")
    check_writable(out)
    public = _public(setting, data_root)
    about = _described(setting, public)
    begun = _begun(out, about, overwrite)
    if begun is None:
        return
    net, around = _untrained(diffusers, setting)
    net.to(device).train()
    averaged = {name: parameter.detach().clone() for name, parameter in net.net.named_parameters()}
    optimiser = torch.optim.AdamW(net.parameters(), lr=setting.learning_rate)
    if begun:
        _restore(out / UNFINISHED, begun, net, averaged, optimiser)
    else:
        _note(out / UNFINISHED, about, 0)

    @lru_cache(maxsize=4096)
    def said(caption: str) -> Float[Tensor, "tokens width"]:
        return around.condition([caption], device)[0]

    with all_threads():
        for step in progress(range(begun, setting.steps), "pretraining"):
            optimiser.param_groups[0]["lr"] = setting.learning_rate * min(1, (step + 1) / WARM_UP)
            optimiser.zero_grad()
            loss = _loss(net, around, public, setting, step, said, device)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), STEEPEST)
            optimiser.step()
            _average(averaged, net, step + 1)
            if (step + 1) % every == 0 or step + 1 == setting.steps:
                _check_finite(loss, step + 1)
                _save(out / UNFINISHED, about, step + 1, net, averaged, optimiser)
    net.net.load_state_dict(averaged)
    _finish(out, diffusers, net, around, about)


@dataclass(frozen=True, eq=False)
class _Public:
    """Images, and of each the name of what it shows."""

    images: UInt8[Tensor, "images 3 height width"]
    names: list[str]


def _public(setting: Pretraining, data_root: Path) -> _Public:
    """The auxiliary and training sides of the datasets, one after the other."""
    images, names = [], []
    for name in setting.datasets:
        dataset = open_dataset(name, data_root, setting.size)
        classes = _classes(dataset)
        for side in (dataset.auxiliary, dataset.train):
            channels, *sides = side.images.shape[1:]
            if sides != [setting.size] * 2:
                raise FedtapError(
                    f"The images of {short(name)} are {'x'.join(map(str, sides))} pixels, and the model's are of "
                    f"{setting.size}: give the --size that they have, or a folder or zip, whose images are resized."
                )
            images.append(side.images.expand(-1, 3, -1, -1) if channels == 1 else side.images)
            names += [classes[label] for label in side.labels.tolist()]
    return _Public(torch.cat(images), names)


def _classes(dataset: Dataset) -> list[str]:
    """What images of each class show, in words; where there are no labels, all of them what the dataset's name says."""
    if dataset.note.startswith(f"All images of {dataset.name} are target data"):
        raise FedtapError(
            f"{short(dataset.name)} has one class or fewer than 24 images, so all of them are target data, which is "
            "never trained on: name a --dataset of more, in a folder for each class."
        )
    unlabelled = NO_LABELS.format(dataset.name).strip() in dataset.note
    names = [dataset.name] * len(dataset.classes) if unlabelled else dataset.classes
    return [name.replace("_", " ") for name in names]


def _described(setting: Pretraining, public: _Public) -> dict[str, Any]:
    """What fedtap.json says; what a training that goes on has to share is all but the versions."""
    digest = hashlib.blake2b(public.images.numpy().tobytes(), digest_size=16)
    digest.update("\n".join(public.names).encode())
    versions = {name: metadata.version(name) for name in ("fedtap", "torch", "diffusers")}
    about = asdict(setting) | {
        "sides": ["auxiliary", "train"],
        "images": len(public.names),
        "images_blake2b": digest.hexdigest(),
        "captions": [*TEMPLATES, ""],
        "null_captions": NULL,
        "ema": DECAY,
        "versions": versions,
    }
    found: dict[str, Any] = json.loads(json.dumps(about))
    return found


def _begun(out: Path, about: Mapping[str, Any], overwrite: bool) -> int | None:
    """The step at which the training in this folder goes on; None where it is finished.

    Raises:
        FedtapError: the folder holds something else, or a training with other settings.
    """
    finished, unfinished = out / ABOUT, out / UNFINISHED / ABOUT
    ours = is_file(finished) or is_file(unfinished)
    if not ours and out.is_dir() and (strange := {path.name for path in out.iterdir()} - {UNFINISHED}):
        raise FedtapError(
            f"{short(out, 120)} holds something else than a pretraining ({short(min(strange))}), and nothing of it "
            "will be replaced: name another folder, --out."
        )
    if overwrite:
        _remove(out)
    for file in (finished, unfinished):
        if not is_file(file):
            continue
        before = read_json(file)
        other = [name for name in about if name != "versions" and before.get(name) != about[name]]
        if other:
            raise FedtapError(
                f"{short(out, 80)} holds a pretraining with {other[0]} {short(before.get(other[0]), 40)} and not "
                f"{short(about[other[0]], 40)}: give --overwrite to remove it, or name another folder, --out."
            )
        if file == finished:
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # if it was killed just then
            return None
        remove_leftovers(out / UNFINISHED)
        step = before.get("step")
        if type(step) is not int or not 0 <= step <= about["steps"]:
            raise FedtapError(
                f"{short(file, 120)} names step {short(step, 20)} of a training of {about['steps']}, so it is damaged: "
                "give --overwrite to begin anew."
            )
        return step
    return 0


def _remove(out: Path) -> None:
    """Take away what a pretraining leaves, and nothing else; what says that it is finished goes first."""
    try:
        for name in (ABOUT, *_MODEL):
            (out / name).unlink(missing_ok=True)
        if (out / UNFINISHED).is_dir():
            shutil.rmtree(out / UNFINISHED)
    except OSError as error:
        raise FedtapError(
            f"{short(out, 120)} cannot be overwritten ({short(error.strerror)}): see to its permissions, or name "
            "another folder, --out."
        ) from error


def _untrained(diffusers: Any, setting: Pretraining) -> tuple[Denoiser, Frozen]:
    """A U-Net that the seed draws, and what is around any U-Net that comes alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        unet = diffusers.UNet2DConditionModel(**setting.unet())
    with tempfile.TemporaryDirectory() as folder:
        unet.save_config(folder)
        return Denoiser(unet), frozen(folder)


def _loss(
    net: Denoiser,
    around: Frozen,
    public: _Public,
    setting: Pretraining,
    step: int,
    said: Callable[[str], Float[Tensor, "tokens width"]],
    device: torch.device | str,
) -> Float[Tensor, ""]:
    """That of one step: images in turns, flipped half of the time, each under a caption that is drawn."""
    draw = generator(setting.seed, "pretraining", step)
    some = _turn(len(public.names), setting, step)
    images = public.images[some].float() / 255
    flipped = torch.rand(len(some), 1, 1, 1, generator=draw) < 0.5
    images = torch.where(flipped, images.flip(-1), images)
    condition = torch.stack([said(_caption(public.names[number], draw)) for number in some.tolist()])
    return DiffusionTraining().loss(net, around, images.to(device), condition, draw)


def _turn(images: int, setting: Pretraining, step: int) -> Int64[Tensor, " batch"]:
    """Which images are in a step: all in turns, shuffled in each pass."""
    start, end = step * setting.batch, (step + 1) * setting.batch
    passes = range(start // images, -(-end // images))
    order = torch.cat([torch.randperm(images, generator=generator(setting.seed, "pass", number)) for number in passes])
    return order[start - passes[0] * images :][: setting.batch]


def _caption(name: str, draw: torch.Generator) -> str:
    if float(torch.rand((), generator=draw)) < NULL:
        return ""
    return TEMPLATES[int(torch.randint(len(TEMPLATES), (), generator=draw))].format(name)


def _average(averaged: Mapping[str, Tensor], net: Denoiser, step: int) -> None:
    """Move the average to the weights after this step, by 1 - decay of the way."""
    decay = min(DECAY, (1 + step) / (10 + step))
    for name, parameter in net.net.named_parameters():
        averaged[name].lerp_(parameter.detach(), 1 - decay)


def _check_finite(loss: Tensor, step: int) -> None:
    if not bool(loss.isfinite()):
        raise FedtapError(
            f"The training diverged before step {step}, its loss is {loss.item()}: lower --learning-rate and give "
            "--overwrite."
        )


_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


def _held(net: Denoiser, averaged: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, by name."""
    found = {f"averaged.{name}": tensor for name, tensor in averaged.items()}
    for name, parameter in net.net.named_parameters():
        found[f"weights.{name}"] = parameter.detach()
        found |= {f"{moment}.{name}": optimiser.state[parameter][moment] for moment in _MOMENTS}
    return found


def _note(folder: Path, about: Mapping[str, Any], step: int) -> None:
    write_atomically(folder / ABOUT, json.dumps({**about, "step": step}, indent=1).encode())


def _save(
    folder: Path,
    about: Mapping[str, Any],
    step: int,
    net: Denoiser,
    averaged: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Leave a checkpoint: tensors under the step's name first, then the JSON that names the step, so that both fit."""
    held = {name: tensor.contiguous().cpu() for name, tensor in _held(net, averaged, optimiser).items()}
    write_atomically(folder / f"{step}.safetensors", save(held))
    _note(folder, about, step)
    for old in folder.glob("*.safetensors"):
        if old.name != f"{step}.safetensors":
            old.unlink(missing_ok=True)


def _restore(
    folder: Path, step: int, net: Denoiser, averaged: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
) -> None:
    """Put a checkpoint back, in place.

    Raises:
        FedtapError: it is absent or damaged.
    """
    path = folder / f"{step}.safetensors"
    held = read_tensors(path)
    kinds = ("averaged", "weights", *_MOMENTS)
    due = {f"{kind}.{name}": tensor.shape for kind in kinds for name, tensor in averaged.items()}
    if {name: tensor.shape for name, tensor in held.items()} != due:
        raise FedtapError(
            f"{short(path, 120)} is not the checkpoint of this training, its tensors are others: give --overwrite to "
            "begin anew."
        )
    state = {}
    for number, (name, parameter) in enumerate(net.net.named_parameters()):
        parameter.data.copy_(held[f"weights.{name}"])
        averaged[name].copy_(held[f"averaged.{name}"])
        moments = {moment: held[f"{moment}.{name}"] for moment in _MOMENTS}
        state[number] = {"step": torch.tensor(float(step)), **moments}
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _finish(out: Path, diffusers: Any, net: Denoiser, around: Frozen, about: Mapping[str, Any]) -> None:
    """Leave the model: each file whole, and the one that says that it is finished last."""
    try:
        with tempfile.TemporaryDirectory(dir=out / UNFINISHED) as made:
            net.net.save_pretrained(made, safe_serialization=True)
            diffusers.DDPMScheduler.from_config(around.schedule).save_pretrained(made)
            for name in _MODEL:
                (Path(made) / name).replace(out / name)
    except (OSError, SafetensorError) as error:
        reason = short(getattr(error, "strerror", None) or error)
        raise FedtapError(
            f"The model could not be written to {short(out, 120)} ({reason}): make room, and the same command goes on."
        ) from error
    write_atomically(out / ABOUT, json.dumps(about, indent=1).encode())
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
