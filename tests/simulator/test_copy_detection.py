"""Encoders find copies: features against oracles, copies against other images, and files that are refused."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models import copy_detection as module
from fedtap.simulator.models.copy_detection import CopyEncoder, Encoder, SameConv, encoder, similarity

DATA = Path(os.environ.get("FEDTAP_DATA_ROOT", "data"))
PHOTOGRAPHS = DATA / "dreambooth_256.zip"
WEIGHTS = DATA.parent / "weights" / "copy_encoder_32.safetensors"

DOGS = range(151, 269)
"""ImageNet's classes of breeds of dogs."""

DRAWN = 3
"""Images of `drawn`."""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    encoder.cache_clear()
    yield
    encoder.cache_clear()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Images in [0, 1]: three RGB ones of 32 x 32 unless a shape is given."""
    return torch.rand(shape or (DRAWN, 3, 32, 32), generator=torch.Generator().manual_seed(seed))


def random_weights(width: int = 4, features: int = 6) -> dict[str, Tensor]:
    """Of a CopyEncoder, with statistics of BatchNorm that are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CopyEncoder(width, features)
        for name, tensor in network.state_dict().items():
            if "num_batches" not in name and tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return network.state_dict()


def save_weights(path: Path, **changes: Tensor | None) -> Path:
    """Save random weights, some of them changed, or left out for None; `__` stands for a dot."""
    changed = random_weights() | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    return path


class ChannelMeans(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class FirstColumn(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, :, 0]


class Twice(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


class Unpooled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


class Nan(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * math.nan


def save_program(path: Path, network: nn.Module) -> Path:
    torch.jit.script(network).save(path)  # type: ignore[no-untyped-call]
    return path


def lite0() -> Encoder:
    """Skips the test where the package is not installed."""
    if importlib.util.find_spec(module.LITE0_PACKAGE.replace("-", "_")) is None:
        pytest.skip(f"{module.LITE0_PACKAGE} is not installed")
    return encoder("efficientnet_lite0")


MADE: dict[str, Callable[[Path], Encoder]] = {
    "pixels": lambda folder: encoder("pixels"),
    "efficientnet_lite0": lambda folder: lite0(),
    "small": lambda folder: encoder(str(save_weights(folder / "small.safetensors"))),
    "sscd": lambda folder: encoder(str(save_program(folder / "own.torchscript.pt", ChannelMeans()))),
}
"""The name that a row has -> how to make one."""


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Encoder:
    found = MADE[request.param](tmp_path)
    assert found.name == request.param
    assert repr(found) == f"Encoder({request.param})"
    return found


def photographs(side: int, subjects: int = 30, each: int = 6) -> tuple[Tensor, Tensor, list[str]]:
    """DreamBooth's, as `images 3 side side` in [0, 1], their subjects' numbers, and the subjects' names."""
    if not PHOTOGRAPHS.is_file():
        pytest.skip(f"{PHOTOGRAPHS} is absent: set FEDTAP_DATA_ROOT to the folder that holds it")
    images, numbers = [], []
    with zipfile.ZipFile(PHOTOGRAPHS) as archive:
        files = [name for name in archive.namelist() if name.endswith(".jpg")]
        names = sorted({name.split("/")[1] for name in files})[:subjects]
        for number, subject in enumerate(names):
            for file in [name for name in files if name.split("/")[1] == subject][:each]:
                image = Image.open(BytesIO(archive.read(file))).convert("RGB")
                resized = image.resize((side, side), Image.Resampling.BILINEAR)
                images.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255)
                numbers.append(number)
    return torch.stack(images), torch.tensor(numbers), names


def copies(images: Tensor) -> dict[str, Tensor]:
    """Noisy, flipped and blurred."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return {
        "noisy": (images + 0.05 * noise).clamp(0, 1),
        "flipped": images.flip(3),
        "blurred": F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1),
    }


def between(features: Tensor, subjects: Tensor) -> Tensor:
    """Similarities of photographs of different subjects."""
    return similarity(features, features)[subjects[:, None] != subjects]


# What every encoder keeps to.


def test_features_have_norm_one_and_no_gradient(made: Encoder) -> None:
    features = made(drawn().requires_grad_())
    assert features.shape[0] == DRAWN
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert not features.is_inference()  # an attack may compute with them under autograd
    torch.testing.assert_close(features.norm(dim=1), torch.ones(DRAWN))


def test_features_do_not_depend_on_the_batch(made: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    images = drawn(5, 3, 32, 32) * torch.linspace(0.2, 1, 5).view(-1, 1, 1, 1)
    whole = made(images)
    monkeypatch.setattr(module, "ENCODED_AT_ONCE", 2)
    torch.testing.assert_close(made(images), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(made(images[[4]]), whole[[4]], atol=1e-5, rtol=0)
    torch.testing.assert_close(made(images.flip(0)), whole.flip(0), atol=1e-5, rtol=0)
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_no_images_have_no_features(made: Encoder) -> None:
    assert made(drawn(0, 3, 32, 32)).shape == (0, made(drawn()).shape[1])


def test_doubles_and_halves_are_taken(made: Encoder) -> None:
    images = drawn().half()
    torch.testing.assert_close(made(images), made(images.double()), atol=1e-5, rtol=0)


def test_grey_images_of_any_size_are_those_in_rgb(made: Encoder) -> None:
    grey = drawn(2, 1, 40, 25)
    colour = made(grey.expand(-1, 3, -1, -1))
    if made.name == "pixels":  # each entry three times
        torch.testing.assert_close(similarity(colour, colour), similarity(made(grey), made(grey)))
    else:
        torch.testing.assert_close(made(grey), colour, atol=1e-5, rtol=0)


def test_an_image_is_likest_to_itself(made: Encoder) -> None:
    found = similarity(made(drawn()), made(drawn()))
    assert found.shape == (DRAWN, DRAWN)
    torch.testing.assert_close(found.diagonal(), torch.ones(DRAWN))
    assert (found <= 1 + 1e-6).all()
    assert similarity(made(drawn()), made(drawn(1, 3, 32, 32))).shape == (DRAWN, 1)


def test_the_random_numbers_are_left_alone(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "small.safetensors")
    before = torch.get_rng_state()
    encoder(str(path))(drawn())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_is_read_once(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "small.safetensors")
    assert encoder(str(path)) is encoder(str(path))
    path.unlink()
    encoder(str(path))


def test_no_name_is_the_packaged_encoder_or_else_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder("") is lite0()
    encoder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert encoder("") is encoder("pixels")


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (drawn(2, 4, 8, 8), "have 4 channels"),
        (drawn(2, 3, 8, 8) * math.nan, "not finite"),
        (drawn(2, 3, 8, 8) / 0, "not finite"),
    ],
)
def test_images_that_cannot_be_compared_are_refused(made: Encoder, images: Tensor, sentence: str) -> None:
    with pytest.raises(FedtapError, match=sentence) as caught:
        made(images)
    check_sentence(caught.value)


# The baseline.


def test_pixels_are_compared_by_pearsons_correlation() -> None:
    images = drawn(4, 3, 5, 7)
    features = encoder("pixels")(images)
    expected = torch.from_numpy(np.corrcoef(images.flatten(1).double().numpy())).float()
    torch.testing.assert_close(similarity(features, features), expected, atol=1e-6, rtol=0)


@given(
    seed=st.integers(0, 2**31),
    contrast=st.floats(0.02, 1),
    brightness=st.floats(0, 1),
    channels=st.sampled_from([1, 3]),
    side=st.integers(2, 9),
)
def test_pixels_forgive_brightness_and_contrast(
    seed: int, contrast: float, brightness: float, channels: int, side: int
) -> None:
    images = drawn(2, channels, side, side, seed=seed)
    features = encoder("pixels")(images)
    changed = encoder("pixels")(contrast * images + brightness * (1 - contrast))
    torch.testing.assert_close(changed, features, atol=1e-4, rtol=0)
    negative = encoder("pixels")(1 - images)
    torch.testing.assert_close(negative, -features, atol=1e-4, rtol=0)


@given(st.floats(0, 1, width=32))
def test_a_constant_image_is_like_none(level: float) -> None:
    constant = torch.full((1, 3, 6, 7), level)
    assert not encoder("pixels")(constant).any()
    assert not encoder("pixels")(constant * (1 + 1e-7 * drawn(1, 3, 6, 7))).any()  # rounding


# The encoder for 32 x 32 pixels.


def by_hand(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The README's description in float64, from the weights by name."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def norm(name: str, hidden: Tensor) -> Tensor:
        mean, variance = (weights[f"{name}.running_{what}"].view(-1, 1, 1) for what in ("mean", "var"))
        scale, shift = (weights[f"{name}.{what}"].view(-1, 1, 1) for what in ("weight", "bias"))
        return (hidden - mean) / (variance + 1e-5).sqrt() * scale + shift

    hidden = norm("bn1", F.conv2d(2 * images.double() - 1, weights["conv1.weight"], padding=1)).clamp_min(0)
    for layer in (1, 2, 3):
        for block in (0, 1, 2):
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            inner = F.conv2d(hidden, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = F.conv2d(norm(f"{name}.bn1", inner).clamp_min(0), weights[f"{name}.conv2.weight"], padding=1)
            if stride == 2:
                hidden = norm(
                    f"{name}.shortcut.1", F.conv2d(hidden, weights[f"{name}.shortcut.0.weight"], stride=stride)
                )
            hidden = (norm(f"{name}.bn2", inner) + hidden).clamp_min(0)
    return F.normalize(hidden.mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]).float()


@pytest.mark.parametrize("half", [False, True])
def test_a_file_of_weights_is_the_network_that_it_says(tmp_path: Path, half: bool) -> None:
    weights = {name: tensor.half() if half else tensor for name, tensor in random_weights(5, 7).items()}
    save_file(weights, tmp_path / "small.safetensors")
    found = encoder(str(tmp_path / "small.safetensors"))(drawn())
    torch.testing.assert_close(found, by_hand(weights, drawn()), atol=1e-5, rtol=0)


def test_copies_are_found_among_photographs() -> None:
    """The figures of the weights' README: copies .94 to .98, rank-1 99 %, other subjects .03, 99th percentile .45."""
    if not WEIGHTS.is_file():
        pytest.skip(f"{WEIGHTS} is absent")
    images, subjects, _ = photographs(32, each=2)
    found = encoder(str(WEIGHTS))
    assert found.name == "copy_encoder_32"
    features = found(images)
    for copied in copies(images).values():
        similar = similarity(features, found(copied))
        assert 0.93 < similar.diagonal().mean() < 0.99
        assert (similar.argmax(0) == torch.arange(len(images))).float().mean() > 0.97
    other = between(features, subjects)
    assert abs(other.mean() - 0.03) < 0.02
    assert 0.35 < other.quantile(0.99) < 0.55


# EfficientNet-Lite0.


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after an axis, by TensorFlow's rule for SAME."""
    missing = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    return missing // 2, missing - missing // 2


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("side", [14, 56])
def test_padding_is_tensorflows_same(kernel: int, stride: int, side: int) -> None:
    convolution, images = SameConv(2, 3, kernel, stride), drawn(1, 2, side, side)
    before, after = same_padding(side, kernel, stride)
    expected = F.conv2d(F.pad(images, (before, after, before, after)), convolution.weight, stride=stride)
    assert expected.shape[-1] == side // stride
    torch.testing.assert_close(convolution(images), expected)


def lite0_by_hand(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network as TensorFlow has it, from the package's weights by name; images have 224 pixels a side."""

    def norm(name: str, hidden: Tensor) -> Tensor:
        mean, variance, scale, shift = (
            weights[f"{name}.{what}"] for what in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(hidden, mean, variance, scale, shift, eps=1e-3)

    def same(hidden: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
        before, after = same_padding(hidden.shape[-1], weight.shape[-1], stride)
        return F.conv2d(F.pad(hidden, (before, after, before, after)), weight, stride=stride, groups=groups)

    hidden = norm("_bn0", same((255 * images - 127) / 128, weights["_conv_stem.weight"], 2, 1)).clamp(0, 6)
    for number in range(16):
        name = f"_blocks.{number}"
        inner = hidden
        if number > 0:
            inner = norm(f"{name}._bn0", F.conv2d(inner, weights[f"{name}._expand_conv.weight"])).clamp(0, 6)
        depthwise = weights[f"{name}._depthwise_conv.weight"]
        stride = 2 if number in (1, 3, 5, 11) else 1
        inner = norm(f"{name}._bn1", same(inner, depthwise, stride, len(depthwise))).clamp(0, 6)
        inner = norm(f"{name}._bn2", F.conv2d(inner, weights[f"{name}._project_conv.weight"]))
        hidden = inner + hidden if inner.shape == hidden.shape else inner
    hidden = norm("_bn1", F.conv2d(hidden, weights["_conv_head.weight"])).clamp(0, 6)
    return F.normalize(hidden.mean((2, 3)))


def test_the_packaged_network_is_tensorflows() -> None:
    found = lite0()
    path = module._lite0_file()
    assert path is not None
    images = F.interpolate(drawn(2, 3, 7, 7), (224, 224), mode="bilinear")
    expected = lite0_by_hand(torch.load(path, weights_only=True), images)
    torch.testing.assert_close(found(images), expected, atol=1e-5, rtol=0)


def test_the_packaged_network_knows_dogs() -> None:
    """Its classifier, which no encoder uses, tells whether weights, padding and range of pixels fit each other."""
    found = lite0()
    images, subjects, names = photographs(224)
    dogs = torch.tensor([bool(re.fullmatch(r"dog\d?", names[number])) for number in subjects])
    chosen = torch.cat([images[dogs][::5], images[~dogs][::20]])
    with torch.no_grad():
        odds = found.network.network.fc(found.network(chosen)).softmax(1)[:, DOGS].sum(1)  # type: ignore[union-attr,operator]
    count = len(images[dogs][::5])
    assert odds[:count].mean() > 0.85
    assert odds[count:].mean() < 0.15


def test_the_packaged_network_finds_flipped_photographs() -> None:
    found = lite0()
    images, subjects, _ = photographs(32, subjects=12, each=1)
    features = found(images)
    similar = similarity(features, found(copies(images)["flipped"]))
    assert torch.equal(similar.argmax(0), torch.arange(len(images)))
    assert similar.diagonal().mean() > between(features, subjects).mean() + 0.3


# TorchScript.


def test_a_program_sees_imagenets_range_of_pixels(tmp_path: Path) -> None:
    found = encoder(str(save_program(tmp_path / "means.pt", ChannelMeans())))
    colour = torch.tensor([0.9, 0.2, 0.4])
    expected = F.normalize((colour - torch.tensor(module.SSCD_MEAN)) / torch.tensor(module.SSCD_STD), dim=0)
    torch.testing.assert_close(found(colour.view(1, 3, 1, 1).expand(1, 3, 20, 30))[0], expected)


def test_a_program_sees_288_pixels_a_side(tmp_path: Path) -> None:
    found = encoder(str(save_program(tmp_path / "column.torchscript", FirstColumn())))
    assert found(drawn(2, 3, 50, 30)).shape == (2, 288)


# Files that are refused.


def check_sentence(error: FedtapError) -> None:
    text = str(error)
    assert text.endswith((".", "?"))
    assert "\n" not in text
    assert ": " in text  # the remedy comes after it
    assert not re.search(r"[a-z)]\. [A-Z]", text)
    assert len(text) < 400


def cut(path: Path) -> Path:
    """The file without its second half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def save_pickle(path: Path, **how: bool) -> Path:
    torch.save({"weight": torch.ones(3)}, path, **how)
    return path


def save_text(path: Path) -> Path:
    path.write_text("not found")
    return path


ANOTHER = "holds another network"

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another name": (lambda folder: "sscd", "no encoder named 'sscd': there are FILE"),
    "a slip": (lambda folder: "pixel", "did you mean pixels"),
    "another suffix": (lambda folder: save_text(folder / "encoder.onnx"), "no encoder named"),
    "a NUL": (lambda folder: "a\0.pt", "is no file"),
    "no weights": (lambda folder: folder / "small.safetensors", "is no file, so it cannot be read"),
    "no program": (lambda folder: folder / "sscd.torchscript.pt", "is no file, so it cannot be read"),
    "a folder": (lambda folder: folder / "..pt", "is no file|no encoder named"),
    "cut weights": (lambda folder: cut(save_weights(folder / "a.safetensors")), "cannot be read as safetensors"),
    "text for weights": (lambda folder: save_text(folder / "a.safetensors"), "cannot be read as safetensors"),
    "a weight short": (
        lambda folder: save_weights(folder / "a.safetensors", layer2__0__shortcut__0__weight=None),
        rf"{ANOTHER}.*it has no layer2\.0\.shortcut\.0\.weight",
    ),
    "a weight more": (lambda folder: save_weights(folder / "a.safetensors", fc=torch.ones(1)), f"{ANOTHER}.*it has fc"),
    "no stem": (lambda folder: save_weights(folder / "a.safetensors", conv1__weight=None), ANOTHER),
    "a number for a stem": (
        lambda folder: save_weights(folder / "a.safetensors", conv1__weight=torch.ones(())),
        ANOTHER,
    ),
    "another shape": (
        lambda folder: save_weights(folder / "a.safetensors", layer1__2__bn2__bias=torch.ones(5)),
        rf"{ANOTHER}.*layer1\.2\.bn2\.bias has another shape or type",
    ),
    "another type": (
        lambda folder: save_weights(folder / "a.safetensors", linear__bias=torch.ones(6, dtype=torch.complex64)),
        rf"{ANOTHER}.*linear\.bias has another shape or type",
    ),
    "too wide": (
        lambda folder: save_weights(folder / "a.safetensors", conv1__weight=torch.ones(1025, 3, 3, 3)),
        f"{ANOTHER}.*of a size that can be built",
    ),
    "NaN": (
        lambda folder: save_weights(folder / "a.safetensors", bn1__bias=torch.full((4,), math.nan)),
        "is no encoder of images",
    ),
    "a pickle": (lambda folder: save_pickle(folder / "sscd_disc_mixup.torchvision.pt"), "is a pickled checkpoint"),
    "an old pickle": (
        lambda folder: save_pickle(folder / "a.pt", _use_new_zipfile_serialization=False),
        "is a pickled checkpoint",
    ),
    "a cut program": (
        lambda folder: cut(save_program(folder / "a.pt", ChannelMeans())),
        "cannot be read as TorchScript",
    ),
    "text for a program": (lambda folder: save_text(folder / "a.torchscript"), "cannot be read as TorchScript"),
    "two outputs": (lambda folder: save_program(folder / "a.pt", Twice()), "is no encoder of images"),
    "a map of features": (lambda folder: save_program(folder / "a.pt", Unpooled()), "is no encoder of images"),
    "NaN from a program": (lambda folder: save_program(folder / "a.pt", Nan()), "is no encoder of images"),
    "another number of channels": (
        lambda folder: save_program(folder / "a.pt", nn.Conv2d(1, 1, 3)),
        "is no encoder of images",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_encoder_is_refused(case: str, tmp_path: Path) -> None:
    make, sentence = REFUSED[case]
    name = str(make(tmp_path))
    with pytest.raises(FedtapError, match=sentence) as caught:
        encoder(name)
    check_sentence(caught.value)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Mischief:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "run",))

    for new in (True, False):
        torch.save(Mischief(), tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(FedtapError, match="pickled"):
            encoder(str(tmp_path / "a.pt"))
    assert not (tmp_path / "run").exists()


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedtapError, match=r"is not installed: pip install 'fedtap\[diffusion\]'\.$") as caught:
        encoder("efficientnet_lite0")
    check_sentence(caught.value)


def test_a_package_of_another_sum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pickle(tmp_path / "lite0.pth")
    monkeypatch.setattr(module, "_lite0_file", lambda: tmp_path / "lite0.pth")
    with pytest.raises(FedtapError, match="damaged or of another version") as caught:
        encoder("efficientnet_lite0")
    check_sentence(caught.value)
