"""`fedtap attack TUNED --base BASE`: diffusion models that lie on this machine, and what is refused of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak, load
from fedtap.simulator.models.adapters import Lora, adapter_of, inject
from fedtap.simulator.models.diffusion import Denoiser, denoiser, frozen
from fedtap.simulator.models.packages import diffusion_package
from fedtap.simulator.models.pretrained import pretrained
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.checkpoints import checkpoint_leak, is_checkpoint
from fedtap.simulator.wire.lora_files import read_lora
from tests.scenarios.test_cli import rows, run
from tests.simulator.test_own_checkpoints import save_adapter
from tests.simulator.test_pretrained import save_tiny, save_tokenizer

diffusers, peft = diffusion_package("diffusers"), diffusion_package("peft")
transformers = diffusion_package("transformers")

MERGES = ["o f</w>", "s k", "sk s</w>", "p h", "o t", "ph ot", "phot o</w>", "d o", "do g</w>"]
LETTERS = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
VOCABULARY = [*LETTERS, *(pair.replace(" ", "") for pair in MERGES), "<|startoftext|>", "<|endoftext|>"]
MARK = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": MARK | {"content": "<|startoftext|>"},
    "do_lower_case": True,
    "eos_token": MARK | {"content": "<|endoftext|>"},
    "errors": "replace",
    "model_max_length": 8,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": MARK | {"content": "<|endoftext|>"},
}
"""That of Stable Diffusion 1.4, for fewer tokens."""
SCHEDULE = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""That of Stable Diffusion 1.4."""
CAPTION = "a photo of sks dog"
FILE = "pytorch_lora_weights.safetensors"
UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Libraries say nothing as tests call them."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def save_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def tiny_unet(**other: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        | other
    )


def save_pipeline(folder: Path) -> Path:
    """A StableDiffusionPipeline of random weights, its tokenizer and its schedule written as those of 1.4 are."""
    save_json(folder / "tokenizer" / "vocab.json", {word: number for number, word in enumerate(VOCABULARY)})
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    save_json(folder / "tokenizer" / "tokenizer_config.json", TOKENIZER)
    vocabulary = len(VOCABULARY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=8,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
                pad_token_id=vocabulary - 1,
            )
        )
        unet = tiny_unet()
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        for net in (text, unet):  # so that captions matter
            for parameter in net.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    save_json(folder / "tokenizer" / "tokenizer_config.json", TOKENIZER)
    save_json(folder / "scheduler" / "scheduler_config.json", SCHEDULE)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once, and changed by no test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return save_pipeline(tmp_path_factory.mktemp("saved") / "base")


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    """The pipeline with another U-Net."""
    shutil.copytree(base, tmp_path / "tuned")
    perturbed(base).save_pretrained(tmp_path / "tuned" / "unet")
    return tmp_path / "tuned"


def perturbed(base: Path) -> Any:
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    draw = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=draw)
    return unet


def adapted(base: Path, rank: int = 2, alpha: int = 4, **settings: Any) -> Any:
    """The base's U-Net with a LoRA beside it."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    about = {"r": rank, "lora_alpha": alpha, "target_modules": layers, "init_lora_weights": "gaussian"}
    unet.add_adapter(peft.LoraConfig(**about | settings))
    draw = torch.Generator().manual_seed(2)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return unet


def save_lora(unet: Any, folder: Path, described: bool = True, **more: Any) -> Path:
    """As diffusers' own scripts do."""
    layers = peft.get_peft_model_state_dict(unet)
    if described:
        more["unet_lora_adapter_metadata"] = unet.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **more)
    return folder


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    return save_lora(adapted(base), tmp_path / "lora")


def unet_of(leak: CheckpointLeak) -> dict[str, Tensor]:
    return {name.removeprefix("net."): tensor[0] for name, tensor in leak.observed.items()}


def fused(base: Path, lora: Path) -> dict[str, Tensor]:
    """The U-Net's weights after diffusers' own merging."""
    without = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, **without)
    pipeline.load_lora_weights(lora, weight_name=FILE)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return dict(pipeline.unet.named_parameters())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], base: Path) -> None:
    before = load_file(base / "unet" / UNET)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=1e-6)
    assert (
        sum(not torch.equal(found[name], before[name]) for name in before) >= 24
    )  # 4 projections, 2 a block, 3 blocks


def test_a_tuned_pipeline_and_its_unet_alone_are_one_leak(base: Path, tuned: Path) -> None:
    whole, alone = (checkpoint_leak(str(base), folder, 32, 3, " a photo of * ") for folder in (tuned, tuned / "unet"))
    wanted = load_file(tuned / "unet" / UNET)
    for leak in (whole, alone):
        assert_same(unet_of(leak), wanted, base)
        assert leak.protocol.model == str(base.resolve())
        assert leak.protocol.prompt == "a photo of *"
        assert leak.protocol.shape == (3, 16, 16)  # 8 by 8 latents
        assert leak.examples is not None
        assert leak.examples.tolist() == [3]
        assert isinstance(leak.network, Denoiser)
        assert next(leak.network.parameters()).is_meta
    known = whole.broadcast(0)
    for name, tensor in load_file(base / "unet" / UNET).items():
        assert torch.equal(known[f"net.{name}"], tensor)


@pytest.mark.parametrize("described", [True, False], ids=["described", "alpha is the rank"])
def test_a_lora_is_merged_as_diffusers_does(described: bool, base: Path, tmp_path: Path) -> None:
    folder = save_lora(adapted(base), tmp_path / "lora", described)
    leak = checkpoint_leak(str(base), folder, 32)
    assert_same(unet_of(leak), fused(base, folder), base)
    renamed = tmp_path / "pikachu.safetensors"
    shutil.copy(folder / FILE, renamed)
    assert is_checkpoint(renamed)
    assert_same(unet_of(checkpoint_leak(str(base), renamed, 32)), fused(base, folder), base)


def processors(name: str) -> str:
    """As diffusers 0.16 named it."""
    name = name.replace("to_out.0", "to_out")
    for projection in ("to_q", "to_k", "to_v", "to_out"):
        for new, old in (("lora_A", "down"), ("lora_B", "up")):
            name = name.replace(f".{projection}.{new}", f".processor.{projection}_lora.{old}")
    return name


@pytest.mark.parametrize(
    "renamed",
    [
        processors,
        lambda name: processors(name).removeprefix("unet."),
        lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    ],
    ids=["processors", "of a U-Net alone", "down and up"],
)
def test_former_names_of_a_lora_are_read(renamed: Callable[[str], str], base: Path, tmp_path: Path) -> None:
    folder = save_lora(adapted(base), tmp_path / "lora", described=False)
    file = folder / FILE
    wanted = fused(base, folder)
    save_file({renamed(name): tensor for name, tensor in load_file(file).items()}, file)
    assert not any("lora_A" in name for name in load_file(file))
    assert_same(unet_of(checkpoint_leak(str(base), folder, 32)), wanted, base)


def test_each_layer_has_its_own_rank_and_alpha(base: Path, tmp_path: Path) -> None:
    narrow, wide = (load_file(save_lora(adapted(base, rank), tmp_path / str(rank), False) / FILE) for rank in (2, 3))
    layers = {name: (wide if "to_q" in name else narrow)[name] for name in narrow}
    (tmp_path / "both").mkdir()
    save_file(layers, tmp_path / "both" / FILE)
    found = unet_of(checkpoint_leak(str(base), tmp_path / "both", 32))
    assert_same(found, fused(base, tmp_path / "both"), base)
    save_file(
        layers | {f"{name[:-14]}.alpha": torch.tensor(6.0) for name in layers if "lora_A" in name},
        tmp_path / "both" / FILE,
    )
    by_alpha = {lora.rank: lora.alpha for _, lora in read_lora(tmp_path / "both")}
    assert by_alpha == {2: 6.0, 3: 6.0}
    before = load_file(base / "unet" / UNET)
    again = unet_of(checkpoint_leak(str(base), tmp_path / "both", 32))
    for name in before:
        scale = 2.0 if "to_q" in name else 3.0  # 6 / rank
        torch.testing.assert_close(again[name] - before[name], scale * (found[name] - before[name]), rtol=0, atol=1e-6)


def test_an_adapter_of_peft_is_merged(base: Path, lora: Path, tmp_path: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    about = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    wrapped = peft.get_peft_model(unet, peft.LoraConfig(**about))
    layers = peft.get_peft_model_state_dict(adapted(base))
    peft.set_peft_model_state_dict(wrapped, {f"base_model.model.{name}": one for name, one in layers.items()})
    wrapped.save_pretrained(tmp_path / "adapter")
    assert is_checkpoint(tmp_path / "adapter")
    assert_same(unet_of(checkpoint_leak(str(base), tmp_path / "adapter", 32)), fused(base, lora), base)


def test_an_adapter_that_diffusers_saves_of_the_unet_is_merged(base: Path, lora: Path, tmp_path: Path) -> None:
    adapted(base).save_lora_adapter(tmp_path / "adapter")
    assert_same(unet_of(checkpoint_leak(str(base), tmp_path / "adapter", 32)), fused(base, lora), base)


def test_a_text_encoder_that_was_tuned_too_is_left_out_with_a_warning(base: Path, tuned: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        checkpoint_leak(str(base), tuned, 32)
    text = transformers.CLIPTextModel.from_pretrained(tuned / "text_encoder")
    text.half().save_pretrained(tuned / "text_encoder")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is the same in half precision
        checkpoint_leak(str(base), tuned, 32)
    next(text.parameters()).data += 0.1
    text.save_pretrained(tuned / "text_encoder")
    with pytest.warns(UserWarning, match="changes the text encoder too, which is left out"):
        checkpoint_leak(str(base), tuned, 32)
    layers = {"encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
    folder = save_lora(adapted(base), tmp_path / "lora", text_encoder_lora_layers=layers)
    with pytest.warns(UserWarning, match="changes the text encoder too, which is left out"):
        leak = checkpoint_leak(str(base), folder, 32)
    assert_same(unet_of(leak), fused(base, save_lora(adapted(base), tmp_path / "same")), base)


@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULE,
        {name: value for name, value in SCHEDULE.items() if name != "clip_sample"},
        {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "set_alpha_to_one": False},
        SCHEDULE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    ],
    ids=["1.4", "without clip_sample", "of former DDIM", "velocity"],
)
def test_ddim_is_that_of_the_pipeline(schedule: dict[str, Any], base: Path, tuned: Path) -> None:
    for folder in (base, tuned):
        save_json(folder / "scheduler" / "scheduler_config.json", schedule)
    around, net = frozen(str(base)), denoiser(str(tuned), 0).eval()
    start = torch.randn(2, *around.shape, generator=torch.Generator().manual_seed(3))
    condition = around.condition([CAPTION])

    def predicted(latents: Tensor, step: Tensor) -> Tensor:
        found: Tensor = net(latents, step, condition.expand(len(latents), -1, -1))
        return found

    ours = around.decoded(around.ddim(predicted, start, 5))
    theirs = pipeline_of(tuned)(
        [CAPTION] * 2, guidance_scale=1.0, num_inference_steps=5, latents=start, output_type="pt"
    ).images
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def pipeline_of(folder: Path) -> Any:
    config = diffusers.DDIMScheduler.load_config(folder / "scheduler")
    ddim = diffusers.DDIMScheduler.from_config(config)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, scheduler=ddim)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def replaced(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **header: str) -> None:
    """Save a file of tensors again, after a change of them."""
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, metadata=header)


def pickled(file: Path) -> None:
    file.with_name(file.name.replace("safetensors", "bin")).write_bytes(b"\x80\x04")
    file.unlink()


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another configuration": (
        "tuned",
        lambda folder: tiny_unet(norm_num_groups=2).save_pretrained(folder / "unet"),
        r"tuned was not tuned from .*base, since norm_num_groups is 2 there and 4 here: name its own --base",
    ),
    "another shape": (
        "tuned",
        lambda folder: replaced(folder / "unet" / UNET, lambda told: told | {"conv_in.bias": torch.zeros(9)}),
        r"since conv_in.bias is \(9,\) there and \(8,\) here",
    ),
    "a weight is missing": (
        "tuned",
        lambda folder: replaced(
            folder / "unet" / UNET, lambda told: {n: t for n, t in told.items() if n != "conv_in.bias"}
        ),
        r"since conv_in.bias is missing there",
    ),
    "a pickled U-Net": ("tuned", lambda folder: pickled(folder / "unet" / UNET), r"pickled .* safe_serialization=True"),
    "part of a pipeline": (
        "tuned",
        lambda folder: shutil.rmtree(folder / "unet"),
        r"lacks unet/config.json: save the whole",
    ),
    "a pickled LoRA": ("lora", lambda folder: pickled(folder / FILE), r"pickled .* save_lora_weights"),
    "a truncated LoRA": (
        "lora",
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9]),
        r"cannot be read as safetensors",
    ),
    "half a LoRA": (
        "lora",
        lambda folder: replaced(folder / FILE, lambda told: dict(list(told.items())[1:])),
        r"no part of a plain LoRA of diffusers: merge it in diffusers",
    ),
    "a LoRA of kohya": (
        "lora",
        lambda folder: replaced(
            folder / FILE,
            lambda told: {
                n.replace("unet.", "lora_unet_").replace(".lora_A", ".lora_down"): t for n, t in told.items()
            },
        ),
        r"no part of a plain LoRA of diffusers",
    ),
    "a LoRA on convolutions": (
        "lora",
        lambda folder: replaced(
            folder / FILE,
            lambda told: (
                told
                | {
                    "unet.conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3),
                    "unet.conv_in.lora_B.weight": torch.zeros(8, 2, 1, 1),
                }
            ),
        ),
        r"adapts convolutions \(conv_in.lora_A.weight\)",
    ),
    "another rank than its header's": (
        "lora",
        lambda folder: replaced(folder / FILE, dict, lora_adapter_metadata='{"unet.r": 3, "unet.lora_alpha": 4}'),
        r"of another rank",
    ),
    "a rank that is none": (
        "lora",
        lambda folder: replaced(folder / FILE, dict, lora_adapter_metadata='{"unet.r": "2", "unet.lora_alpha": 4}'),
        r"a rank or an alpha that no LoRA has",
    ),
    "a LoRA of other layers": (
        "lora",
        lambda folder: replaced(folder / FILE, lambda told: {n.replace("attn1", "attn3"): t for n, t in told.items()}),
        r"for another base",
    ),
    "a text encoder's LoRA": (
        "lora",
        lambda folder: replaced(
            folder / FILE, lambda told: {n.replace("unet", "text_encoder"): t for n, t in told.items()}
        ),
        r"holds no LoRA of a U-Net",
    ),
}
"""What is wrong -> which fixture's folder, how it is made so, and the sentence."""


@pytest.mark.parametrize("what", REFUSED)
def test_what_was_not_tuned_from_the_base_is_refused_before_any_weight_is_read(
    what: str, base: Path, request: pytest.FixtureRequest
) -> None:
    fixture, spoil, sentence = REFUSED[what]
    folder = request.getfixturevalue(fixture)
    spoil(folder)
    (base / "unet" / UNET).unlink()
    with pytest.raises(FedtapError, match=sentence) as error:
        checkpoint_leak(str(base), folder, 32)
    assert is_checkpoint(folder)
    assert len(str(error.value).split(". ")) == 1


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"to_q": 8}}])
def test_a_lora_that_is_no_plain_one_is_refused(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    folder = save_lora(adapted(base, **settings), tmp_path / "lora")
    with pytest.raises(FedtapError, match=r"plain LoRA.*: merge it in diffusers"):
        checkpoint_leak(str(base), folder, 32)


def test_a_base_that_is_none_is_refused(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="name that, --base FOLDER"):
        checkpoint_leak("", tuned, 32)
    with pytest.raises(FedtapError, match="There is no diffusion model in"):
        checkpoint_leak(str(tmp_path / "nowhere"), tuned, 32)
    with pytest.raises(FedtapError, match="There is no diffusion model in"):
        checkpoint_leak(str(tuned / "vae"), tuned, 32)


def test_a_language_model_beside_a_diffusion_model_is_refused(
    base: Path, tuned: Path, lora: Path, tmp_path: Path
) -> None:
    other = save_tiny("llama", tmp_path / "other")
    for folder in (tuned, lora):
        with pytest.raises(FedtapError, match=r"from a diffusion model, and .* is a language model: name the folder"):
            checkpoint_leak(str(other), folder, 32)
    with pytest.raises(FedtapError, match=r"holds a language model, and .* is a diffusion model: give a folder"):
        checkpoint_leak(str(base), other, 32)
    with pytest.raises(FedtapError, match=r"holds no U-Net and no LoRA, and .* is a diffusion model"):
        checkpoint_leak(str(base), tuned / "vae", 32)
    (tmp_path / "sd-v1-4.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(FedtapError, match=r"is pickled, .*from_single_file"):
        checkpoint_leak(str(base), tmp_path / "sd-v1-4.ckpt", 32)


def test_weights_of_a_pipelines_parts_are_read_whole_or_not_at_all(base: Path, tuned: Path) -> None:
    text = base / "text_encoder" / "model.safetensors"
    whole = text.read_bytes()
    replaced(text, lambda told: dict(list(told.items())[1:]), format="pt")
    with pytest.raises(FedtapError, match=r"text_encoder lacks weights, .* for one, which would be drawn at random"):
        checkpoint_leak(str(base), tuned, 32)
    text.unlink()
    text.with_name("pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FedtapError, match=r"text_encoder has its weights in pytorch_model.bin, which is pickled"):
        checkpoint_leak(str(base), tuned, 32)
    text.write_bytes(whole)
    checkpoint_leak(str(base), tuned, 32)


ATTACKS = ("finextract", "guided_sampling", "direct_sampling")


def test_images_are_drawn_from_a_lora_and_shown(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = ",".join(f"{name}(samples=2,steps=2,encoder='pixels')" for name in ATTACKS)
    out = tmp_path / "out"
    told = ["--base", str(base), "--private", "2", "--prompt", CAPTION]
    assert run(monkeypatch, "attack", str(lora), *told, "--attack", attacks, "--out", str(out)) == 0
    found = rows(out)
    assert [row["attack"] for row in found] == list(ATTACKS)
    assert [row["caption"] for row in found] == [CAPTION] * 3
    assert [row.get("w") for row in found] == [3.0, 3.0, None]
    page = (out / "report.html").read_text()
    for row in found:
        assert (out / str(row["picture"])).is_file()
        assert f"alt='{row['attack']}, client 0, round 1'" in page
    assert CAPTION in page
    assert len(list((out / "reconstructions").glob("*.safetensors"))) == 3


def test_a_language_models_attack_on_a_diffusion_model_is_refused(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run(monkeypatch, "attack", str(lora), "--base", str(base), "--attack", "loss_drop(documents='corpus.txt')") == 2
    )
    assert "loss_drop" in capsys.readouterr().err


def test_a_leak_of_a_lora_is_saved_as_any(base: Path, lora: Path, tmp_path: Path) -> None:
    leak = checkpoint_leak(str(base), lora, 32)
    leak.save(tmp_path / "leak.safetensors")
    again = load(tmp_path / "leak.safetensors", build)
    assert again.protocol == leak.protocol
    assert all(torch.equal(again.observed[name], tensor) for name, tensor in leak.observed.items())
    assert not is_checkpoint(tmp_path / "leak.safetensors")
    words = save_tiny("llama", tmp_path / "words")
    save_tokenizer(words)
    sizes = Lora(rank=2, alpha=4.0)
    save_adapter(tmp_path / "adapter", adapter_of(inject(pretrained(str(words), 0), sizes, 0)), sizes)
    checkpoint_leak(str(words), tmp_path / "adapter", 6).save(tmp_path / "of words.safetensors")
