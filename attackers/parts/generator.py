"""A generator from a gradient to its image, built stage by stage from the structure of the victim's network.

Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026: its Coarse-GIT, one module a layer, from output to input.
Departs from the paper in five ways: it begins with the inputs of linear layers, in closed form; the image starts from a
ridge regression on these; a stage reads a gradient through a learned estimate of the layer's error signal, since a
layer's gradient is that signal times the layer's input; the estimates are also trained on the first layer, whose input
is the image and known in training; and a stage is a few convolutions on the grid of the layer's input, no perceptron.

For auxiliary pairs at drifted weights there are ridge regressions of several strengths, mixed by a perceptron, and
whole trainings are held out: the stages' correction is scaled by how well it did on a training that was held out.

At batch 1 a linear layer on one row h has, with d = dL/dz, dL/db = d and dL/dW = G = d h^T, so h = G^T d / |d|^2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedtap.attackers.parts.channel_means import ChannelMeans
from fedtap.attackers.parts.patches import PatchSolution
from fedtap.attackers.parts.teaching import HELD_OUT_EVERY, Differentiated, descend, ordered
from fedtap.simulator.attack import generator as seeded
from fedtap.simulator.errors import FedtapError

Gradients = Mapping[str, Tensor]
"""By name of the parameter: `victims *shape`."""

Sizes = tuple[int, ...]

Map = tuple[int, ...]
"""Channels, height, width."""

FINEST = 16
"""Longest side of the grid that a stage works on; larger maps are folded into channels."""

EDGES = (1e-6, 1e-4, 1e-2, 5e-2)
"""Candidates for the least distance of an activation from the ends of its range before it is inverted; the noisier
the gradient, the larger."""

TRIED, PROBES = 3000, 64
"""Pairs and pixels on which values of EDGES are compared."""

FOLDS = 5
"""Folds of the ridge regression: stages are trained on starts whose regression has not seen the pair itself."""

STRENGTHS = (1e-6, 1e-4, 1e-2, 1.0)
"""Candidate ridges, in units of a feature's variance."""

DRIFTED_STRENGTHS = (1e-6, 1e-3, 1e-1, 1.0)
"""Ridges of the regressions for pairs at drifted weights, in units of a feature's variance."""

NORMED = 6
"""Convolutions before a norm, at the end of the network, whose mean inputs the image is regressed on."""

INVERSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda a, edge: a.clamp(edge, 1 - edge).logit(),
    "tanh": lambda a, edge: torch.atanh(a.clamp(edge - 1, 1 - edge)),
}

ERROR, KNOWN = "<error>", "<known>"
"""Names, among those of parameters, of the last layer's error signal and of the rows that are known in closed form."""


@dataclass(frozen=True)
class Leaf:
    """A linear layer or a convolution: its gradient is its error signal times its input, summed over places."""

    weight: str
    """Name of the weight."""
    bias: str | None
    """Name of the bias; None where there is none that is trained."""
    shape: Sizes
    """Shape of the weight."""
    input: Sizes
    """Shape of one image's input: `channels height width`, `tokens width` or `width`."""
    output: Sizes
    """Shape of one image's output."""
    activation: str = ""
    """Name of the activation that yields the input, where INVERSES holds it; empty otherwise."""
    stride: Sizes = (1, 1)
    """Stride of a convolution, rows and columns."""
    padding: Sizes = (0, 0)
    """Zeros around the input of a convolution, rows and columns."""
    dilation: Sizes = (1, 1)
    """Distance of a convolution's taps, rows and columns."""
    groups: int = 1
    """Groups of a convolution's channels."""
    norm: str | None = None
    """Name of the bias of the norm that a convolution's output goes into; None where there is none that is trained."""

    @property
    def is_row(self) -> bool:
        """Whether its input is one row of features, which is then known in closed form."""
        return len(self.input) == 1

    @property
    def known(self) -> int:
        """Number of features that `features` returns."""
        return self.input[0] * (1 + (self.activation in INVERSES))

    def error(self, gradients: Gradients) -> Float[Tensor, "victims outputs"]:
        """A row's error signal: its bias's gradient, or else the gradient's leading left singular vector."""
        if self.bias is not None:
            return gradients[self.bias]
        gradient = gradients[self.weight]
        # G G' has the error signal d as its leading eigenvector, at batch 1
        leading = torch.linalg.eigh(gradient @ gradient.transpose(1, 2))[1][:, :, -1:]
        largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
        # softmax - onehot: the label's entry is the largest, and negative
        error: Tensor = -leading * largest.sign() * gradient.flatten(1).norm(dim=1)[:, None, None]
        return error.squeeze(2)

    def row(self, gradients: Gradients) -> Float[Tensor, "victims features"]:
        """Its input, in closed form."""
        error = self.error(gradients)
        # h = G'd / |d|^2
        length = error.square().sum(1, keepdim=True).clamp_min(1e-24)
        return torch.einsum("nof,no->nf", gradients[self.weight], error) / length

    def features(
        self, row: Float[Tensor, "victims features"], edge: Float[Tensor, ""]
    ) -> Float[Tensor, "victims known"]:
        """Its input, preceded by the argument of the activation that yields it where INVERSES holds that."""
        inverse = INVERSES.get(self.activation)
        return row if inverse is None else torch.cat([inverse(row, edge), row], 1)

    @property
    def lost(self) -> list[int]:
        """Rows and columns at the far edges of the input that no stride reaches."""
        return [
            # what transposing a convolution of this stride cannot reach by itself
            side - (out - 1) * stride + 2 * padding - dilation * (kernel - 1) - 1
            for side, out, stride, padding, dilation, kernel in zip(
                self.input[1:], self.output[1:], self.stride, self.padding, self.dilation, self.shape[2:], strict=True
            )
        ]

    def back(self, error: Tensor, weight: Tensor) -> Float[Tensor, "victims channels height width"]:
        """The error signal of the layer's input, W^T d, as a map; `weight` has the layer's shape."""
        if len(self.input) == 2:
            return torch.einsum("nohw,oi->nihw", error, weight)
        return F.conv_transpose2d(error, weight, None, self.stride, self.padding, self.lost, self.groups, self.dilation)

    def adjoint(self, error: Tensor, gradient: Tensor) -> Float[Tensor, "victims channels height width"]:
        """The adjoint of `gradient`, as a map of the layer's input: each victim's gradient combined by its error."""
        if len(self.input) == 2:
            return torch.einsum("nohw,noi->nihw", error, gradient)
        each, victims = error.reshape(1, -1, *error.shape[2:]), len(error)  # all in one call, each a group of its own
        seen = F.conv_transpose2d(
            each,
            gradient.flatten(0, 1),
            None,
            self.stride,
            self.padding,
            self.lost,
            victims * self.groups,
            self.dilation,
        )
        return seen.reshape(victims, *self.input)

    def gradient(self, error: Tensor, seen: Tensor) -> Tensor:
        """Gradient of a convolution without groups, given its error signal and its input: `victims *shape`."""
        patches = F.unfold(seen, self.shape[2:], self.dilation, self.padding, self.stride)  # victims patch places
        return (error.flatten(2) @ patches.transpose(1, 2)).reshape(-1, *self.shape)


@dataclass(frozen=True)
class Stage:
    """A layer, or a block of layers, with the parameters in it."""

    name: str
    """Name of the module."""
    leaves: tuple[Leaf, ...]
    """Its linear layers and convolutions."""
    others: tuple[tuple[str, Sizes], ...]
    """Names and shapes of all other parameters: biases, norms, positions."""
    input: Sizes
    """Shape of one image's input."""
    output: Sizes
    """Shape of one image's output."""

    @property
    def parameters(self) -> list[str]:
        """Names of all its parameters."""
        read = [name for leaf in self.leaves for name in (leaf.weight, leaf.bias) if name is not None]
        return read + [name for name, _ in self.others]

    @property
    def spread(self) -> tuple[Leaf, ...]:
        """The leaves whose input has places."""
        return tuple(leaf for leaf in self.leaves if not leaf.is_row)


def as_map(shape: Sizes) -> Map:
    """Shape of a map of this size: tokens are arranged in a square where they fill one, and a row is one place."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    tokens, width = shape if len(shape) == 2 else (1, shape[0])
    side = math.isqrt(tokens)
    return (width, side, side) if side * side == tokens else (width, tokens, 1)


def stages(network: nn.Module, shape: Map) -> tuple[Stage, ...]:
    """The network's stages from input to output, found by running it on one image on the meta device.

    The network and every `Sequential` in it are entered; each other module with parameters is a stage, except norms,
    which join the stage before them.

    Raises:
        FedtapError: naming the layer that no stage can read, or the parameter that belongs to no layer.
    """
    network = copy.deepcopy(network).to("meta").eval()
    names = {id(parameter): name for name, parameter in network.named_parameters() if parameter.requires_grad}
    called = {id(module): name for name, module in network.named_modules()}
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        given = inputs[0] if inputs else None
        if module in calls:
            raise _refused(called[id(module)], module, "runs more than once")
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            raise _refused(called[id(module)], module, "does not take a tensor first and return one")
        calls[module] = given, output

    for module in network.modules():
        if _trained(module):
            module.register_forward_hook(record)
    with torch.no_grad(), _Activations() as activations:
        network(torch.zeros(1, *shape, device="meta"))

    norms = {
        id(given): module.bias
        for module, (given, _) in calls.items()
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)
    }

    def leaf(module: nn.Module) -> Leaf | None:
        if not isinstance(module, nn.Linear | nn.Conv2d) or module not in calls or not module.weight.requires_grad:
            return None
        given, made = calls[module]
        convolution = isinstance(module, nn.Conv2d)
        usual = given.ndim == 4 if convolution else given.ndim in (2, 3)
        if not usual or (convolution and (module.padding_mode != "zeros" or isinstance(module.padding, str))):
            raise _refused(called[id(module)], module, "is not one whose gradient can be read")
        geometry = ("stride", "padding", "dilation", "groups") if convolution else ()
        norm = norms.get(id(made))
        return Leaf(
            names[id(module.weight)],
            names[id(module.bias)] if module.bias is not None and module.bias.requires_grad else None,
            tuple(module.weight.shape),
            tuple(given.shape[1:]),
            tuple(made.shape[1:]),
            activations.kinds.get(id(given), ""),
            **{name: getattr(module, name) for name in geometry},
            norm=names.get(id(norm)) if convolution else None,
        )

    found: list[Stage] = []
    opened = set(_opened(network))
    for module, (given, made) in calls.items():
        if module not in opened:
            continue
        leaves = tuple(one for part in module.modules() if (one := leaf(part)) is not None)
        read = {one.weight for one in leaves}
        others = tuple((names[id(each)], tuple(each.shape)) for each in _trained(module) if names[id(each)] not in read)
        if leaves:
            found.append(Stage(called[id(module)], leaves, others, tuple(given.shape[1:]), tuple(made.shape[1:])))
        elif found and given.shape == made.shape:  # a norm
            found[-1] = replace(found[-1], others=found[-1].others + others)
        else:
            raise _refused(called[id(module)], module, "holds no linear layer or convolution")
    if found:  # the network's own, such as positions
        own = tuple((names[id(each)], tuple(each.shape)) for each in _trained(network, recurse=False))
        found[0] = replace(found[0], others=found[0].others + own)
    covered = {leaf.weight for stage in found for leaf in stage.leaves} | {
        n for stage in found for n, _ in stage.others
    }
    if missing := [name for name in names.values() if name not in covered]:
        raise FedtapError(
            f"Parameter {missing[0]} belongs to no layer that runs as a module, so no stage can read its gradient: "
            "call the layer that holds it, or use idlg, which needs no such structure."
        )
    if not found or len(found[-1].leaves) != 1 or not found[-1].leaves[0].is_row:
        raise FedtapError(
            "The network does not end in a linear layer on one row of features, where reading its gradient begins: use "
            "idlg, which needs no such structure."
        )
    return tuple(found)


class Generator(nn.Module):
    """From gradients to images, one each.

    Args:
        stages: the network's, from input to output.
        shape: of an image.
        width: channels of the running estimate.
        hidden: units of the bootstrap's perceptron.
        hints: units through which a stage reads all its gradients directly.
        drifted: whether it must cope with weights that differ: then it has a ridge regression of each strength, and a
            perceptron that weighs them by what this gradient looks like.
        batch: images behind a gradient; it is then read once for each of them, see `batch_rows`.
    """

    mean: Tensor
    deviation: Tensor
    offset: Tensor
    ridge: Tensor
    trust: Tensor
    edge: Tensor
    softmax: Tensor

    def __init__(
        self,
        stages: tuple[Stage, ...],
        shape: Map,
        width: int = 32,
        hidden: int = 64,
        hints: int = 32,
        drifted: bool = False,
        batch: int = 1,
    ) -> None:
        super().__init__()
        self.shape, self.drifted, self.batch = shape, drifted, batch
        self.patches = nn.ModuleList(_patches(stages[0], shape) if batch == 1 else [])
        body = [stage for stage in reversed(stages) if stage.spread]
        self.rows = [leaf for stage in reversed(stages) for leaf in stage.leaves if leaf.is_row]
        features, pixels = sum(leaf.known for leaf in self.rows), math.prod(shape)
        clues = self.rows[0].output[0] + 1
        normed = [] if drifted or batch > 1 else _normed(stages)
        self.means = nn.ModuleList([ChannelMeans(normed, features, pixels)] if normed else [])
        self.register_buffer("mean", torch.zeros(features + 1))
        self.register_buffer("deviation", torch.ones(features + 1))
        self.register_buffer("offset", torch.zeros(pixels))
        self.register_buffer("ridge", torch.zeros(len(DRIFTED_STRENGTHS) if drifted else 1, features, pixels))
        self.register_buffer("trust", torch.ones(len(DRIFTED_STRENGTHS) if drifted else 1))
        self.register_buffer("edge", torch.tensor(EDGES[0]))
        self.register_buffer("softmax", torch.zeros(self.rows[0].output[0]))  # of a batch: its mean, see `batch_rows`
        self.bootstrap = nn.Sequential(nn.Linear(features + clues, hidden), nn.ReLU(), nn.Linear(hidden, pixels))
        _silence(self.bootstrap[-1])
        if drifted:
            self.weigh = nn.Sequential(
                nn.Linear(features + clues, hidden), nn.ReLU(), nn.Linear(hidden, len(DRIFTED_STRENGTHS))
            )
            _silence(self.weigh[-1])
        self.stages = nn.ModuleList()
        self.state: Map = (0, 0, 0)
        if body:
            # the rows that follow the last map: the first of them is that map, flattened, where the sizes agree
            first = next(leaf for stage in stages[stages.index(body[0]) + 1 :] for leaf in stage.leaves)
            begin = sum(leaf.known for leaf in self.rows[: self.rows.index(first)])
            self.top = slice(begin, begin + first.known)
            channels, height, side = as_map(body[0].output)
            # a row that is a flattened map is folded back into it; any other row is one place
            copies, rest = divmod(2 * first.known, channels * height * side)
            self.state = (2 * first.known, 1, 1) if rest or not copies else (copies * channels, height, side)
        state, above = self.state, 0
        for stage in body:
            self.stages.append(_Reader(stage, clues, state, above, shape, width, hints, batch))
            state, above = (width, *_grid(as_map(stage.input))), as_map(stage.spread[0].input)[0]
        if body:
            self.fold = max(1, shape[1] // state[1])
            self.last = nn.Conv2d(state[0], shape[0] * self.fold**2, 1)
            _silence(self.last)

    def forward(self, gradients: Gradients) -> Float[Tensor, "victims channels height width"]:
        """The images, in [0, 1]."""
        return self.images(self.read(gradients))[0].clamp(0, 1)

    def regressed(self, gradients: Gradients) -> Float[Tensor, "victims channels height width"]:
        """The ridge regressions' images alone, in [0, 1]: of the stages' inputs they lack those that tell the label.

        Args:
            gradients: as `read` returns them.
        """
        known, length, direction = self._closed_form(gradients)
        start, _ = self.start(gradients, *self._standardised(known, length, direction), None)
        return start.reshape(-1, *self.shape).clamp(0, 1)

    def read(self, gradients: Gradients) -> dict[str, Tensor]:
        """What the stages look at: rows in closed form in the place of their layers' gradients, which are larger."""
        rows = {leaf.weight for leaf in self.rows}
        kept = {name: tensor for name, tensor in gradients.items() if name not in rows}
        kept[ERROR] = self.rows[0].error(gradients)
        kept[KNOWN] = torch.cat([leaf.row(gradients) for leaf in self.rows], 1)
        return kept

    def images(
        self, gradients: Gradients, starts: Tensor | None = None, truth: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images before the clamp to [0, 1], which would have no gradient outside, and the surprise: the mean
        squared error of the first layer's gradient as its estimated error signal and the true images would give it.

        Args:
            gradients: as `read` returns them.
            starts: `victims regressions pixels`; the ridge regressions' where none are given.
        """
        known, length, direction = self._closed_form(gradients)
        features, clues = self._standardised(known, length, direction)
        start, shares = self.start(gradients, features, clues, starts)
        image = (start + self.bootstrap(torch.cat([features, clues], 1))).reshape(-1, *self.shape)
        surprise = image.new_zeros(())
        if self.stages:
            # unscaled values too: s'(z) is a function of the value itself
            top = torch.cat([features[:, self.top], known[:, self.top]], 1)
            state, error = top.reshape(-1, *self.state), None
            for stage in self.stages:
                state, error, surprise = stage(state, error, image, gradients, clues, length, truth)
            image = image + F.interpolate(F.pixel_shuffle(self.last(state), self.fold), self.shape[1:])
        return self.trusted(image, start.reshape(image.shape), shares), surprise

    def start(
        self, gradients: Gradients, features: Tensor, clues: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mixture of the ridge regressions' images, `victims pixels`, and each one's share, `victims regressions`.

        Where patches can be read in closed form, the mixture is what they are solved near to.
        """
        if starts is None:
            starts = torch.stack([features @ one for one in self.ridge], 1) + self.offset
            for means in self.means:
                starts = means(gradients, features, starts[:, 0])[:, None]
        start, shares = starts[:, 0], starts.new_ones(len(starts), 1)
        if self.drifted:
            shares = self.weigh(torch.cat([features, clues], 1)).softmax(1)
            start = torch.einsum("nr,nrp->np", shares, starts)
        for patches in self.patches:
            start = patches(gradients, start)
        return start, shares

    def trusted(self, image: Tensor, start: Tensor, shares: Tensor) -> Tensor:
        """Between the start and the image: the start plus `trust` times the stages' correction."""
        if not self.drifted:
            return torch.where(self.trust > 0, image, start)
        # start + t (image - start), t the regressions' trust by their shares
        return torch.lerp(start, image, (shares @ self.trust)[:, None, None, None])

    @torch.no_grad()
    def fit_statistics(
        self,
        gradients: Gradients,
        images: Float[Tensor, "pairs channels height width"],
        folds: Int[Tensor, " pairs"] | None = None,
    ) -> Float[Tensor, "pairs regressions pixels"]:
        """All that is fitted in closed form: means, deviations, the ridge regressions.

        Args:
            folds: 0 … FOLDS - 1, the ridge regression's; pairs in turn where none are given.

        Returns:
            The pairs' own starts, each by regressions that did not see its fold.
        """
        folds = torch.arange(len(images), device=images.device) % FOLDS if folds is None else folds
        self.edge.fill_(min(EDGES, key=lambda edge: self._ridge_error(gradients, images.flatten(1), edge)))
        known, length, direction = self._closed_form(gradients)
        every = torch.cat([known, length.log()], 1)
        self.mean.copy_(every.mean(0))
        self.deviation.copy_(every.std(0).clamp_min(1e-12))
        features, clues = self._standardised(known, length, direction)
        pixels = images.flatten(1)
        self.offset.copy_(pixels.mean(0))
        ridge, others = _ridge(features, pixels - self.offset, folds, DRIFTED_STRENGTHS if self.drifted else ())
        self.ridge.copy_(ridge)
        for stage in self.stages:
            stage.fit_statistics(gradients, clues, length)  # type: ignore[operator]
        starts = others + self.offset
        for means in self.means:
            starts = means.fit(gradients, features, pixels, folds, starts[:, 0])[:, None]  # type: ignore[operator]
        for patches in self.patches:
            some = {name: tensor[:TRIED] for name, tensor in gradients.items()}
            patches.fit(some, pixels[:TRIED], starts[:TRIED].mean(1))  # type: ignore[operator]
        return starts

    def _ridge_error(self, gradients: Gradients, pixels: Tensor, edge: float) -> float:
        """Mean squared error of a ridge regression, across folds, on some of the pairs and pixels."""
        self.edge.fill_(edge)
        known = self._closed_form({name: gradients[name][:TRIED] for name in (ERROR, KNOWN)})[0]
        known = (known - known.mean(0)) / known.std(0).clamp_min(1e-12)
        some = pixels[:TRIED, :: max(1, pixels.shape[1] // PROBES)]
        some = some - some.mean(0)
        folds = torch.arange(len(some), device=some.device) % FOLDS
        return F.mse_loss(_ridge(known, some, folds)[1][:, 0], some).item()

    def _closed_form(self, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' inputs; the last layer's error signal's length, `victims 1`, and direction, `victims classes`."""
        error = gradients[ERROR]
        length = error.norm(dim=1, keepdim=True).clamp_min(1e-12)
        rows = torch.split(gradients[KNOWN], [leaf.input[0] for leaf in self.rows], 1)
        known = [leaf.features(row, self.edge) for leaf, row in zip(self.rows, rows, strict=True)]
        return torch.cat(known, 1), length, error / length

    def _standardised(self, known: Tensor, length: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' inputs, and the input of every stage: the error signal's direction and length."""
        every = (torch.cat([known, length.log()], 1) - self.mean) / self.deviation
        return every[:, :-1], torch.cat([direction, every[:, -1:]], 1)


class _Reader(nn.Module):
    """One stage: from the running estimate of its output, and its gradients, to that of its input."""

    def __init__(
        self, stage: Stage, clues: int, state: Map, above: int, image: Map, width: int, hints: int, batch: int
    ) -> None:
        super().__init__()
        self.stage, self.grid, self.batch = stage, _grid(as_map(stage.input)), batch
        shapes = [(leaf.weight, leaf.shape) for leaf in stage.spread] + list(stage.others)
        self.newsroom = LabelResiduals(shapes, clues)
        first = stage.spread[0]
        self.weight = nn.Parameter(torch.randn(first.shape) / math.sqrt(math.prod(first.shape[1:])))
        self.sees_image = len(stage.leaves) == 1 and first.input == image and first.groups == 1
        self.scale = nn.Parameter(torch.ones(image[0], 1, 1))
        self.shift = nn.Parameter(torch.zeros(image[0], 1, 1))
        self.tables, self.slopes = nn.ParameterList(), nn.ParameterList()
        self.gates, self.chains, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        seen = 0
        for leaf in stage.spread:
            output = as_map(leaf.output)
            self.tables.append(nn.Parameter((0.01 if above else 0.3) * torch.randn(clues, *output)))
            self.slopes.append(nn.Parameter(torch.ones(output)))
            self.gates.append(nn.Sequential(nn.Conv2d(state[0], width, 1), nn.ReLU(), nn.Conv2d(width, output[0], 1)))
            self.chains.append(nn.Conv2d(above, output[0], 1) if above not in (0, output[0]) else nn.Identity())
            channels = _resampled(as_map(leaf.input), self.grid)[0]
            self.norms.append(nn.BatchNorm2d(channels))
            seen += channels
        self.hear = nn.Linear(sum(math.prod(shape) for _, shape in shapes), hints)
        self.turn = nn.Linear(clues, hints)
        self.tell = nn.Linear(hints, HINTED * math.prod(self.grid))
        taken = _resampled(state, self.grid)[0] + _resampled(image, self.grid)[0] + seen + HINTED
        self.mix = nn.Conv2d(taken, width, 1)
        self.sharpen = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(
        self,
        state: Tensor,
        above: Tensor | None,
        image: Tensor,
        gradients: Gradients,
        clues: Tensor,
        length: Tensor,
        truth: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The running estimate of the stage's input, its error signal, and the surprise where it sees the image."""
        residuals = self.newsroom(gradients, clues, length)
        parts = [_resample(state, self.grid), _resample(image, self.grid)]
        errors, surprise = [], state.new_zeros(())
        for which, leaf in enumerate(self.stage.spread):
            error = torch.einsum("nc,cxyz->nxyz", clues, self.tables[which])
            if above is not None:
                error = error + F.interpolate(self.chains[which](above), error.shape[2:])
            # d = (W^T d') * s'(z), with s'(z) estimated from the running estimate of the activation
            error = error * (self.slopes[which] + F.interpolate(self.gates[which](state), error.shape[2:]))
            shown = residuals[which].reshape(-1, *leaf.shape)
            if self.sees_image:
                leaked = gradients[leaf.weight] / (length[:, :, None, None, None] * self.newsroom.of(leaf.weight).size)
                shown = leaked - self.explained(leaf, error, image.detach(), length)
                if truth is not None:
                    surprise = F.mse_loss(self.explained(leaf, error, truth, length), leaked)
            parts.append(self.norms[which](_resample(leaf.adjoint(error, shown), self.grid)))
            errors.append(error)
        hinted = torch.relu(self.hear(torch.cat(residuals, 1))) * self.turn(clues)
        parts.append(self.tell(hinted).reshape(-1, HINTED, *self.grid))
        mixed = self.mix(torch.cat(parts, 1))
        return mixed + self.sharpen(mixed), self.stage.spread[0].back(errors[0], self.weight), surprise

    def explained(self, leaf: Leaf, error: Tensor, image: Tensor, length: Tensor) -> Tensor:
        """The layer's gradient, over the length of the last error signal, as these images would cause it."""
        found: Tensor = leaf.gradient(error, self.scale * image + self.shift)
        if self.batch == 1:
            return found
        # the loss is a mean over the batch, so a gradient is the mean of its images'
        unit = length[:, :, None, None, None]
        mean = (unit * found).reshape(-1, self.batch, *leaf.shape).mean(1)
        return mean.repeat_interleave(self.batch, 0) / unit

    def fit_statistics(self, gradients: Gradients, clues: Tensor, length: Tensor) -> None:
        """Fit the part of each gradient that the label explains, and the size of the rest."""
        self.newsroom.fit_statistics(gradients, clues, length)


class LabelResiduals(nn.Module):
    """The gradients of a stage, less what the error signal at the logits (the label) explains of them."""

    def __init__(self, shapes: Sequence[tuple[str, Sizes]], clues: int) -> None:
        super().__init__()
        self.names = [name for name, _ in shapes]
        self.entries = sum(math.prod(shape) for _, shape in shapes)
        self.news = nn.ModuleDict({_key(name): _LabelResidual(math.prod(shape), clues) for name, shape in shapes})

    def forward(self, gradients: Gradients, clues: Tensor, length: Tensor) -> list[Tensor]:
        """Residual of each parameter's gradient, `victims entries`."""
        return [self.of(name)(gradients[name], clues, length) for name in self.names]

    def fit_statistics(self, gradients: Gradients, clues: Tensor, length: Tensor) -> None:
        """Fit the part of each gradient that the label explains, and the size of the rest."""
        for name in self.names:
            self.of(name).fit(gradients[name], clues, length)

    def of(self, name: str) -> _LabelResidual:
        """The module for one parameter."""
        residuals = self.news[_key(name)]
        assert isinstance(residuals, _LabelResidual)
        return residuals


class _LabelResidual(nn.Module):
    """``(gradient / |d| - [d / |d|, 1] explained) / size``, with d the error signal at the logits."""

    explained: Tensor
    size: Tensor

    def __init__(self, entries: int, clues: int) -> None:
        super().__init__()
        self.register_buffer("explained", torch.zeros(clues, entries))
        self.register_buffer("size", torch.ones(()))

    def forward(self, gradient: Tensor, clues: Tensor, length: Tensor) -> Float[Tensor, "victims entries"]:
        return (gradient.flatten(1) / length - _with_one(clues) @ self.explained) / self.size

    def fit(self, gradient: Tensor, clues: Tensor, length: Tensor) -> None:
        entries, given = gradient.flatten(1) / length, _with_one(clues)
        normal = given.T @ given + 1e-6 * len(given) * torch.eye(given.shape[1], device=given.device)
        # ridge regression of the entries on [d / |d|, 1]; 1e-6 a pair keeps the normal matrix regular
        self.explained.copy_(torch.linalg.solve(normal, given.T @ entries))
        rest, all_of_it = ((entries - part).square().mean().sqrt() for part in (given @ self.explained, 0.0))
        self.size.copy_(rest.clamp_min(1e-3 * all_of_it).clamp_min(1e-12))


HINTED = 4
"""Channels that a stage reads from its gradients directly."""


SURPRISE = 5e-3
"""Weight of the surprise beside the mean squared error of the images."""


def fit(
    generator: Generator,
    gradients: Gradients,
    images: Float[Tensor, "pairs channels height width"],
    trainings: Int[Tensor, " pairs"] | None = None,
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
) -> Float[Tensor, ""]:
    """Fit on pairs: the statistics in closed form, then Adam under one cycle of rates on the mean squared error.

    The last pairs are held out, one in HELD_OUT_EVERY: the stages are used only where they beat the ridge regression
    there, and at drifted weights their correction is scaled to the least error there. The images of a batch are
    compared in the order that lies closest to the predicted ones.

    Args:
        gradients: as `Generator.read` returns them, with an entry for each image of a batch, pair by pair.
        images: pair by pair; those of a batch in the order of its entries.
        trainings: of pairs at drifted weights, the number of the training in which each was recorded, in rising order;
            the last training is held out whole, since a victim meets weights of another training.

    Returns:
        The mean squared error on the pairs that were held out.
    """
    together = generator.batch
    pairs = len(images) // together
    kept, folds = pairs - max(1, pairs // HELD_OUT_EVERY), torch.arange(pairs, device=images.device) % FOLDS
    if trainings is not None:
        kept, folds = int((trainings < trainings[-1]).sum()), trainings % FOLDS
    folds = folds.repeat_interleave(together)  # a batch's images share their gradient, and so their fold

    def rows(which: Tensor | slice) -> dict[str, Tensor]:
        return {name: tensor[which] for name, tensor in gradients.items()}

    def entries(some: Tensor) -> Tensor:
        """Those of these pairs' images."""
        return (some[:, None] * together + torch.arange(together, device=some.device)).flatten()

    def closest(truth: Tensor, predicted: Tensor) -> Tensor:
        """The true images of each batch in the order that lies closest to the predicted ones."""
        pixels = math.prod(generator.shape)
        return ordered(truth.reshape(-1, together, pixels), predicted.reshape(-1, together, pixels)).reshape(
            truth.shape
        )

    mine = slice(kept * together)
    starts = generator.fit_statistics(rows(mine), images[mine], folds[mine])
    adam = torch.optim.Adam(generator.parameters(), rate)
    steps, draw = max(1, kept // batch), seeded(seed, "minibatches")
    total = max(11, epochs * steps)  # with 10 the cycle's rise has no length, and torch divides by it
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=total, pct_start=0.1)

    def loss(chosen: Tensor) -> Tensor:
        some = entries(chosen)
        predicted, surprise = generator.images(rows(some), starts[some], images[some])
        return F.mse_loss(predicted, closest(images[some], predicted)) + SURPRISE * surprise

    generator.train()
    differentiate = Differentiated(generator.parameters(), loss, min(batch, kept), images.device, together == 1)
    descend(
        differentiate,
        adam,
        cycle,
        lambda: torch.randperm(kept, generator=draw).to(images.device)[: steps * batch].chunk(steps),
        epochs,
    )
    generator.eval()
    left = torch.arange(kept, pairs).split(batch)  # type: ignore[no-untyped-call]
    held = [(rows(some), images[some]) for some in map(entries, left)]

    def held_out_error(trust: Tensor) -> Tensor:
        generator.trust.copy_(trust)
        predicted = torch.cat([generator.images(given)[0].clamp(0, 1) for given, _ in held])
        return F.mse_loss(predicted, closest(images[kept * together :], predicted))

    with torch.no_grad():
        tried = [torch.zeros_like(generator.trust), torch.ones_like(generator.trust)]
        if generator.drifted:
            tried.append(_trust(generator, held))
        held_out_errors = [held_out_error(trust) for trust in tried]
        best = min(range(len(tried)), key=lambda which: float(held_out_errors[which]))
        generator.trust.copy_(tried[best])
    return held_out_errors[best]


def _trust(generator: Generator, held: Sequence[tuple[Gradients, Tensor]]) -> Float[Tensor, " regressions"]:
    """Scale of the stages' correction for each regression's share: least squares on the held-out pairs."""
    size = len(generator.trust)
    normal, moment = generator.trust.new_zeros(size, size), generator.trust.new_zeros(size)
    generator.trust.fill_(1.0)
    for gradients, truth in held:
        known, length, direction = generator._closed_form(gradients)
        start, shares = generator.start(gradients, *generator._standardised(known, length, direction), None)
        step, wanted = generator.images(gradients)[0].flatten(1) - start, truth.flatten(1) - start
        # least squares of wanted = sum_r t_r share_r step in t
        normal += torch.einsum("na,nb,n->ab", shares, shares, step.square().sum(1))
        moment += torch.einsum("na,n->a", shares, (step * wanted).sum(1))
    # a thousandth of the mean diagonal keeps t finite where a regression is hardly used
    ridge = 1e-3 * normal.diagonal().mean().clamp_min(1e-12) * torch.eye(size).to(normal)
    found: Tensor = torch.linalg.solve(normal + ridge, moment)
    return found.clamp(0, 1)


def _ridge(
    features: Float[Tensor, "pairs features"],
    wanted: Float[Tensor, "pairs pixels"],
    fold: Int[Tensor, " pairs"],
    strengths: Sequence[float] = (),
) -> tuple[Float[Tensor, "regressions features pixels"], Float[Tensor, "pairs regressions pixels"]]:
    """The regressions' matrices, and for each pair the images of the regressions on the other folds' pairs.

    Args:
        strengths: a regression each; where none are given there is one, whose strength serves the first fold best.
    """
    given, target = features.double(), wanted.double()
    # X'X and X'Y of each fold: leaving one out is a subtraction
    normals = torch.stack([given[fold == k].T @ given[fold == k] for k in range(FOLDS)])
    moments = torch.stack([given[fold == k].T @ target[fold == k] for k in range(FOLDS)])

    def solved(strength: float, without: int | None = None) -> Tensor:
        normal, moment = normals.sum(0), moments.sum(0)
        if without is not None:
            normal, moment = normal - normals[without], moment - moments[without]
        ridge = (strength * normal.diagonal().mean()).clamp_min(1e-12) * torch.eye(len(normal)).to(normal)
        factor, failed = torch.linalg.cholesky_ex(normal + ridge)
        if failed or not bool(factor.isfinite().all()):
            raise FedtapError(
                "The last layer's inputs do not vary over the auxiliary pairs, so a ridge regression cannot be fitted: "
                "train on pairs of several classes, or with less noise."
            )
        return torch.cholesky_solve(moment, factor)

    def held_out_error(strength: float) -> float:
        return F.mse_loss(given[fold == 0] @ solved(strength, 0), target[fold == 0]).item()

    strengths = strengths or (min(STRENGTHS, key=held_out_error),)
    others = wanted.new_empty(len(wanted), len(strengths), wanted.shape[1])
    for k in range(FOLDS):
        for which, strength in enumerate(strengths):
            others[fold == k, which] = (given[fold == k] @ solved(strength, k)).to(wanted.dtype)
    return torch.stack([solved(strength) for strength in strengths]).to(features.dtype), others


def _normed(stages: Sequence[Stage]) -> list[tuple[str, str, Sizes]]:
    """The last convolutions before a norm: names of their weights and of the norms' biases, and the weights' shapes."""
    leaves = [leaf for stage in stages for leaf in stage.leaves]
    return [(leaf.weight, leaf.norm, leaf.shape) for leaf in leaves if leaf.norm is not None][-NORMED:]


def _patches(first: Stage, shape: Map) -> list[PatchSolution]:
    """The closed form of the first stage, where that embeds patches of the image and adds positions."""
    leaf, kernel = first.leaves[0], first.leaves[0].shape[2:]
    plain = leaf.padding == (0, 0) and leaf.dilation == (1, 1) and leaf.groups == 1
    if leaf.input != shape or leaf.stride != kernel or not plain or len(leaf.output) != 3:
        return []
    channels, height, width = leaf.output
    if height * kernel[0] != shape[1] or width * kernel[1] != shape[2]:
        return []
    tokens = (1, height * width, channels)
    return [
        PatchSolution(leaf.weight, name, (kernel[0], kernel[1]), shape)
        for name, found in first.others
        if found == tokens
    ][:1]


def _grid(shape: Map) -> tuple[int, int]:
    """The grid that a stage works on for a map of this shape: its own, or folded to FINEST."""
    _, height, width = shape
    for factor in range(1, min(height, width) + 1):
        if height % factor == 0 == width % factor and max(height, width) // factor <= FINEST:
            return height // factor, width // factor
    return min(height, FINEST), min(width, FINEST)


def _fold(height: int, width: int, grid: tuple[int, int]) -> int:
    """Factor by which a map is folded to fit a grid; 0 where it must be resized."""
    factor = height // grid[0]
    return factor if (grid[0] * factor, grid[1] * factor) == (height, width) else 0


def _resampled(shape: Map, grid: tuple[int, int]) -> Map:
    """Shape of what `_resample` returns."""
    channels, height, width = shape
    return channels * max(1, _fold(height, width, grid)) ** 2, *grid


def _resample(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps on this grid: finer ones are folded into channels, others take the nearest value."""
    factor = _fold(maps.shape[2], maps.shape[3], grid)
    if factor == 1:
        return maps
    return F.pixel_unshuffle(maps, factor) if factor else F.interpolate(maps, grid)


def _with_one(clues: Tensor) -> Tensor:
    """The error signal's direction, and one."""
    return torch.cat([clues[:, :-1], torch.ones_like(clues[:, :1])], 1)


def _silence(layer: nn.Module) -> None:
    """Set a layer's parameters to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _opened(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are stages or norms."""
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield from _opened(child)
        elif _trained(child):
            yield child


def _trained(module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse) if parameter.requires_grad]


def _refused(name: str, module: nn.Module, why: str) -> FedtapError:
    return FedtapError(
        f"Layer {name or 'at the top'} ({type(module).__name__}) {why}, so no stage can read its gradient: use linear "
        "layers, convolutions padded with zeros, norms and blocks of them, or idlg, which needs no such structure."
    )


class _Activations(TorchFunctionMode):
    """Records which tensors are the output of an activation in INVERSES, also after they were flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[int, str] = {}
        self._alive: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self._alive.append(output)  # so that no other tensor takes its id
            name = getattr(func, "__name__", "")
            if name in INVERSES:
                self.kinds[id(output)] = name
            elif name in ("flatten", "reshape", "view") and id(args[0]) in self.kinds:
                self.kinds[id(output)] = self.kinds[id(args[0])]
        return output
