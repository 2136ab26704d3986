"""A network read as a chain of layers and invertible activations, from the pixels to the logits.

A linear layer and a convolution have one description here: at each of its `places` a layer sees a patch of its input,
and ``z[place, filter] = patch[place] . weight[filter] + bias[filter]``. A linear layer has one place, whose patch is
all of its input. Solvers are written once for both and need not know about strides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedtap.attackers.parts.gradients import how_to_write, zeroed
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Tensors

ACTIVATION_MARGIN = 1e-9
"""Least distance of an activation from the ends of its range, so that its inverse is finite; float64 keeps 1e-16."""


@dataclass(frozen=True)
class Activation:
    """An invertible activation s, described as functions of its value ``a = s(z)``."""

    apply: Callable[[Tensor], Tensor]
    """s(z)."""
    inverse: Callable[[Tensor], Tensor]
    """s^-1(a)."""
    derivative: Callable[[Tensor], Tensor]
    """``s'(z)``, as a function of a."""
    low: float = -torch.inf
    """Lower end of the range of s."""
    high: float = torch.inf
    """Upper end of the range of s."""

    def inside(self, a: Tensor) -> Tensor:
        """The nearest value whose inverse is finite."""
        return a.clamp(self.low + ACTIVATION_MARGIN, self.high - ACTIVATION_MARGIN)


IDENTITY = Activation(lambda z: z, lambda a: a, torch.ones_like)
SIGMOID = Activation(torch.sigmoid, torch.logit, lambda a: a * (1 - a), 0.0, 1.0)
TANH = Activation(torch.tanh, torch.atanh, lambda a: 1 - a * a, -1.0, 1.0)


def leaky(negative_slope: float) -> Activation:
    """Leaky ReLU: ``z`` above zero and ``negative_slope * z`` below."""

    def derivative(a: Tensor) -> Tensor:
        return torch.where(a > 0, 1.0, negative_slope).to(a)

    return Activation(lambda z: F.leaky_relu(z, negative_slope), lambda a: a / derivative(a), derivative)


@dataclass(frozen=True)
class Layer:
    """A layer with weights, and the activation that its output goes through (none after the last)."""

    weight: str
    """Name of the weight."""
    bias: str | None
    """Name of the bias; None where there is none."""
    patches: Int[Tensor, "places patch"]
    """Index in the flat input of each entry of a patch; `inputs`, one past the last, is a zero of the padding."""
    inputs: int
    """Entries of the flat input."""
    activation: Activation = IDENTITY
    """What the layer's output goes through."""

    def parameters(self, tensors: Tensors, victims: int, stacked: bool) -> tuple[Tensor, Tensor]:
        """Weight `victims filters patch` and bias `victims filters` (zero where it has none), in float64."""
        weight = tensors[self.weight].double()
        none = weight.new_zeros(weight.shape[: 2 if stacked else 1])
        bias = none if self.bias is None else tensors[self.bias].double()
        if not stacked:
            weight, bias = weight.expand(victims, *weight.shape), bias.expand(victims, *bias.shape)
        return weight.flatten(2), bias

    @property
    def linear(self) -> bool:
        """Whether its one patch is its input as it is."""
        patch = self.patches[0]
        return len(self.patches) == 1 and torch.equal(patch, torch.arange(self.inputs, device=patch.device))

    def gather(self, flat: Float[Tensor, "victims inputs"]) -> Float[Tensor, "victims places patch"]:
        """What each place sees of the input."""
        return F.pad(flat, (0, 1))[:, self.patches]

    def by_place(self, flat: Float[Tensor, "victims outputs"]) -> Float[Tensor, "victims places filters"]:
        """The layer's output, which has filters before places, with the filters last."""
        outputs = flat.reshape(len(flat), -1, len(self.patches))
        return outputs.transpose(1, 2)

    def scatter(self, seen: Float[Tensor, "victims places patch"]) -> Float[Tensor, "victims inputs"]:
        """The transpose of `gather`."""
        total = seen.new_zeros(len(seen), self.inputs + 1)
        victims = torch.arange(len(seen), device=seen.device)[:, None]
        return total.index_put_((victims, self.patches.flatten()[None]), seen.flatten(1), accumulate=True)[:, :-1]


@dataclass(frozen=True)
class LayerChain:
    """The layers in order; the input of the first is ``scale * pixel + shift``."""

    layers: tuple[Layer, ...]
    """From the pixels to the logits."""
    scale: Float[Tensor, "pixels"]
    """Factor of each pixel before the first layer."""
    shift: Float[Tensor, "pixels"]
    """Summand of each pixel before the first layer."""


def chain(leak: Leak) -> LayerChain:
    """The leak's network as a chain, found by recording the torch functions that it calls on three images.

    Raises:
        FedtapError: naming the step that is neither a layer nor an invertible activation.
    """
    network = zeroed(leak.network).double()
    size = math.prod(leak.protocol.shape)
    random = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # input at pixels 0 is the shift, at pixels 1 shift + scale; the third image checks that it is affine
    pixels = torch.stack([torch.zeros_like(random), torch.ones_like(random), random])
    images = pixels.reshape(3, *leak.protocol.shape)
    try:
        with torch.no_grad(), _Recorder() as recorder:
            logits = network(images)
    except Exception as error:  # a user's code may raise anything
        raise FedtapError(
            f"Model {leak.protocol.model!r} cannot be run on three images ({' '.join(str(error).split())[:200]}): "
            f"{how_to_write(error)}."
        ) from error
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    layers: list[Layer] = []
    current, entry, made = images, images, {id(images)}  # made: all that came of the images
    for step in recorder.steps:
        if not made & {id(tensor) for tensor in step.tensors}:
            continue
        made.add(id(step.output))
        layer = step.layer(names)
        if not layers and layer is None:
            continue  # scale and shift before the first layer are measured below
        if layers and [tensor is current for tensor in step.tensors if id(tensor) in made] != [True]:
            raise _refused(leak, step, layers, "is not fed by the step before it alone")
        activation = step.activation()
        if layer is not None:
            if layer.weight not in trained:
                raise _refused(leak, step, layers, f"has a weight, {layer.weight}, that is frozen")
            if layer.weight in {other.weight for other in layers}:
                raise _refused(leak, step, layers, f"uses the weight {layer.weight} once more")
            entry = entry if layers else step.tensors[0]
            layers.append(layer)
        elif activation is not None and layers[-1].activation is IDENTITY:
            layers[-1] = dataclasses.replace(layers[-1], activation=activation)
        elif not step.flattens():
            raise _refused(leak, step, layers, "cannot be undone")
        current = step.output
    last = layers and layers[-1].activation is IDENTITY and len(layers[-1].patches) == 1
    if logits is not current or not last:
        raise FedtapError(
            f"Model {leak.protocol.model!r} does not end in a linear layer that yields the logits, where undoing it "
            "would begin: use idlg, which needs no such structure."
        )
    seen = entry.flatten(1)
    affine = seen.shape == pixels.shape and torch.allclose(seen[2], seen[0] + (seen[1] - seen[0]) * random)
    if not affine or not bool((seen[1] != seen[0]).all()):
        raise FedtapError(
            f"Model {leak.protocol.model!r} does more to the pixels before its first layer than to scale and shift "
            "each, which cannot be undone: use idlg, which needs no such structure."
        )
    placed = (dataclasses.replace(layer, patches=layer.patches.to(leak.device)) for layer in layers)
    return LayerChain(tuple(placed), (seen[1] - seen[0]).to(leak.device), seen[0].to(leak.device))


@dataclass(frozen=True)
class _Step:
    """One call of a torch function that a network made."""

    function: Any
    """The function that was called."""
    args: tuple[Any, ...]
    """Its positional arguments."""
    named: dict[str, Any]
    """Its keyword arguments."""
    output: Tensor
    """The tensor that it returned."""

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.named)) if isinstance(leaf, Tensor)]

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", self.function))

    def given(self, *names: str) -> dict[str, Any]:
        """Its arguments by name."""
        return dict(zip(names, self.args, strict=False)) | self.named

    def layer(self, names: dict[int, str]) -> Layer | None:
        """The layer that this call is, where its parameters are the network's; None for other functions and forms."""
        if self.function not in (F.linear, F.conv2d):
            return None
        given = self.given("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        weight, bias, seen = given["weight"], given.get("bias"), given["input"]
        usual = id(weight) in names and (bias is None or id(bias) in names)
        count = seen[0].numel()
        if not usual or given.get("groups", 1) != 1 or isinstance(given.get("padding"), str):
            return None
        if self.function is F.linear:
            patches = torch.arange(count)[None]
            usual = seen.ndim == 2
        else:
            # unfold of the numbers 1 ... n shows which input each entry of a patch is; 0 is padding
            numbers = torch.arange(1, count + 1, dtype=torch.float64).reshape(1, *seen.shape[1:])
            how = {name: given[name] for name in ("stride", "padding", "dilation") if name in given}
            patches = F.unfold(numbers, weight.shape[2:], **how)[0].T.long() - 1
        if not usual:
            return None
        return Layer(names[id(weight)], names.get(id(bias)), torch.where(patches < 0, count, patches), count)

    def activation(self) -> Activation | None:
        """The activation that this call is; None where it has no inverse."""
        if self.function in (torch.sigmoid, F.sigmoid, Tensor.sigmoid):
            return SIGMOID
        if self.function in (torch.tanh, F.tanh, Tensor.tanh):
            return TANH
        derivative = self.given("input", "negative_slope").get("negative_slope", 0.01)
        return leaky(derivative) if self.function is F.leaky_relu and derivative > 0 else None

    def flattens(self) -> bool:
        """Whether this leaves each image's entries in their order, in one row."""
        shapes = (torch.flatten, Tensor.flatten, Tensor.reshape, Tensor.view, torch.reshape)
        return self.function in shapes and self.output.ndim == 2 and len(self.output) == len(self.tensors[0])


class _Recorder(TorchFunctionMode):
    """Records each torch function that returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.steps.append(_Step(func, args, kwargs or {}, output))
        return output


def _refused(leak: Leak, step: _Step, layers: list[Layer], why: str) -> FedtapError:
    after = f" after {layers[-1].weight.rpartition('.')[0] or layers[-1].weight}" if layers else ""
    return FedtapError(
        f"Model {leak.protocol.model!r} cannot be undone layer by layer, since its step {step.name}{after} {why}: use "
        "a chain of linear layers and convolutions with sigmoid, tanh or leaky ReLU between them (lenet), or idlg, "
        "which matches gradients."
    )
