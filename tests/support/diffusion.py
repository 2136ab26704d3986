"""A tiny diffusion model in diffusers' format, and checkpoints of clients that tuned it, for tests."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtap.simulator.attack import generator
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak, Protocol
from fedtap.simulator.models.adapters import Lora, adapter_of, inject
from fedtap.simulator.models.diffusion import Denoiser, Frozen, denoiser, frozen
from fedtap.simulator.models.diffusion_training import DiffusionTraining
from fedtap.simulator.models.language import minilm_folder
from fedtap.simulator.models.packages import diffusion_package

SIDE, PRIVATE = 8, 2
"""Pixels a side; images of a client."""

CAPTION = "a photo of sks"

LORA = "lora(rank=4, alpha=8)"

MEMORISED = DiffusionTraining(steps=100, batch=8, learning_rate=4e-3)
"""After which the tiny model draws the two images that it was tuned on."""

SOONER = replace(MEMORISED, steps=60)
"""After which it draws a single one."""

UNET = {
    "sample_size": SIDE,
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 384,  # MiniLM's
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,  # time goes by the number of layers, however small they are
    "up_block_types": ("UpBlock2D",),
}


def installed() -> ModuleType:
    """diffusers; the test is skipped where it or MiniLM is not installed."""
    try:
        minilm_folder()
        return diffusion_package("diffusers")
    except FedtapError as error:
        pytest.skip(str(error))


def save_tiny(folder: Path, **changed: object) -> str:
    """Save a U-Net with random weights, and say where."""
    kind = installed().UNet2DConditionModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(**UNET | changed).save_pretrained(folder)
    return str(folder)


@cache
def tiny() -> str:
    """Folder of the tiny model, saved once."""
    scratch = Path(tempfile.mkdtemp(prefix="fedtap-tests-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return save_tiny(scratch / "unet")


def around() -> Frozen:
    """What is around it."""
    return frozen(tiny())


@cache
def base() -> Denoiser:
    """The tiny model, which no test changes."""
    return denoiser(tiny(), 0).eval().requires_grad_(False)


def pictures(many: int, seed: int, side: int = SIDE) -> Tensor:
    """Blurred colours in [0, 1]."""
    drawn = torch.rand(many, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(drawn, (side, side), mode="bilinear", align_corners=True)


def held(net: torch.nn.Module) -> dict[str, Tensor]:
    """Its parameters as they are now."""
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def tuned(
    images: Tensor, how: DiffusionTraining = MEMORISED, adapter: str = "", caption: str = CAPTION, seed: int = 0
) -> dict[str, Tensor]:
    """What a client sends that tuned on these images."""
    net = denoiser(tiny(), 0)
    if adapter:
        net = inject(net, Lora.parse(adapter), 3)
    how(net, around(), images, around().condition([caption]), generator(seed, "client"))
    return {name: tensor.detach() for name, tensor in (adapter_of(net) if adapter else held(net)).items()}


def moved(adapter: str = "", size: float = 0.05, seed: int = 1) -> dict[str, Tensor]:
    """What a client sends whose model moved at random, which needs no training."""
    net = inject(base(), Lora.parse(adapter), 3) if adapter else base()
    draw = torch.Generator().manual_seed(seed)
    sent = adapter_of(net) if adapter else held(net)
    return {name: tensor.detach() + size * torch.randn(tensor.shape, generator=draw) for name, tensor in sent.items()}


def leak_of(
    sent: Sequence[Mapping[str, Tensor]], adapter: str = "", prompt: str = CAPTION, private: int = PRIVATE
) -> CheckpointLeak:
    """The checkpoints of these clients, each with as many private images."""
    names = torch.arange(len(sent))
    return CheckpointLeak(
        observed={name: torch.stack([one[name] for one in sent]) for name in sent[0]},
        protocol=Protocol(
            model=tiny(),
            shape=(3, SIDE, SIDE),
            classes=1,
            batch=MEMORISED.batch,
            local_steps=MEMORISED.steps,
            learning_rate=MEMORISED.learning_rate,
            optimiser="adamw",
            adapter=adapter,
            prompt=prompt,
        ),
        network=denoiser(tiny(), None),
        weights=held(base()),
        buffers={},
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
        examples=torch.full_like(names, private),
    )


@cache
def leak_on(seeds: tuple[int, ...], private: int = PRIVATE) -> CheckpointLeak:
    """Of clients that tuned on the pictures of these seeds until the model draws them; they have one or two each."""
    how = SOONER if private == 1 else MEMORISED
    return leak_of([tuned(pictures(private, seed), how, seed=seed) for seed in seeds], private=private)
