"""Diffusion models: what captions say, schedule and sampling by the formula, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models import diffusion, language
from fedtap.simulator.models.diffusion import DENOISED_AT_ONCE, TOKENS, Denoiser, Frozen, denoiser, frozen, is_diffusion
from fedtap.simulator.models.language import minilm_folder
from fedtap.simulator.models.registry import build
from tests.simulator.test_pretrained import save_tiny as save_language_model
from tests.support.diffusion import SIDE, around, base, held, installed, save_tiny, tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _installed() -> None:
    installed()


def normal(many: int, seed: int) -> Tensor:
    return torch.randn(many, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


# The network.


def test_a_folder_with_a_unet_is_a_diffusion_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_diffusion(tiny())
    monkeypatch.chdir(Path(tiny()).parent)
    assert is_diffusion("unet")
    assert not is_diffusion(str(tmp_path))
    assert not is_diffusion(str(tmp_path / "absent"))
    assert not is_diffusion("x" * 5000)
    assert not is_diffusion(f"{tiny()}/{WEIGHTS}")
    assert not is_diffusion(str(save_language_model("gpt2", tmp_path / "text")))
    for number, text in enumerate(("{", "[]", "{}", '{"_class_name": null}', '{"_class_name": "UNet2DModel"}')):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(text)
        assert not is_diffusion(str(folder)), text


def test_a_model_is_read_as_it_was_saved_and_nothing_is_drawn() -> None:
    before = torch.get_rng_state()
    one, two = denoiser(tiny(), 0), denoiser(tiny(), 1)
    empty = denoiser(tiny(), None)
    assert torch.equal(torch.get_rng_state(), before)
    saved = load_file(f"{tiny()}/{WEIGHTS}")
    assert {name.removeprefix("net.") for name in held(one)} == saved.keys()
    for name, tensor in held(one).items():
        assert torch.equal(tensor, saved[name.removeprefix("net.")])
        assert torch.equal(tensor, held(two)[name])
    next(one.parameters()).data += 1
    assert not torch.equal(next(one.parameters()), next(two.parameters()))  # each call makes its own
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert {name: tensor.shape for name, tensor in empty.named_parameters()} == {
        name: tensor.shape for name, tensor in two.named_parameters()
    }
    assert not dict(two.named_buffers())  # of a leak's buffers


def test_a_model_of_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    file = tmp_path / WEIGHTS
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    net = denoiser(str(tmp_path), 0)
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float32}
    torch.testing.assert_close(held(net), held(base()), rtol=1e-3, atol=1e-4)


def test_the_registry_builds_a_diffusion_model_of_an_images_shape() -> None:
    made = build(tiny(), (3, SIDE, SIDE), 1)
    assert isinstance(made, Denoiser)
    assert next(made.parameters()).is_meta
    read = build(tiny(), (3, SIDE, SIDE), 1, seed=3)
    torch.testing.assert_close(held(read), held(base()), rtol=0, atol=0)


def test_a_denoiser_is_the_unet() -> None:
    noisy, step, told = normal(2, 0), torch.tensor([3, 700]), around().condition(["a dog", "a cat"])
    with torch.no_grad():
        found = base()(noisy, step, told)
        wanted = base().net(noisy, step, told).sample
        alone = base()(noisy[1:], step[1], told[1:])
    assert torch.equal(found, wanted)
    torch.testing.assert_close(found[1:], alone, rtol=1e-4, atol=1e-5)


def test_fused_attention_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy, told = normal(2, 0), around().condition(["a dog"])
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # as attacks do
        wanted = base()(noisy, torch.tensor(500), told.expand(2, -1, -1))
        monkeypatch.setattr(diffusion, "LARGE_IMAGE", SIDE * SIDE)
        found = base()(noisy, torch.tensor(500), told.expand(2, -1, -1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Captions.


def plain_states(caption: str) -> Tensor:
    """Last hidden states of MiniLM, `tokens width`, of a caption that is not padded."""
    transformers = importlib.import_module("transformers")
    known = transformers.AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
    model = transformers.AutoModel.from_pretrained(minilm_folder(), local_files_only=True).eval()
    with torch.no_grad():
        states: Tensor = model(**known([caption], return_tensors="pt")).last_hidden_state[0]
    return states


def test_a_condition_is_minilms_hidden_states() -> None:
    captions = ["a photo of sks", "a dog", "", "a photo of one very small brown dog that sits on a red mat in the sun"]
    found = around().condition(captions)
    assert found.shape == (4, TOKENS, 384)
    assert not found.requires_grad
    for caption, said in zip(captions[:3], found, strict=False):
        alone = plain_states(caption)
        assert len(alone) == len(around().tokenizer(caption)["input_ids"]) <= TOKENS
        torch.testing.assert_close(said[: len(alone)], alone, rtol=1e-4, atol=1e-4)  # padding changes no token
    assert len(around().tokenizer(captions[3])["input_ids"]) > TOKENS
    cut = around().condition([captions[3] + " and barks"])
    torch.testing.assert_close(cut, found[3:])


def test_a_caption_says_the_same_alone_and_among_others() -> None:
    captions = ["a photo of sks", "", "a photo of a dog"]
    together = around().condition(captions)
    for number, caption in enumerate(captions):
        torch.testing.assert_close(around().condition([caption]), together[number : number + 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(around().condition([""]), around().condition([""]))
    gaps = (together[:, None] - together[None]).flatten(2).norm(dim=2)
    assert float(gaps[~torch.eye(3, dtype=torch.bool)].min()) > 1


# Pixels and latents.


@given(st.integers(0, 2**31), st.integers(1, 3))
def test_decoding_is_the_inverse_of_encoding(seed: int, many: int) -> None:
    images = torch.rand(many, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    latents = around().encoded(images)
    assert float(latents.min()) >= -1
    assert float(latents.max()) <= 1
    torch.testing.assert_close(around().decoded(latents), images, rtol=0, atol=1e-6)


def test_decoded_images_are_in_range() -> None:
    found = around().decoded(5 * normal(4, 1))
    assert (float(found.min()), float(found.max())) == (0, 1)
    ends = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    assert around().encoded(ends)[0, :, 0, 0].tolist() == [-1, 0, 1]
    assert around().shape == around().image_shape == (3, SIDE, SIDE)


# The schedule.


def alphas() -> Tensor:
    """ᾱ of the cosine schedule (Nichol, Dhariwal 2021, equation 17), of which β is at most 0.999."""
    share = torch.arange(1001, dtype=torch.float64) / 1000
    curve = torch.cos((share + 0.008) / 1.008 * torch.pi / 2) ** 2
    return torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp_max(0.999), 0)


def of_velocity() -> Frozen:
    like = around()
    return Frozen(
        like.schedule | {"prediction_type": "v_prediction"},
        like.tokenizer,
        like.text_encoder,
        None,
        like.tokens,
        like.shape,
    )


def test_noise_and_targets_are_the_formulas() -> None:
    clean, noise, steps = normal(4, 0), normal(4, 1), torch.tensor([0, 10, 600, 999])
    a = alphas()[steps].view(-1, 1, 1, 1)
    noisy = (a.sqrt() * clean + (1 - a).sqrt() * noise).float()
    torch.testing.assert_close(around().noisy(clean, noise, steps), noisy, rtol=1e-4, atol=1e-5)
    assert around().target(clean, noise, steps) is noise
    velocity = (a.sqrt() * noise - (1 - a).sqrt() * clean).float()
    torch.testing.assert_close(of_velocity().target(clean, noise, steps), velocity, rtol=1e-4, atol=1e-5)
    assert around().train_steps == 1000


def by_formula(predicted: Callable[[Tensor, Tensor], Tensor], start: Tensor, steps: int, velocity: bool) -> Tensor:
    """DDIM (Song, Meng, Ermon 2021, equation 12) with σ = 0, whose guess at the image is cut to [-1, 1]."""
    known, each, x = alphas(), 1000 // steps, start.double()
    for number in reversed(range(steps)):
        step = number * each
        a, before = known[step], known[step - each] if step else torch.tensor(1.0)
        found = predicted(x.float(), torch.tensor(step)).double()
        noise = a.sqrt() * found + (1 - a).sqrt() * x if velocity else found
        image = a.sqrt() * x - (1 - a).sqrt() * found if velocity else (x - (1 - a).sqrt() * noise) / a.sqrt()
        x = before.sqrt() * image.clamp(-1, 1) + (1 - before).sqrt() * noise
    return x.float()


@pytest.mark.parametrize("velocity", [False, True], ids=["noise", "velocity"])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_sampling_is_ddims_formula(steps: int, velocity: bool) -> None:
    told, start = around().condition(["a dog"]), normal(3, 2)

    def predicted(latents: Tensor, step: Tensor) -> Tensor:
        with torch.no_grad():
            found = base()(latents, step, told.expand(len(latents), -1, -1))
        return 0.5 * latents + 0.3 * found  # a prediction that is of some use, as a trained one

    found = (of_velocity() if velocity else around()).ddim(predicted, start, steps)
    torch.testing.assert_close(found, by_formula(predicted, start, steps, velocity), rtol=1e-4, atol=1e-4)
    assert float((found.abs() < 0.99).float().mean()) > 0.2  # or all that is cut off would agree


def test_sampling_is_that_of_diffusers_own_loop() -> None:
    """As DDIMPipeline does it, the whole batch at once."""
    scheduler = installed().DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(5)
    told, start = around().condition(["a dog"]), normal(DENOISED_AT_ONCE + 3, 3)

    def predicted(latents: Tensor, step: Tensor) -> Tensor:
        found: Tensor = base()(latents, step, told.expand(len(latents), -1, -1))
        return found

    wanted = start.clone()
    with torch.no_grad():
        for step in scheduler.timesteps:
            wanted = scheduler.step(predicted(wanted, step), step, wanted, eta=0.0).prev_sample
    before = torch.get_rng_state()
    found = around().ddim(predicted, start, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(around().ddim(predicted, start, 5), found)
    assert not found.requires_grad


def test_images_are_sampled_a_few_at_a_time() -> None:
    seen = []

    def predicted(latents: Tensor, step: Tensor) -> Tensor:
        seen.append(len(latents))
        return latents

    assert len(around().ddim(predicted, normal(2 * DENOISED_AT_ONCE + 1, 0), 2)) == 2 * DENOISED_AT_ONCE + 1
    assert seen == [DENOISED_AT_ONCE, DENOISED_AT_ONCE] * 2 + [1, 1]


# What is refused.


def edited(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def half_the_weights(folder: Path) -> None:
    kept = load_file(folder / WEIGHTS)
    save_file({name: kept[name] for name in sorted(kept)[::2]}, folder / WEIGHTS)


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def other_shapes(folder: Path) -> None:
    kept = load_file(folder / WEIGHTS)
    save_file(kept | {"conv_in.weight": torch.zeros(7, 3, 3, 3)}, folder / WEIGHTS)


def scheduled(folder: Path, **schedule: Any) -> None:
    (folder / "scheduler_config.json").write_text(json.dumps(schedule))


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights": (pickled, "pickled and may run code when it is read: load it where you trust it"),
    "no weights": (without_weights, "has no *.safetensors, in which weights are read"),
    "half the weights": (half_the_weights, "lacks weights of its U-Net"),
    "cut short": (cut_short, "cannot be read as a diffusion model"),
    "weights of other shapes": (other_shapes, "cannot be read as a diffusion model"),
    "another class": (lambda folder: edited(folder, _class_name="UNet2DModel"), "There is no diffusion model in"),
    "a config that is damaged": (lambda folder: edited(folder, block_out_channels="a"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_damaged_network_is_one_sentence(case: str, tmp_path: Path) -> None:
    spoil, said = BAD_WEIGHTS[case]
    save_tiny(tmp_path / "net")
    spoil(tmp_path / "net")
    with pytest.raises(FedtapError) as raised:
        denoiser(str(tmp_path / "net"), 0)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 420


BAD_AROUND: dict[str, tuple[Callable[[Path], None], str]] = {
    "another text encoder's": (lambda folder: edited(folder, cross_attention_dim=768), "give the whole pipeline"),
    "no size": (lambda folder: edited(folder, sample_size=None), "on images of None pixels a side"),
    "of two sizes": (lambda folder: edited(folder, sample_size=[8, 16]), "pixels a side"),
    "far too large": (lambda folder: edited(folder, sample_size=10**6), "on images of 1000000 pixels a side"),
    "the image is predicted": (lambda folder: scheduled(folder, prediction_type="sample"), "that predicts sample"),
    "no schedule": (lambda folder: (folder / "scheduler_config.json").write_text("{"), "scheduler_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_AROUND)
def test_another_kind_of_model_is_one_sentence(case: str, tmp_path: Path) -> None:
    spoil, said = BAD_AROUND[case]
    save_tiny(tmp_path / "net")
    spoil(tmp_path / "net")
    with pytest.raises(FedtapError) as raised:
        frozen(str(tmp_path / "net"))
    assert said in str(raised.value)
    assert len(str(raised.value)) < 420


BAD_SCHEDULES: dict[str, dict[str, Any]] = {
    "a curve that is none": {"beta_schedule": "zigzag"},
    "no steps": {"num_train_timesteps": 0},
    "steps in words": {"num_train_timesteps": "many"},
}


@pytest.mark.parametrize("case", BAD_SCHEDULES)
def test_a_schedule_that_is_none_is_one_sentence(case: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "net")
    scheduled(tmp_path / "net", **BAD_SCHEDULES[case])
    with pytest.raises(FedtapError, match=r"scheduler_config\.json|schedule"):
        frozen(str(tmp_path / "net"))


@pytest.mark.parametrize("read", [frozen, lambda name: denoiser(name, 0), lambda name: denoiser(name, None)])
def test_what_is_no_diffusion_model_is_refused(read: Callable[[str], object], tmp_path: Path) -> None:
    text = str(save_language_model("gpt2", tmp_path / "text"))
    for name in (str(tmp_path / "absent"), str(tmp_path), text, "", "x" * 5000, f"{tiny()}/config.json"):
        with pytest.raises(FedtapError, match=r"There is no diffusion model in .*: give one in diffusers' format"):
            read(name)


def test_another_pipeline_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    for read in (frozen, lambda name: denoiser(name, 0)):
        with pytest.raises(FedtapError, match="holds StableDiffusionXLPipeline, and what can be tuned here is"):
            read(str(tmp_path))
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(FedtapError, match=r"lacks unet/config\.json: save the whole pipeline"):
        frozen(str(tmp_path))
    index.write_text("{")
    with pytest.raises(FedtapError, match=r"model_index\.json"):
        frozen(str(tmp_path))


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_a_missing_package_is_one_sentence(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == missing:
            raise ImportError(f"No module named {missing!r}")
        return real(name, package)

    frozen.cache_clear()
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(FedtapError, match=rf"need the package {missing}, which cannot be .*pip install 'fedtap\["):
        frozen(tiny())
    if missing == "diffusers":
        with pytest.raises(FedtapError, match=r"Diffusion models need the package diffusers.*'fedtap\[diffusion\]'"):
            denoiser(tiny(), 0)


def test_minilm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen.cache_clear()
    monkeypatch.setattr(language, "MINILM", "no-such-package")
    with pytest.raises(FedtapError, match="MiniLM comes with the package no-such-package, which is not installed"):
        frozen(tiny())


def test_threads_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    for said in (None, "1"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if said:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        with diffusion.all_threads():
            assert torch.get_num_threads() == (before if said else os.cpu_count())
        assert torch.get_num_threads() == before
