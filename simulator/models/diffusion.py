"""Text-conditional diffusion models in diffusers' format: a U-Net alone, or a whole pipeline such as Stable Diffusion.

A U-Net alone works on pixels in [-1, 1] and is conditioned on the last hidden states of all-MiniLM-L6-v2 (12 tokens);
a pipeline brings its own text encoder and autoencoder. The U-Net is what clients tune and send; all else stays frozen,
and everybody has it. Ho, Jain, Abbeel, NeurIPS 2020, https://arxiv.org/abs/2006.11239; sampling by DDIM, Song, Meng,
Ermon, ICLR 2021, https://arxiv.org/abs/2010.02502.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file, read_json
from fedtap.simulator.models.language import minilm_folder
from fedtap.simulator.models.packages import LOCAL, check_weights, diffusion_package, model_reading
from fedtap.simulator.progress import progress

Pixels = Float[Tensor, "images channel height width"]
"""In [0, 1]."""

Latents = Float[Tensor, "images latent_channel latent_height latent_width"]
Condition = Float[Tensor, "captions tokens features"]
Noise = Callable[[Latents, Tensor], Latents]
"""Predicted noise, of noisy latents and a step of the schedule."""

TOKENS = 12
"""Tokens to which captions are padded or cut for a U-Net that comes alone."""

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
"""Of a U-Net that comes without a scheduler_config.json."""

DENOISED_AT_ONCE = 20
"""Images that a network is given at once, as they are sampled."""

LARGE_IMAGE = 64 * 64
"""Places of an image from which on attention over them is fused where it can be: at 64 by 64, each image would take
1.2 GB, and four times as long."""

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Ways of attention, the last of which has a second derivative."""

LARGEST_SIDE = 1024
"""Pixels a side, at the most."""


def is_diffusion(name: str) -> bool:
    """Whether there is a diffusion model of diffusers in this folder."""
    folder = Path(name).expanduser()
    if is_file(folder / "model_index.json"):
        return True
    if not is_file(folder / "config.json"):
        return False
    try:
        return "UNet2DConditionModel" in str(read_json(folder / "config.json").get("_class_name"))
    except FedtapError:
        return False


class Denoiser(nn.Module):
    """A U-Net of diffusers, which predicts the noise in an image."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    __call__: Callable[..., Latents]

    def forward(self, noisy: Latents, step: Int[Tensor, "*images"], condition: Condition) -> Latents:
        """Args: noisy images, the schedule's step of all or of each, and what their captions say."""
        fused = noisy.shape[-1] * noisy.shape[-2] >= LARGE_IMAGE and not torch.is_grad_enabled()
        with sdpa_kernel(FUSED) if fused else nullcontext():
            found: Latents = self.net(noisy, step, encoder_hidden_states=condition, return_dict=False)[0]
        return found


def denoiser(name: str, seed: int | None) -> Denoiser:
    """The U-Net in this folder; a fresh one at each call.

    Args:
        seed: None for the architecture alone, on the meta device; else the model as it was trained: nothing is drawn.

    Raises:
        FedtapError: a package or file is missing or damaged, or the weights are pickled.
    """
    folder = _unet_folder(_folder(name))
    kind = diffusion_package("diffusers").UNet2DConditionModel
    with model_reading(folder, "a diffusion model", "diffusers"):
        config = kind.load_config(folder, **_LOCAL)
        if seed is None:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                return Denoiser(kind.from_config(config))
        check_weights(folder)
        net, about = kind.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    if about["missing_keys"]:
        raise FedtapError(
            f"{short(folder, 120)} lacks weights of its U-Net, {short(sorted(about['missing_keys'])[0])} for one: save "
            "the whole model, unet.save_pretrained(folder)."
        )
    return Denoiser(net)


@dataclass(frozen=True, eq=False, repr=False)
class Frozen:
    """What is around a U-Net and stays as it is: schedule, text encoder, autoencoder. Everybody has it.

    Args:
        schedule: configuration of diffusers' schedulers.
        tokenizer, text_encoder: of transformers.
        vae: the autoencoder; None where the U-Net works on pixels.
        tokens: to which captions are padded and cut.
        shape: of the U-Net's input, without the batch.
    """

    schedule: dict[str, Any]
    tokenizer: Any
    text_encoder: Any
    vae: Any
    tokens: int
    shape: tuple[int, int, int]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of an image."""
        if self.vae is None:
            return self.shape
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return int(self.vae.config.in_channels), factor * self.shape[1], factor * self.shape[2]

    def condition(self, captions: Sequence[str], device: torch.device | str = "cpu") -> Condition:
        """What captions say, to the U-Net; of an empty one, the null condition."""
        cut = self.tokenizer(
            list(captions), padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        )
        given = {"input_ids": cut["input_ids"]}
        if self.vae is None:  # CLIP's text encoder is used without a mask
            given["attention_mask"] = cut["attention_mask"]
        with torch.no_grad():
            found: Condition = self.text_encoder(**given).last_hidden_state
        return found.to(device)

    def encoded(self, images: Float[Tensor, "images channel height width"]) -> Latents:
        """Images in [0, 1], as the U-Net takes them."""
        scaled = 2 * images - 1
        if self.vae is None:
            return scaled
        with torch.no_grad():
            latents = self.vae.to(images.device).encode(scaled).latent_dist.mode()
        found: Latents = (latents - self._shift) * self.vae.config.scaling_factor
        return found

    def decoded(self, latents: Latents) -> Float[Tensor, "images channel height width"]:
        """The images, in [0, 1]."""
        if self.vae is not None:
            with torch.no_grad():
                scaled = latents / self.vae.config.scaling_factor + self._shift
                vae = self.vae.to(latents.device)
                latents = torch.cat([vae.decode(some, return_dict=False)[0] for some in torch.split(scaled, 1)])
        return (latents / 2 + 0.5).clamp(0, 1)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def noisy(self, latents: Latents, noise: Latents, steps: Int[Tensor, "images"]) -> Latents:
        """Latents after these steps of the forward process: sqrt(ᾱ) x + sqrt(1 - ᾱ) ε."""
        found: Latents = self._forward_process.add_noise(latents, noise, steps)
        return found

    def target(self, latents: Latents, noise: Latents, steps: Int[Tensor, "images"]) -> Latents:
        """What the U-Net is trained to predict: the noise, or the velocity."""
        if self._forward_process.config.prediction_type == "epsilon":
            return noise
        found: Latents = self._forward_process.get_velocity(latents, noise, steps)
        return found

    @cached_property
    def _forward_process(self) -> Any:
        return diffusion_package("diffusers").DDPMScheduler.from_config(self.schedule)

    @property
    def train_steps(self) -> int:
        """Steps of the forward process."""
        return int(self.schedule.get("num_train_timesteps", 1000))

    def ddim(self, predicted: Noise, start: Latents, steps: int, label: str = "samples") -> Latents:
        """Deterministic sampling: from noise to latents.

        Args:
            predicted: the noise that a model, or a mixture of models, sees.
            start: standard normal.
            steps: of DDIM, evenly over the schedule.
        """
        scheduler = diffusion_package("diffusers").DDIMScheduler.from_config(self.schedule)
        scheduler.set_timesteps(steps)
        found = []
        with torch.no_grad(), all_threads():
            for latents in progress(torch.split(start, DENOISED_AT_ONCE), label):
                for step in scheduler.timesteps.to(latents.device):
                    latents = scheduler.step(predicted(latents, step), step, latents, eta=0.0).prev_sample
                found.append(latents)
        return torch.cat(found)


@lru_cache(maxsize=2)
def frozen(name: str) -> Frozen:
    """What is around the U-Net in this folder.

    Raises:
        FedtapError: a package or file is missing or damaged, or the model is of another kind.
    """
    folder = _folder(name)
    unet = _unet_folder(folder)
    with model_reading(folder, "a diffusion model", "diffusers"):
        config = diffusion_package("diffusers").UNet2DConditionModel.load_config(unet, **_LOCAL)
    side, channels = config.get("sample_size"), int(config.get("in_channels", 0))
    if config.get("prediction_type") or type(side) is not int or not 4 <= side <= LARGEST_SIDE:
        raise _other_kind(folder, f"a U-Net on images of {short(side)} pixels a side")
    transformers = diffusion_package("transformers")
    alone = unet == folder
    text = minilm_folder() if alone else folder / "text_encoder"
    words = minilm_folder() if alone else folder / "tokenizer"
    scheduler = folder / "scheduler_config.json" if alone else folder / "scheduler" / "scheduler_config.json"
    schedule = read_json(scheduler) if is_file(scheduler) else dict(SCHEDULE)
    if not alone:  # so StableDiffusionPipeline reads the schedulers of former versions, which lack one or the other
        schedule |= {"clip_sample": False, "steps_offset": 1}
    _check_schedule(schedule, scheduler)
    if schedule.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise _other_kind(folder, f"a model that predicts {short(schedule['prediction_type'])}")
    with model_reading(folder, "a diffusion model", "diffusers"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(words, **LOCAL)
        check_weights(text)
        encoder, about = (transformers.AutoModel if alone else transformers.CLIPTextModel).from_pretrained(
            text, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **LOCAL
        )
        missing = {text: about["missing_keys"]}
        vae = None
        if not alone:
            check_weights(folder / "vae")
            vae, about = diffusion_package("diffusers").AutoencoderKL.from_pretrained(
                folder / "vae", torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True, **_LOCAL
            )
            vae = vae.eval().requires_grad_(False)
            missing[folder / "vae"] = about["missing_keys"]
    for part, names in missing.items():
        if names:
            raise FedtapError(
                f"{short(part, 120)} lacks weights, {short(min(names))} for one, which would be drawn at random: save "
                "the whole pipeline, pipeline.save_pretrained(folder)."
            )
    if encoder.config.hidden_size != config.get("cross_attention_dim"):
        raise FedtapError(
            f"The U-Net in {short(folder, 100)} is conditioned on {short(config.get('cross_attention_dim'))} numbers a "
            f"token, and its text encoder gives {encoder.config.hidden_size}: give the whole pipeline's folder, with "
            "its text encoder."
        )
    return Frozen(
        schedule=schedule,
        tokenizer=tokenizer,
        text_encoder=encoder.eval().requires_grad_(False),
        vae=vae,
        tokens=TOKENS if alone else int(tokenizer.model_max_length),
        shape=(channels, side, side),
    )


LONGEST_SCHEDULE = 100_000
"""Of a schedule."""


def _check_schedule(schedule: dict[str, Any], file: Path) -> None:
    """Refuse a schedule by which nothing can be sampled, before anybody trains for minutes."""
    steps = schedule.get("num_train_timesteps", 1000)
    try:
        if type(steps) is not int or not 1 <= steps <= LONGEST_SCHEDULE:
            raise ValueError(f"num_train_timesteps is a whole number from 1 to {LONGEST_SCHEDULE:,}")
        diffusion_package("diffusers").DDIMScheduler.from_config(schedule)
    except FedtapError:
        raise
    except Exception as error:  # diffusers raises all sorts
        raise FedtapError(
            f"{short(file, 120)} describes no schedule of noise that diffusers knows ({short(error, 100)}): save the "
            "scheduler again, scheduler.save_pretrained(folder)."
        ) from error


@contextmanager
def all_threads() -> Iterator[None]:
    """Convolutions over whole images gain from every core, unless the environment says how many threads to use."""
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_LOCAL = {"local_files_only": True}

_PARTS = (
    *("unet/config.json", "text_encoder/config.json", "vae/config.json"),
    *("tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"),
)
"""Files of a pipeline's folder."""


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not is_diffusion(name):
        raise FedtapError(
            f"There is no diffusion model in {short(name, 120) or 'an empty path'}, since it is no folder with the "
            "config.json of a UNet2DConditionModel or a model_index.json: give one in diffusers' format."
        )
    return folder.resolve()


def _unet_folder(folder: Path) -> Path:
    if not is_file(folder / "model_index.json"):
        return folder
    kind = str(read_json(folder / "model_index.json").get("_class_name"))
    if kind != "StableDiffusionPipeline":
        raise _other_kind(folder, short(kind))
    for file in _PARTS:
        if not is_file(folder / file):
            raise FedtapError(
                f"{short(folder, 120)} lacks {file}: save the whole pipeline, pipeline.save_pretrained(folder)."
            )
    return folder / "unet"


def _other_kind(folder: Path, what: str) -> FedtapError:
    return FedtapError(
        f"{short(folder, 120)} holds {what}, and what can be tuned here is a StableDiffusionPipeline or a text-"
        "conditional U-Net on pixels: give one of these."
    )
