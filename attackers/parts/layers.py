"""A network read as a chain of layers and invertible activations, from the pixels to the logits.

A linear layer and a convolution are one thing here: at each of its `places` a layer sees a patch of its input, and
``z[place, filter] = patch[place] . weight[filter] + bias[filter]``. A linear layer has one place, whose patch is all of
its input. So equations are written once, and no solver has to know what a stride is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx, nn
from torch.nn import functional as F

from simulator.errors import FedtapError
from simulator.leaks import Leak, Tensors
from simulator.models import Normalise


@dataclass(frozen=True)
class Activation:
    """An activation s that can be undone, all of it told from its value ``a = s(z)``."""

    apply: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    """``s'(z)``."""
    bend: Callable[[Tensor], Tensor]
    """Derivative of `slope` by a."""
    low: float = -torch.inf
    high: float = torch.inf


IDENTITY = Activation(lambda z: z, lambda a: a, torch.ones_like, torch.zeros_like)
SIGMOID = Activation(torch.sigmoid, torch.logit, lambda a: a * (1 - a), lambda a: 1 - 2 * a, 0.0, 1.0)
TANH = Activation(torch.tanh, torch.atanh, lambda a: 1 - a * a, lambda a: -2 * a, -1.0, 1.0)


def leaky(slope: float) -> Activation:
    """``z`` above zero and ``slope * z`` below."""

    def slopes(a: Tensor) -> Tensor:
        return torch.where(a > 0, 1.0, slope).to(a)

    return Activation(lambda z: F.leaky_relu(z, slope), lambda a: a / slopes(a), slopes, torch.zeros_like)


@dataclass(frozen=True)
class Layer:
    """A layer with weights, and the activation that its output goes through (none after the last)."""

    name: str
    """Prefix of its parameters, with the dot."""
    patches: Int[Tensor, "places patch"]
    """Which entry of the flat input each entry of a patch is; `inputs`, one past the last, is a zero of the padding."""
    inputs: int
    activation: Activation = IDENTITY

    def parameters(self, tensors: Tensors, victims: int, stacked: bool) -> tuple[Tensor, Tensor]:
        """Weight `victims filters patch` and bias `victims filters` (zero where it has none), in float64."""
        weight = tensors[f"{self.name}weight"].double()
        bias = tensors.get(f"{self.name}bias", weight.new_zeros(weight.shape[: 2 if stacked else 1])).double()
        if not stacked:
            weight, bias = weight.expand(victims, *weight.shape), bias.expand(victims, *bias.shape)
        return weight.flatten(2), bias

    def gather(self, flat: Float[Tensor, "victims inputs"]) -> Float[Tensor, "victims places patch"]:
        """What each place sees of the input."""
        return F.pad(flat, (0, 1))[:, self.patches]

    def scatter(self, seen: Float[Tensor, "victims places patch"]) -> Float[Tensor, "victims inputs"]:
        """The transpose of `gather`."""
        total = seen.new_zeros(len(seen), self.inputs + 1)
        return total.index_add_(1, self.patches.flatten(), seen.flatten(1))[:, :-1]


@dataclass(frozen=True)
class Chain:
    """The layers in order, and what stands before the first: its input is ``scale * pixel + shift``."""

    layers: tuple[Layer, ...]
    scale: Float[Tensor, "pixels"]
    shift: Float[Tensor, "pixels"]


def chain(leak: Leak) -> Chain:
    """The leak's network as a chain, found by tracing it.

    Raises:
        FedtapError: something in it is no layer of such a chain; it is named.
    """
    network, device = leak.network, leak.device
    pixels = torch.Size(leak.protocol.shape)
    scale, shift = torch.ones(pixels.numel()).double(), torch.zeros(pixels.numel()).double()
    graph = _trace(leak)
    modules = dict(network.named_modules())
    layers: list[Layer] = []
    shape, before = pixels, next(iter(graph.nodes))
    for node in list(graph.nodes)[1:]:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if node.all_input_nodes != [before] or len(before.users) != 1:
            raise _unsupported(leak, node, module, "is not fed by the step before it alone")
        before = node
        activation = _activation(node, module)
        if node.op == "output" or isinstance(module, nn.Identity):
            continue
        if _flattens(node, module):
            shape = torch.Size([shape.numel()])
        elif isinstance(module, Normalise) and not layers:
            zero, one = module(torch.zeros(1, *shape).double()), module(torch.ones(1, *shape).double())
            scale, shift = scale * (one - zero).flatten(), shift * (one - zero).flatten() + zero.flatten()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            patches = _patches(module, shape)
            if patches is None or not module.weight.requires_grad:
                why = "is frozen, so its gradient is not sent" if patches is not None else "is of an unusual form"
                raise _unsupported(leak, node, module, why)
            if any(layer.name == f"{node.target}." for layer in layers):
                raise _unsupported(leak, node, module, "is used twice")
            layers.append(Layer(f"{node.target}.", patches.to(device), shape.numel()))
            shape = _after(module, shape)
        elif activation is not None and layers and layers[-1].activation is IDENTITY:
            layers[-1] = Layer(layers[-1].name, layers[-1].patches, layers[-1].inputs, activation)
        else:
            raise _unsupported(leak, node, module, "cannot be undone")
    if not layers or layers[-1].activation is not IDENTITY or len(layers[-1].patches) != 1:
        raise FedtapError(
            f"Model {leak.protocol.model!r} does not end in an nn.Linear that yields the logits, where undoing it "
            "would begin: use idlg, which needs no such structure."
        )
    return Chain(tuple(layers), scale.to(device), shift.to(device))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Normalise) or super().is_leaf_module(module, name)


def _trace(leak: Leak) -> fx.Graph:
    """The network's steps. A bare layer is wrapped by nobody, so its own steps are what fx sees, and refuses."""
    try:
        return _Tracer().trace(leak.network)
    except Exception as error:  # a user's code may raise anything
        raise FedtapError(
            f"Model {leak.protocol.model!r} cannot be read as a chain of layers, since torch.fx cannot trace it "
            f"({' '.join(str(error).split())[:200]}): write it without branches on data, or use idlg."
        ) from error


def _activation(node: fx.Node, module: nn.Module | None) -> Activation | None:
    if isinstance(module, nn.Sigmoid) or node.target in (torch.sigmoid, F.sigmoid, "sigmoid"):
        return SIGMOID
    if isinstance(module, nn.Tanh) or node.target in (torch.tanh, F.tanh, "tanh"):
        return TANH
    if isinstance(module, nn.LeakyReLU):
        return leaky(module.negative_slope) if module.negative_slope > 0 else None
    if node.target is F.leaky_relu:
        slope: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return leaky(slope) if isinstance(slope, float) and slope > 0 else None
    return None


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    return node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs


def _patches(module: nn.Linear | nn.Conv2d, shape: torch.Size) -> Int[Tensor, "places patch"] | None:
    """Row p: the flat indices that place p sees, in the order of ``weight[filter].flatten()``. None: unsupported."""
    count = shape.numel()
    if isinstance(module, nn.Linear):
        return torch.arange(count)[None] if shape == (module.in_features,) else None
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str) or len(shape) != 3:
        return None
    numbers = torch.arange(1, count + 1, dtype=torch.float64).reshape(1, *shape)
    seen: Tensor = F.unfold(numbers, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    found = seen[0].T.long() - 1
    return torch.where(found < 0, count, found)


def _after(module: nn.Linear | nn.Conv2d, shape: torch.Size) -> torch.Size:
    if isinstance(module, nn.Linear):
        return torch.Size([module.out_features])
    bare = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        device="meta",
    )
    return bare(torch.empty(1, *shape, device="meta")).shape[1:]  # type: ignore[no-any-return]


def _unsupported(leak: Leak, node: fx.Node, module: nn.Module | None, why: str) -> FedtapError:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    kind = f" ({type(module).__name__})" if module is not None else ""
    return FedtapError(
        f"Model {leak.protocol.model!r} cannot be undone layer by layer, since its step {target}{kind} {why}: use a "
        "chain of nn.Linear and nn.Conv2d with sigmoid, tanh or leaky ReLU between them (lenet), or idlg, which "
        "matches gradients."
    )
