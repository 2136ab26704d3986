"""A network's weights from auxiliary pairs: known images, known labels, and the gradient that each image causes.

The closed form of what GIT fits by gradient descent (Chen and Liu 2025, https://arxiv.org/abs/2505.20026). The
equations are those of `fedtap.attackers.gradients.exact_git`, read for the weights: with p the softmax, h a layer's
input, z = W h + b, a = s(z), d = dL/dz, G = dL/dW, and a dash for the next layer,

    log p_c - log p_r = (W_c - W_r) h + b_c - b_r    the last layer, by p = dL/db + onehot and h = G^T d / |d|^2
    K(d) h = G                                       a layer's input, as far as d = W'^T d' * s'(z) determines it
    s^-1(a) = W h + b                                a layer's weights, from the pixels upwards
    G = K'(h) (W'^T d' * s'(z))                      the last layer's W' again, by the gradient below it

of which the last three are repeated until W' converges: the first alone determines W' badly where activations hardly
vary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from fedtap.attackers.parts.layers import Layer, chain
from fedtap.simulator.attack import Images, Labels
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak
from fedtap.simulator.wire.replay import trained

_ROUNDS = 20
"""Iterations over the equations, at most."""

SETTLED = 1e-7
"""Relative change of the last layer's weight in an iteration at which the iteration ends."""

_PAIRS_MULTIPLE = 8
"""Pairs that an iteration uses, as a multiple of the fewest that determine the weights."""

_DETERMINED = 1e-2
"""Standard deviation below which the gradient determines an activation; an undetermined one has the prior's, 1."""

_UNEXPLAINED = 1e-4
"""Share of the variance of the last layer's input over the pairs that the weights may leave unexplained."""

SMALLEST = 1.2e-38
"""Smallest normal float32: below it relative precision is lost."""

SHARPEST = 1e-6
"""Least noise of the equations for activations, relative to the gradient: below it the prior is lost in rounding."""

_JITTER = 1e-12
"""What is added to a normal matrix's diagonal, scaled to ones, so that rounding leaves it positive."""

LayerWeights = tuple[Tensor, Tensor]
"""Weight, `filters patch`, and bias, `filters`, of a layer."""

ActivationEstimate = tuple[Tensor, Tensor]
"""Activations and their standard deviations, each `pairs entries`."""


def identify(leak: GradientLeak, images: Images, labels: Labels) -> dict[str, Tensor]:
    """Weights with the same gradients as the unknown ones: parameter name -> float64 tensor.

    Softmax leaves a row common to all classes of the last layer open; here its rows' mean is zero. The pairs have to
    outnumber the last layer's inputs, by a sixth for LeNet on photographs, and its rarest class's probability has to
    stand out of the gradient's noise in as many of them.

    Args:
        leak: a pair an entry, of one image each; its weights are not read.
        images: `pairs 1 channel height width`, in [0, 1].
        labels: `pairs 1`.

    Raises:
        FedtapError: batches of several images, a network that is no chain of layers and activations that can be
            undone or ends without a bias, too few pairs, or pairs that no weights explain.
    """
    _check(leak, len(images))
    network = chain(leak)
    *hidden, last = network.layers
    logit_gradients = leak.gradient[str(last.bias)].double()
    fed = _input(last, logit_gradients[:, None], *_seen(leak, last))
    softmax = _Softmax.of(logit_gradients, labels[:, 0], _rounding(leak), leak.resolution)
    # log p_c - log p_r = (W_c - W_r) h + b_c - b_r
    weight = softmax.weight(fed[0])
    pixels = network.scale * images.double().flatten(1) + network.shift
    few = slice(_PAIRS_MULTIPLE * max([leak.protocol.classes, *map(_needed, hidden)]))
    pairs = PairEquations(
        layers=network.layers,
        pixels=pixels[few],
        gradients=[_seen(leak[few], layer) for layer in hidden],
        logit_gradients=logit_gradients[few],
        fed=(fed[0][few], fed[1][few]),
    )
    below: list[LayerWeights] = []
    for _ in range(_ROUNDS if hidden else 0):
        below, before = pairs.below(weight, below), weight
        weight = pairs.top(below)
        # a fixed point of the equations
        if float((weight - before).norm() / weight.norm()) < SETTLED:
            break
    pairs.check(below)
    below.append((weight, softmax.bias(fed[0], weight)))
    found = {}
    for layer, (weight, bias) in zip(network.layers, below, strict=True):
        found[layer.weight] = weight.reshape(leak.gradient[layer.weight].shape[1:])
        if layer.bias is not None:
            found[layer.bias] = bias
    return found


@dataclass(frozen=True)
class _Softmax:
    """Each class's probability, as the gradient of the last layer's bias gives it, and its relative standard error.

    A probability keeps its relative precision however small it is, but for the label's, of which one is subtracted.
    """

    probabilities: Float[Tensor, "pairs classes"]
    """p = dL/db + onehot."""
    error: Float[Tensor, "pairs classes"]
    """Relative standard error of p."""

    @classmethod
    def of(cls, logit_gradients: Tensor, labels: Tensor, rounding: float, resolution: float) -> _Softmax:
        """From dL/db = p - onehot.

        Raises:
            FedtapError: a probability is negative.
        """
        onehot = F.one_hot(labels, logit_gradients.shape[1]).to(logit_gradients)
        probabilities = logit_gradients + onehot
        # standard error: the format's, at the magnitude of both summands, or the wire's
        deviation = (rounding * (probabilities.abs() + onehot)).clamp_min(max(resolution, SMALLEST))
        if bool((wrong := (probabilities < -10 * deviation).any(1)).any()):
            raise FedtapError(
                f"Auxiliary pair {int(wrong.nonzero()[0])} has another label than its gradient shows, so images, "
                "labels and gradients are not in the same order: give them in the order of the client's replies."
            )
        return cls(probabilities, deviation / probabilities.clamp_min(1e-300))

    def relation(self, one: int, other: int) -> tuple[Tensor, Float[Tensor, "some"], Float[Tensor, "some"]]:
        """Which pairs show the difference of two logits, that difference, and its standard error."""
        # to first order the error of log p is the relative error of p
        rows = (self.error[:, [one, other]] < 0.1).all(1)
        logs = self.probabilities[rows][:, [one, other]].log()
        return rows, logs[:, 0] - logs[:, 1], self.error[rows][:, [one, other]].norm(dim=1)

    @property
    def reference(self) -> int:
        """The class whose logits are known best."""
        return int((self.error < 1e-4).sum(0).argmax())

    def weight(self, inputs: Float[Tensor, "pairs inputs"]) -> Float[Tensor, "classes inputs"]:
        """By regression of each class's logit, less that of the reference, on the layer's input.

        Raises:
            FedtapError: too few pairs show a class.
        """
        classes, size, reference = self.error.shape[1], inputs.shape[1] + 1, self.reference
        padded = F.pad(inputs, (0, 1), value=1.0)
        weight = inputs.new_zeros(classes, size)
        for one in set(range(classes)) - {reference}:
            rows, difference, error = (tensor[:, None] for tensor in self.relation(one, reference))
            if len(difference) < size:
                raise FedtapError(
                    f"Of {len(inputs):,} auxiliary pairs {len(difference):,} show how the logits of classes {one} and "
                    f"{reference} differ, and the last layer needs {size:,}: give more pairs, of other labels."
                )
            # each equation divided by its standard error
            weight[one] = torch.linalg.lstsq(padded[rows[:, 0]] / error, difference / error).solution[:, 0]
        return _centred(weight[:, :-1])

    def bias(self, inputs: Float[Tensor, "pairs inputs"], weight: Tensor) -> Float[Tensor, "classes"]:
        """Mean of the logits' differences that the weight does not explain, each pair weighed by its error."""
        bias, reference = weight.new_zeros(len(weight)), self.reference
        for one in set(range(len(weight))) - {reference}:
            rows, difference, error = self.relation(one, reference)
            rest = difference - inputs[rows] @ (weight[one] - weight[reference])
            # mean with weights 1 / variance
            bias[one] = (rest / error.square()).sum() / (1 / error.square()).sum()
        return _centred(bias)


@dataclass(frozen=True)
class PairEquations:
    """The equations of the pairs that the iterations use."""

    layers: tuple[Layer, ...]
    """The network's layers, from the pixels to the logits."""
    pixels: Float[Tensor, "pairs inputs"]
    """Input of the first layer."""
    gradients: list[tuple[Tensor, Tensor]]
    """dL/dW of each layer but the last, and the standard error of its entries."""
    logit_gradients: Float[Tensor, "pairs classes"]
    """dL/db of the last layer, ``p - onehot``."""
    fed: ActivationEstimate
    """Input of the last layer, and its standard deviation."""

    def below(self, top: Tensor, known: list[LayerWeights]) -> list[LayerWeights]:
        """The layers below the last, given the last one's weight, and what is known of them from the round before."""
        outputs = self._outputs(top, known)
        found, inputs = [], self.pixels
        for layer, output in zip(self.layers[:-1], outputs, strict=True):
            found.append(_regressed(layer, inputs, output))
            inputs = _forward(layer, inputs, found[-1])
        return found

    def _outputs(self, top: Tensor, known: list[LayerWeights]) -> list[ActivationEstimate]:
        """Of each layer but the last, by the gradient of the layer above it.

        Raises:
            FedtapError: a gradient does not determine its layer's input, from which the layers below are identified.
        """
        outputs, weight, d = [self.fed], top, self.logit_gradients[:, None]
        for which in range(len(self.layers) - 2, 0, -1):
            layer, above = self.layers[which], self.layers[which + 1]
            d = layer.by_place(
                above.scatter(d @ weight) * layer.activation.derivative(layer.activation.inside(outputs[0][0]))
            )
            outputs.insert(0, _input(layer, d, *self.gradients[which]))
            inputs, deviation = outputs[0]
            if which > 1 and bool((deviation > _DETERMINED).any()):
                raise FedtapError(
                    f"The gradient of {layer.weight} leaves {float((deviation > _DETERMINED).double().mean()):.0%} of "
                    "that layer's input open, so the weights below it cannot be identified: use --threat-model "
                    "curious_server, or a network with more filters or smaller strides."
                )
            weight = known[which][0] if known else _regressed(layer, inputs, outputs[1])[0]
        return outputs

    def top(self, below: list[LayerWeights]) -> Float[Tensor, "classes inputs"]:
        """The last layer's weight by the gradient below it, of which each filter f is

        G[f] = sum_place h[place] s'(z[place, f]) sum_class W'[class, f, place] d'[class].
        """
        layer, inputs = self.layers[-2], self.pixels
        for under, affine in zip(self.layers[:-2], below, strict=False):
            inputs = _forward(under, inputs, affine)
        gradient, noise = self.gradients[-1]
        patches = layer.gather(inputs) / noise[:, None, None]
        derivative = layer.by_place(layer.activation.derivative(layer.activation.inside(self.fed[0])))
        d = _centred(self.logit_gradients.T).T
        both = (d[:, :, None] * d[:, None, :]).flatten(1)
        classes, places, filters = d.shape[1], derivative.shape[1], derivative.shape[2]
        weight = d.new_zeros(classes, filters, places)
        for which in range(filters):
            seen = patches * derivative[:, :, which, None]
            normal = (seen @ seen.transpose(1, 2)).flatten(1).T @ both
            normal = normal.reshape(places, places, classes, classes).transpose(1, 2).flatten(2).flatten(0, 1)
            right = (seen @ (gradient[:, which] / noise[:, None])[:, :, None])[:, :, 0].T @ d
            factor, scale = _factored(normal)
            solution = scale * torch.cholesky_solve(scale * right.flatten()[:, None], factor)
            weight[:, which] = solution.reshape(places, classes).T
        return _centred(weight.flatten(1))

    def check(self, below: list[LayerWeights]) -> None:
        """Refuse weights by which the last layer is not fed what its gradient shows.

        Raises:
            FedtapError: more of it is left unexplained than `UNEXPLAINED`.
        """
        inputs = self.pixels
        for layer, affine in zip(self.layers[:-1], below, strict=True):
            inputs = _forward(layer, inputs, affine)
        shown = self.fed[0]
        # 1 - R^2
        left = float((shown - inputs).square().sum() / (shown - shown.mean(0)).square().sum())
        if not left < _UNEXPLAINED:
            raise FedtapError(
                f"No weights explain the auxiliary pairs (what the last layer is fed is off by {left:.0e} of its "
                "variance), since these are too few or too noisy, or images and gradients are not of each other: give "
                "more pairs, in the order of the client's replies."
            )


def _input(layer: Layer, d: Tensor, gradient: Tensor, noise: Float[Tensor, "pairs"]) -> ActivationEstimate:
    """A layer's input by K(d) h = G, from a prior of mean 0 and variance 1.

    Entries that no entry of a patch has in common are apart: a stride of two splits a channel into four.
    """
    if len(layer.patches) == 1:
        # h = G'd / |d|^2
        power = d[:, 0].square().sum(1, keepdim=True).clamp_min(1e-300)
        inputs = (d @ gradient)[:, 0] / power
        return inputs, (noise[:, None] / power.sqrt()).expand_as(inputs)
    inputs, variance = d.new_zeros(len(d), layer.inputs), d.new_ones(len(d), layer.inputs)
    for members, columns in _parts(layer):
        at = torch.full((layer.inputs + 1,), len(members))
        at[members] = torch.arange(len(members))
        at = at[layer.patches.cpu()[:, columns]]
        matrix = d.new_zeros(len(d), len(members) + 1, len(columns), d.shape[2])
        matrix[:, at, torch.arange(len(columns)).expand_as(at)] = d[:, :, None].expand(-1, -1, len(columns), -1)
        matrix = matrix[:, :-1].flatten(2) / noise[:, None, None]
        right = matrix @ (gradient[:, :, columns].transpose(1, 2).flatten(1) / noise[:, None])[:, :, None]
        normal = matrix @ matrix.transpose(1, 2)
        # the prior's precision: variance 1
        normal.diagonal(dim1=1, dim2=2).add_(1)
        factor, scale = _factored(normal)
        inputs[:, members] = (scale * torch.cholesky_solve(scale * right, factor))[:, :, 0]
        variance[:, members] = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2) * scale[:, :, 0].square()
    return inputs, variance.sqrt()


def _parts(layer: Layer) -> list[tuple[Int[Tensor, "members"], Int[Tensor, "columns"]]]:
    """The layer's inputs, and the entries of a patch that see them, in parts that have none in common."""
    count, size = layer.inputs, layer.patches.shape[1]
    patches = layer.patches.cpu()
    places, columns = (patches < count).nonzero(as_tuple=True)
    # a bipartite graph of inputs and patch entries: its components are solved apart
    ends = (patches[places, columns].numpy(), (count + columns).numpy())
    graph = coo_matrix((torch.ones(len(places)).numpy(), ends), shape=(count + size, count + size))
    parts, names = connected_components(graph, directed=False)
    names = torch.from_numpy(names)
    return [((names[:count] == part).nonzero()[:, 0], (names[count:] == part).nonzero()[:, 0]) for part in range(parts)]


def _regressed(layer: Layer, inputs: Float[Tensor, "pairs inputs"], output: ActivationEstimate) -> LayerWeights:
    """Weight and bias by s^-1(a) = W h + b, each equation weighed by its error, that of a over s'(z).

    The filters of a linear layer share their mean, so that one factorisation of what may be a large matrix does.
    """
    a = layer.activation.inside(output[0])
    # sd(s^-1(a)) = sd(a) / s'(z)
    error = layer.by_place(output[1] / layer.activation.derivative(a)).flatten(0, 1)
    z = layer.by_place(layer.activation.inverse(a)).flatten(0, 1)
    patches = layer.gather(inputs).flatten(0, 1)
    if layer.bias is not None:
        patches = F.pad(patches, (0, 1), value=1.0)
    if len(layer.patches) == 1:
        weighed = [(error.square().mean(1, keepdim=True).sqrt(), z)]
    else:
        weighed = list(zip(torch.split(error, 1, dim=1), torch.split(z, 1, dim=1), strict=True))
    affine = torch.cat([torch.linalg.lstsq(patches / each, some / each).solution for each, some in weighed], dim=1).T
    return (affine, affine.new_zeros(len(affine))) if layer.bias is None else (affine[:, :-1], affine[:, -1])


def _forward(
    layer: Layer, inputs: Float[Tensor, "pairs inputs"], affine: LayerWeights
) -> Float[Tensor, "pairs outputs"]:
    weight, bias = affine
    return layer.activation.apply(layer.gather(inputs) @ weight.T + bias).transpose(1, 2).flatten(1)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def _factored(normal: Float[Tensor, "*pairs size size"]) -> tuple[Tensor, Float[Tensor, "*pairs size 1"]]:
    """Cholesky factor of the matrix scaled to a diagonal of ones, and the scale of its rows and columns."""
    scale = normal.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()[..., None]
    scaled = normal * scale * scale.mT
    scaled.diagonal(dim1=-2, dim2=-1).add_(_JITTER)
    return torch.linalg.cholesky(scaled), scale


def _seen(leak: Leak, layer: Layer) -> tuple[Float[Tensor, "pairs filters patch"], Float[Tensor, "pairs"]]:
    """A layer's gradient, and the standard error of its entries: the format's, or the wire's where larger."""
    gradient = leak.observed[layer.weight].double().flatten(2)
    noise = max(_rounding(leak), SHARPEST) * gradient.square().mean((1, 2)).sqrt()
    return gradient, noise.clamp_min(max(leak.resolution, 1e-150))


def _rounding(leak: Leak) -> float:
    return torch.finfo(next(iter(leak.observed.values())).dtype).eps


def _needed(layer: Layer) -> int:
    """Pairs whose places are as many as the unknowns of a filter."""
    places, patch = layer.patches.shape
    return -(-(patch + 1) // places)


def check_identifiable(leak: Leak) -> tuple[Layer, ...]:
    """The layers of a network whose weights can be identified from auxiliary pairs of this protocol.

    Raises:
        FedtapError: several images a pair, no chain of layers that can be undone, or one that is not trained.
    """
    if leak.protocol.batch != 1:
        raise FedtapError(
            f"Weights are identified from the gradient of one image a pair, and these are means over "
            f"{leak.protocol.batch}: use --batch 1."
        )
    layers = chain(leak).layers
    if layers[-1].bias not in trained(leak.network):
        raise FedtapError(
            f"Weights are identified from the gradient of the last layer's bias, and {leak.protocol.model!r} has "
            "none there that is trained: give its last layer a bias, or use --threat-model curious_server."
        )
    if frozen := [layer.weight for layer in layers if layer.weight not in trained(leak.network)]:
        raise FedtapError(
            f"Weights are identified from their own gradients, and {frozen[0]} of {leak.protocol.model!r} is frozen: "
            "train every layer, or use --threat-model curious_server."
        )
    return layers


def _check(leak: GradientLeak, images: int) -> None:
    """Refuse what cannot be identified, as far as that shows before the equations are solved."""
    leak.check()
    if images != len(leak):
        raise FedtapError(
            f"There are {images:,} auxiliary images and {len(leak):,} gradients, and a pair is one of each: give as "
            "many of both, in the same order."
        )
    if len(leak) < (needed := max(map(_needed, check_identifiable(leak)))):
        raise FedtapError(
            f"The weights of {leak.protocol.model!r} need at least {needed:,} auxiliary pairs, one for each unknown of "
            f"a filter of its widest layer, and there are {len(leak):,}: give more pairs."
        )
