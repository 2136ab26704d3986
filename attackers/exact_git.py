"""Exact-GIT: undo the network from its output to its input, each layer a weighted least squares in closed form.

Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026. There is no public code (November 2026), so this is built
from the paper's recursion.
Departs from the paper in three ways: the weights are known, as a curious server's are (there they are fitted on pairs);
pseudo-inverses give way to least squares in which each equation is weighted by its propagated error, with a prior
(`weighted=False` is the plain least squares); and the forward equations are used beside the gradient's.

With z = W a' + b, a = s(z), d = dL/dz and G = dL/dW, a layer's input a' obeys

    K(d) a' = G                    the gradient: G = d a'^T, for a convolution summed over its places
    W a'    = s^-1(a) - b          forward, from the layer above
    d'      = W^T d * s'(z')       and so on down

from dL/db = softmax(z) - onehot at the top, where the label is its lowest entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attackers.parts.checks import check_fields
from attackers.parts.gradients import Match, check_match, squared_distance
from attackers.parts.labels import class_slopes, last_linear, recovered
from attackers.parts.layers import Chain, Layer, chain
from simulator.attack import Attack, Images, Reconstruction
from simulator.errors import FedtapError
from simulator.leaks import GradientLeak, Leak

ROOM = 2**25
"""Entries of the normal matrices that are solved at once: 256 MiB, of which a few copies live."""

JITTER = 1e-13
"""What is added to the normal matrix's diagonal, scaled to ones, so that rounding leaves it positive."""


@dataclass(frozen=True)
class ExactGIT(Attack):
    """The recursion from logits to pixels; one image a victim, weights known.

    Args:
        sigma: standard deviation of the noise on each entry of the gradient, as the defence announces it. What the
            wire and the floating point format round is known from the leak.
        prior_std: of a pixel around grey, and of an activation around that of a grey image.
        weighted: weigh each equation by its error and use the prior; otherwise plain least squares.
    """

    leaks = (GradientLeak,)

    sigma: float = 0.0
    prior_std: float = 0.25
    weighted: bool = True

    def __post_init__(self) -> None:
        check_fields(self, prior_std=1e-6)

    def accepts(self, leak: Leak) -> None:
        """One image a victim, and a network of layers and activations that can be undone."""
        super().accepts(leak)
        if leak.protocol.batch != 1:
            raise FedtapError(
                f"exact_git undoes the gradient of one image, and this one is the mean over {leak.protocol.batch}: "
                "use --batch 1, or idlg, which matches gradients of batches."
            )
        chain(leak)
        last_linear(leak)
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        network = chain(leak)
        largest = max(layer.inputs for layer in network.layers) ** 2
        found = [self._undo(leak[which], network) for which in _chunks(len(leak), max(1, ROOM // largest))]
        images = torch.cat(found).reshape(start.shape).to(start.dtype).clamp(0, 1)
        labels = recovered(leak)
        return Reconstruction(images, labels, Match(leak, squared_distance)(images, labels))

    def _undo(self, leak: Leak, network: Chain) -> Float[Tensor, "victims pixels"]:
        victims = len(leak)
        layers = [(layer, *layer.parameters(leak.weights or {}, victims, leak.stacked)) for layer in network.layers]
        gradients = [leak.observed[f"{layer.name}weight"].double().flatten(2) for layer in network.layers]
        noises = [self._noise(leak, gradient) for gradient in gradients]
        means = _grey(network, layers, victims)
        *_, (_, weight, bias) = layers
        a, slope, spread = _top(leak, gradients[-1], weight, bias, noises[-1])
        for which in range(len(layers) - 2, -1, -1):
            layer, below, bias = layers[which]
            s = layer.activation
            above, weight, _ = layers[which + 1]
            # a is this layer's output, `spread` its variance; `slope` is d of the layer above
            a = a.clamp(s.low + 1e-9, s.high - 1e-9)
            gain = s.slope(a)
            pulled = above.scatter(slope @ weight)
            d = _by_place(pulled * gain, layer)
            z = _by_place(s.inverse(a), layer)
            doubt = _by_place(spread / gain.square(), layer)
            unweighted = torch.ones_like(doubt)
            last = which == 0
            prior = self.prior_std * (network.scale.abs() if last else torch.ones_like(means[which][0]))
            a, spread = _least_squares(
                layer,
                below,
                d,
                gradients[which],
                z - bias[:, None],
                doubt if self.weighted else unweighted,
                noises[which].square() if self.weighted else torch.ones_like(noises[which]),
                means[which],
                prior.square().reciprocal() if self.weighted else torch.zeros_like(prior),
                variances=not last,
            )
            slope = d
        return (a - network.shift) / network.scale

    def _noise(self, leak: Leak, gradient: Tensor) -> Float[Tensor, "victims"]:
        """Standard error of an entry: the wire's, the defence's or that of the floating point format."""
        rounding = torch.finfo(next(iter(leak.observed.values())).dtype).eps
        return (rounding * gradient.square().mean((1, 2)).sqrt()).clamp_min(max(leak.resolution, self.sigma, 1e-300))


def _top(
    leak: Leak, gradient: Tensor, weight: Tensor, bias: Tensor, noise: Tensor
) -> tuple[Tensor, Float[Tensor, "victims places filters"], Tensor]:
    """The last layer's input, its d and the variance of the input: ``G = d a^T`` and ``d = softmax(W a + b) - onehot``.

    The label's own entry of d cancels in floating point where the network is sure, the softmax of the others does not.
    """
    d = class_slopes(leak).double()
    label = F.one_hot(d.argmin(1), d.shape[1]).double()
    for _ in range(2):
        power = d.square().sum(1, keepdim=True).clamp_min(1e-300)
        a = torch.einsum("vo,voj->vj", d, gradient) / power
        others = (torch.einsum("voj,vj->vo", weight, a) + bias).softmax(1) * (1 - label)
        d = others - label * others.sum(1, keepdim=True)
    return a, d[:, None], (noise[:, None].square() / power).expand_as(a)


def _least_squares(
    layer: Layer,
    weight: Float[Tensor, "victims filters patch"],
    d: Float[Tensor, "victims places filters"],
    gradient: Float[Tensor, "victims filters patch"],
    forward: Float[Tensor, "victims places filters"],
    doubt: Float[Tensor, "victims places filters"],
    noise: Float[Tensor, "victims"],
    mean: Float[Tensor, "victims inputs"],
    precision: Float[Tensor, "inputs"],
    variances: bool,
) -> tuple[Float[Tensor, "victims inputs"], Float[Tensor, "victims inputs"]]:
    """The input that fits the layer's equations best, and where asked its variance.

    Lowest ``|K(d) a - G|^2 / noise + sum (W a - forward)^2 / doubt + sum precision (a - mean)^2``, by its normal
    equations ``(K'K / noise + W' diag(1 / doubt) W + diag(precision)) (a - mean) = ...``.
    """
    trust = 1 / doubt.clamp_min(1e-30)
    seen = layer.gather(mean)
    missing = (gradient - d.transpose(1, 2) @ seen) / noise[:, None, None]
    right = layer.scatter((forward - seen @ weight.transpose(1, 2)) * trust @ weight + d @ missing)
    matrix = normal_matrix(layer, weight, trust, d / noise.sqrt()[:, None, None])
    matrix.diagonal(dim1=1, dim2=2).add_(precision)
    scale = matrix.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
    matrix = matrix.mul_(scale[:, :, None]).mul_(scale[:, None, :])
    matrix.diagonal(dim1=1, dim2=2).add_(JITTER)
    factor = torch.linalg.cholesky(matrix)
    solution = mean + scale * torch.cholesky_solve((scale * right)[:, :, None], factor)[:, :, 0]
    if not variances:
        return solution, torch.zeros_like(solution)
    inverse = torch.cholesky_inverse(factor)
    return solution, inverse.diagonal(dim1=1, dim2=2) * scale.square()


def normal_matrix(
    layer: Layer, weight: Tensor, trust: Tensor, d: Tensor
) -> Float[Tensor, "victims inputs inputs"]:
    """``W' diag(trust) W + K(d)'K(d)``, added up patch by patch, since each equation sees few inputs.

    Of W: for each place, ``sum_filters trust w w'`` on the pairs of its patch. Of K: for each entry of the patch,
    ``sum_filters d d'`` on the pairs of places that see it.
    """
    side, patches = layer.inputs + 1, layer.patches
    total = weight.new_zeros(len(weight), side * side)
    pairs = patches[:, :, None] * side + patches[:, None, :]
    forward = torch.einsum("vpo,voi,voj->vpij", trust, weight, weight)
    total.index_add_(1, pairs.flatten(), forward.flatten(1))
    across = patches.T
    pairs = across[:, :, None] * side + across[:, None, :]
    of_places = (d @ d.transpose(1, 2))[:, None].expand(-1, len(across), -1, -1)
    total.index_add_(1, pairs.flatten(), of_places.flatten(1))
    return total.reshape(-1, side, side)[:, :-1, :-1].contiguous()


def _grey(network: Chain, layers: list[tuple[Layer, Tensor, Tensor]], victims: int) -> list[Tensor]:
    """What each layer is fed where the image is grey: the prior's means."""
    fed = [(0.5 * network.scale + network.shift).expand(victims, -1)]
    for layer, weight, bias in layers[:-1]:
        z = layer.gather(fed[-1]) @ weight.transpose(1, 2) + bias[:, None]
        fed.append(layer.activation.apply(z).transpose(1, 2).flatten(1))
    return fed


def _by_place(flat: Tensor, layer: Layer) -> Float[Tensor, "victims places filters"]:
    """A layer's flat output (filters before places, as convolutions have it) with the filters last."""
    return flat.unflatten(1, (-1, len(layer.patches))).transpose(1, 2)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))
