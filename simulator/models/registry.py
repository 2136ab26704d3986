"""Victim models. Each takes pixels in [0, 1], normalises inside itself, and returns logits.

A model is named (`lenet`, `lenet(width=16, depth=4)`) or given as `module:function` of the user's own, called as
`function(shape, classes)`, or as `function()` where it takes no two arguments. Whoever takes a name from a file or from
the network asks `check_allowed` first.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedtap.simulator.data import vision
from fedtap.simulator.defences.defence import ModelDefence
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.files import read_tensors
from fedtap.simulator.models import likelihoods
from fedtap.simulator.models.diffusion import denoiser, is_diffusion
from fedtap.simulator.models.language import LANGUAGE_MODELS, build_language
from fedtap.simulator.models.pretrained import PACKAGED, pretrained

Shape = tuple[int, ...]


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
}


def mlp(
    shape: Shape,
    classes: int,
    width: int = 256,
    depth: int = 2,
    activation: str = "relu",
    bias: bool = True,
    standardised: bool = False,
) -> nn.Module:
    """Two hidden ReLU layers of 256 units; the first linear layer's gradient holds the image in closed form.

    Pixels are taken as they are, in [0, 1], or `standardised` by `Normalise`.

    Raises:
        FedtapError: no such activation.
    """
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    widths = [math.prod(shape), *[width] * depth]
    hidden = [(nn.Linear(a, b, bias=bias), ACTIVATIONS[activation]()) for a, b in itertools.pairwise(widths)]
    before = [Normalise()] if standardised else []
    return nn.Sequential(*before, nn.Flatten(), *itertools.chain(*hidden), nn.Linear(widths[-1], classes, bias=bias))


class LeNet(nn.Module):
    """DLG's LeNet (Zhu et al. 2019, https://arxiv.org/abs/1906.08935): three sigmoid convolutions and a linear layer.

    Weights and biases are drawn from U(-0.5, 0.5), as DLG and Learning to Invert do. 15,826 parameters at 3x32x32.
    Convolutions beyond the second, `depth` of them in all, have stride 1.
    """

    def __init__(self, shape: Shape, classes: int, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        channels, *sides = shape
        for number in range(depth):
            stride = 2 if number < 2 else 1
            conv = nn.Conv2d(width if number else channels, width, 5, padding=2, stride=stride)
            self.add_module(f"conv{number + 1}", conv)
            sides = [(side - 1) // stride + 1 for side in sides]
        self.depth = depth
        self.fc = nn.Linear(width * math.prod(sides), classes)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """U(-0.5, 0.5) for every weight and bias, in the order of the parameters."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        hidden = images
        for number in range(self.depth):
            # a_k = s(W_k * a_{k-1} + b_k): the sigmoid has the second derivatives that gradient matching needs
            hidden = torch.sigmoid(self.get_submodule(f"conv{number + 1}")(hidden))
        return self.fc(hidden.flatten(1))  # type: ignore[no-any-return]


class Normalise(nn.Module):
    """(pixels - mean) / std, by channel; colour images use ImageNet's figures, others the mean of those."""

    def forward(self, images: Tensor) -> Tensor:
        colour = images.shape[-3] == 3
        # mean and standard deviation of ImageNet's training images, as torchvision's models take them
        mean = images.new_tensor([0.485, 0.456, 0.406] if colour else [0.449]).view(-1, 1, 1)
        std = images.new_tensor([0.229, 0.224, 0.225] if colour else [0.226]).view(-1, 1, 1)
        return (images - mean) / std


def convnet(shape: Shape, classes: int) -> nn.Module:
    """Three ReLU convolutions (32, 64, 64), two poolings, a linear layer: a plain classifier without BatchNorm."""
    channels, height, width = shape
    return nn.Sequential(
        Normalise(),
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), classes),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut without parameters (option A: subsample, pad with zeros)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.pad = outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = self.bn2(self.conv2(hidden))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        if self.pad:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return F.relu(hidden + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 for small images (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2)."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.normalise = Normalise()
        self.conv1 = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(BasicBlock(a if n == 0 else b, b, 1 if n or a == b else 2) for n in range(3)))
            for a, b in itertools.pairwise(widths)
        )
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(self.normalise(images))))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(hidden.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP. Attention is written out: fused kernels have no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        images, length, width = tokens.shape
        query, key, value = (
            self.qkv(self.norm1(tokens)).view(images, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        # softmax(Q K^T / sqrt(columns)) V
        mixed = torch.softmax(query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5, dim=-1) @ value
        tokens = tokens + self.proj(mixed.transpose(1, 2).reshape(images, length, width))
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


VIT_WIDTH, VIT_HEADS = 96, 4
"""Features of a token, and heads of each attention, of the vision transformer."""


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929): 8x8 patches of the grid.

    Width 96, 4 blocks, 4 heads, learned positions, mean pooling.
    """

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        patch = (max(height // 8, 1), max(width // 8, 1))
        self.normalise = Normalise()
        self.embed = nn.Conv2d(channels, VIT_WIDTH, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, (height // patch[0]) * (width // patch[1]), VIT_WIDTH))
        self.blocks = nn.Sequential(*(EncoderBlock(VIT_WIDTH, VIT_HEADS) for _ in range(4)))
        self.norm = nn.LayerNorm(VIT_WIDTH)
        self.head = nn.Linear(VIT_WIDTH, classes)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(self.normalise(images)).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))  # type: ignore[no-any-return]


def softmax(shape: Shape, classes: int) -> nn.Module:
    """Softmax regression without biases, at zero weights."""
    linear = nn.Linear(math.prod(shape), classes, bias=False)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(nn.Flatten(), linear)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet": LeNet,
    "convnet": convnet,
    "resnet20": ResNet20,
    "vit": ViT,
    "softmax": softmax,
}


INSTALLED = re.compile(r"(.+)\+(\w+\([^()]*\))")
"""A model's name with what a defence put into it: lenet+precode(64)."""


LARGEST_ARGUMENTS = {"depth": 256, "width": 65_536}
"""Sizes that a model's name may ask for, at most: more are a mistake, or meant to fill the memory."""

OWN_MODELS = "FEDTAP_OWN_MODELS"
"""Environment variable with the `module:function` names that a run config may name on this host, joined by commas."""

_CODE = re.compile(r"\w+(\.\w+)*:\w+")


def plain_name(name: str) -> str:
    """A model's name without what a defence put into it."""
    return _installed(name)[0]


def _installed(name: str) -> tuple[str, ModelDefence | None]:
    """A model's name without a defence, and that defence."""
    if found := INSTALLED.fullmatch(name):
        try:
            (part,) = described(found[2])
        except FedtapError:
            return name, None
        if isinstance(part, ModelDefence):
            return found[1], part
    return name, None


def allow(names: Iterable[str]) -> None:
    """Let run configs in this process, and in those that it starts, name these models of the operator's own."""
    own = dict.fromkeys(filter(None, os.environ.get(OWN_MODELS, "").split(",")))
    own |= dict.fromkeys(map(plain_name, names))
    os.environ[OWN_MODELS] = ",".join(own)


def check_allowed(name: str) -> None:
    """Refuse a model's name that came from elsewhere and names code, unless this host's operator allows this very name.

    Raises:
        FedtapError: with the variable to set.
    """
    plain = plain_name(name)
    if ":" in plain and plain not in os.environ.get(OWN_MODELS, "").split(","):
        raise FedtapError(
            f"The run config names code to import, {short(plain)!r}, and only who runs this host may: start it with "
            f"{OWN_MODELS}={short(plain)} if you trust it."
        )


def build(name: str, shape: Shape, classes: int, seed: int | None = None) -> nn.Module:
    """The named model, in training mode; on the meta device (no weights, no memory) where no seed is given.

    Raises:
        FedtapError: no such model, or a user's function that does not return a module for these images.
    """
    if name.partition("(")[0] in LANGUAGE_MODELS and len(shape) == 1:
        return build_language(name, shape[0], classes, seed)
    if name in PACKAGED:
        return pretrained(name, seed)
    if len(shape) == 3 and is_diffusion(name):
        return denoiser(name, seed)
    if name.partition("(")[0] in likelihoods.LIKELIHOODS:  # a Bayesian model, which answers with a posterior
        return likelihoods.likelihood(name, shape[0]).network()
    plain, defence = _installed(name)
    own = _CODE.fullmatch(plain) is not None
    factory = _users_own(plain) if own else _sized(plain)

    def made(device: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed or 0)
            network = factory(shape, classes)
            if own and isinstance(network, nn.Module):
                network.float()  # weights travel as float32
            if isinstance(network, LeNet) and seed is not None:
                network.reset_parameters(torch.Generator().manual_seed(seed))
            if defence:
                if _numbers(network) > LARGE_MODEL:
                    raise ValueError(f"{defence.name} is for models of up to {LARGE_MODEL:,} parameters")
                network = defence.install(network, _yields_logits(network, shape))  # not remembered: its name changes
        return network

    def checked(network: nn.Module, device: str) -> nn.Module:
        with torch.no_grad(), torch.device(device):
            logits = network.eval()(torch.zeros(2, *shape))
        if tuple(logits.shape) != (2, classes):
            raise ValueError(f"it returns {tuple(logits.shape)} for two images, not (2, {classes})")
        return network.train()

    try:
        if seed is not None:
            return checked(made("cpu"), "cpu")
        try:
            skeleton = made("meta")
            large = _numbers(skeleton) > SMALL_MODEL or math.prod(shape) > SMALL_MODEL // 4
            if large and not _counts(skeleton):
                return on_meta(checked(skeleton, "meta"))
        except (Exception, SystemExit):  # a user's code may need real numbers as it is built
            if not own:
                raise
        return on_meta(checked(made("cpu"), "cpu"))
    except FedtapError:
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        size = short("x".join(map(str, shape)), 30)
        raise FedtapError(
            f"Model {short(name)} cannot be built for {size} images and {classes} classes ({short(error, 100)}): "
            "a model is a function of (shape, classes) that returns an nn.Module from images to logits."
        ) from error


SMALL_MODEL = 2**22
"""Parameters of a model, and four times the numbers of an example, up to which it is tried out with real numbers. That
takes milliseconds; the first forward pass on the meta device loads torch's compiler, which takes seconds."""

LARGE_MODEL = 2**26
"""Parameters up to which the layer that yields the logits is looked for, which takes real numbers."""


def _numbers(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _counts(network: nn.Module) -> bool:
    """Whether the network computes with whole numbers that it keeps, such as positions, which are no weights."""
    named = [name for name, buffer in network.named_buffers() if not buffer.is_floating_point()]
    return any(not name.endswith("num_batches_tracked") for name in named)


def on_meta(network: nn.Module) -> nn.Module:
    """The network with parameters and floating point buffers on the meta device, in place.

    `to` would untie weights that layers share, and take their values from masks and positions, which are no weights.
    """
    on_meta: dict[int, Any] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                copied = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                module._parameters[name] = on_meta.setdefault(id(parameter), copied)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = on_meta.setdefault(id(buffer), buffer.to("meta"))
    return network


def logits_layer(network: nn.Module, shape: Shape) -> str | None:
    """Name of the nn.Linear whose outputs are the logits, wherever it is registered; None where none's are.

    Args:
        shape: of one input, without the batch.

    Raises:
        FedtapError: the network cannot be run on one input.
    """
    known = _LOGITS_LAYERS.setdefault(network, {})
    if shape not in known:
        known[shape] = _yields_logits(network, shape)
    return known[shape]


_LOGITS_LAYERS: WeakKeyDictionary[nn.Module, dict[Shape, str | None]] = WeakKeyDictionary()


def _yields_logits(network: nn.Module, shape: Shape) -> str | None:
    """The layer is found by one backward pass at made-up weights, with z the logits of one input and
    ``d = softmax(z) - onehot``:

    the layer z = W e + b has the gradients ``dL/db = d`` and ``dL/dW = d e^T``, and its ``softmax(W e + b)`` is the
    network's. Neither views, dropout nor a log-softmax after the layer change that; anything else does.
    """
    draw = torch.Generator().manual_seed(0)

    def made_up(tensor: Tensor) -> Tensor:
        if tensor.ndim > 1:
            return torch.randn(tensor.shape, generator=draw) / math.sqrt(tensor[0].numel())
        sizes = 1 + torch.rand(tensor.shape, generator=draw)
        return sizes * (1 - 2 * (torch.arange(sizes.numel()) % 2)).view_as(sizes)  # of both signs: a ReLU would show

    if torch.get_default_device().type != "cpu":
        with torch.device("cpu"):
            return _yields_logits(network, shape)
    copied = copy.deepcopy(network).eval()  # BatchNorm keeps its statistics, and nothing is dropped
    weights = {name: made_up(weight).requires_grad_() for name, weight in copied.named_parameters()}
    buffers = {name: made_up(b).abs() for name, b in copied.named_buffers() if b.is_floating_point()}  # variances too
    whole = {n: b for n, b in copied.named_buffers() if n not in buffers}  # counters, positions
    whole = {n: torch.zeros_like(b, device="cpu") if b.is_meta else b.cpu() for n, b in whole.items()}
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            z = functional_call(copied, {**weights, **buffers, **whole}, (torch.rand(1, *shape, generator=draw),))
            label, single = torch.zeros(1, dtype=torch.long), z.shape[1] == 1  # of one logit the softmax is constant
            loss = z.sum() if single else F.cross_entropy(z, label)
            gradients = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
    except Exception as error:  # a user's code may raise anything
        raise FedtapError(
            f"The model cannot be run on one input with made-up weights ({short(error, 120)}), by which the layer that "
            "yields the logits is found: keep its tensors as parameters or buffers, and do without branches on data."
        ) from error
    gradient = {name: gradient for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    names = {id(weight): name for name, weight in copied.named_parameters()}
    ends = z.detach()[0] if single else z.detach().softmax(1)[0]
    d = torch.ones(1) if single else ends - F.one_hot(label, z.shape[1])[0]

    def yields(layer: nn.Linear) -> bool:
        weight, bias = (names.get(id(tensor)) for tensor in (layer.weight, layer.bias))  # a norm's weight has no name
        if (bias or weight) not in gradient or layer.out_features != len(d):
            return False
        if bias is not None and not torch.allclose(gradient[bias], d, rtol=1e-3, atol=1e-5):
            return False
        if weight is None:
            return True
        if weight not in gradient:
            return False
        # dL/dW = d e', so e = d' dL/dW / |d|^2
        e = d @ gradient[weight] / d.square().sum()
        off = gradient[weight] - torch.outer(d, e)
        there = weights[weight] @ e + (0 if bias is None else weights[bias])
        found = there if single else there.softmax(0)
        near = torch.allclose(found, ends, rtol=1e-3, atol=1e-5)
        return near and bool(off.norm() <= 1e-3 * gradient[weight].norm())

    linear = [(name, layer) for name, layer in copied.named_modules() if isinstance(layer, nn.Linear)]
    return next((name for name, layer in reversed(linear) if yields(layer)), None)


def with_weights(network: nn.Module, path: Path) -> nn.Module:
    """The network with the weights of a .safetensors file, parameters and buffers by name.

    Raises:
        FedtapError: the file is not there, damaged, or of another model.
    """
    tensors = read_tensors(path)
    try:
        strange = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
        if strange is not None:
            raise ValueError(f"{strange} holds NaN or infinity")
        found = network.load_state_dict(tensors, strict=False)
    except (RuntimeError, ValueError) as error:
        raise FedtapError(
            f"{short(path, 80)} does not hold this model's weights ({short(error, 100)}): "
            "give a .safetensors file with a tensor for each parameter."
        ) from error
    lacking = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    if others := [*lacking, *found.unexpected_keys]:
        raise FedtapError(
            f"{short(path, 80)} holds another model's weights, since {short(others[0])} is not in both: name its "
            "model, --model."
        )
    return network


def _sized(name: str) -> Callable[[Shape, int], nn.Module]:
    """The model of this name, or of this name with sizes: `lenet`, `lenet(width=16)`."""
    base, bracket, _ = name.partition("(")
    if base not in BUILDERS:
        raise unknown("model", name, BUILDERS)
    parameters = inspect.signature(BUILDERS[base]).parameters.values()
    takes = {
        parameter.name: parameter.default for parameter in parameters if parameter.name not in ("shape", "classes")
    }
    sizes: dict[str, object] = {}
    try:
        call = ast.parse(name, mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            sizes = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    fit = all(
        name in takes
        and type(size) is type(takes[name])
        and (type(size) is not int or 1 <= size <= LARGEST_ARGUMENTS.get(name, 0))
        for name, size in sizes.items()
    )
    if bracket and not (sizes and fit):
        most = " and ".join(f"{size} to {LARGEST_ARGUMENTS[size]:,}" for size in LARGEST_ARGUMENTS if size in takes)
        how = f"it has one: {base}"
        if takes:
            how = f"it takes whole numbers from 1, {most}: {base}({next(iter(takes))}=16)"
        raise FedtapError(f"Model {short(name)!r} is no size of {base} that can be built; {how}.")
    return functools.partial(BUILDERS[base], **sizes)


def _users_own(name: str) -> Callable[[Shape, int], nn.Module]:
    """The user's function, called with (shape, classes), or without arguments where it takes none."""
    module, _, function = name.partition(":")
    try:
        try:
            found = getattr(importlib.import_module(module), function)
        except RuntimeError:  # it may import torchvision where that is built for CUDA and torch is not
            vision.torchvision()
            found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # a user's module may do anything as it is imported
        raise FedtapError(
            f"Model {short(name)} cannot be imported ({type(error).__name__}: {short(error)}): "
            "give module:function, of a module on PYTHONPATH that imports without error."
        ) from error
    try:
        inspect.signature(found).bind((), 1)
    except TypeError:
        return lambda shape, classes: found()
    except ValueError:  # it has no signature
        pass
    return found  # type: ignore[no-any-return]
