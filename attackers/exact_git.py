"""Exact-GIT: undo the network from its output to its input, each layer a weighted least squares in closed form.

Chen and Liu 2025 (GIT), https://arxiv.org/abs/2505.20026. We found no public code (November 2026): this is built
from the paper's recursion.
Departs from the paper in three ways: the weights are known, as a curious server's are (there they are fitted on pairs);
pseudo-inverses give way to least squares in which each equation is weighted by its propagated error, with a prior
(`weighted=False` is the plain least squares); and the forward equations are used beside the gradient's.

With z = W a' + b, a = s(z), d = dL/dz and G = dL/dW, a layer's input a' obeys

    K(d) a' = G                    the gradient: G = d a'^T, for a convolution summed over its places
    W a'    = s^-1(a) - b          forward, from the layer above
    d'      = W^T d * s'(z')       and so on down

from d = dL/db = softmax(z) - onehot at the top, where the label is its lowest entry.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attackers.parts.checks import check_fields
from attackers.parts.gradients import Match, check_match, squared_distance, trained
from attackers.parts.labels import last_linear, recovered
from attackers.parts.layers import Chain, Layer, chain
from simulator.attack import Attack, Images, Reconstruction
from simulator.errors import FedtapError
from simulator.leaks import GradientLeak, Leak

LARGEST = 2**14
"""Inputs of a layer: a matrix of their squares takes 2 GiB."""

ROOM = 2**25
"""Entries of the tensors that are worked on at once: 256 MiB, of which a few live."""

EDGE = 1e-9
"""How close to the ends of its range an activation is let, so that it can be undone."""

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
        layers = chain(leak).layers
        if (largest := max(layer.inputs for layer in layers)) > LARGEST:
            raise FedtapError(
                f"exact_git solves for all inputs of a layer at once, and model {leak.protocol.model!r} has one with "
                f"{largest:,}, where memory ends at {LARGEST:,}: use smaller images, or idlg."
            )
        last_linear(leak)
        if layers[-1].bias not in trained(leak.network):
            raise FedtapError(
                f"exact_git begins at the gradient of the last layer's bias, and {leak.protocol.model!r} has none "
                "there that is trained: use idlg, which does without."
            )
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        network = chain(leak)
        at_once = max(1, ROOM // max(_room(layer) for layer in network.layers))
        found = [self._undone(leak[first : first + at_once], network) for first in range(0, len(leak), at_once)]
        images = torch.cat(found).reshape(start.shape).to(_dtype(leak)).clamp(0, 1)
        labels = recovered(leak)
        return Reconstruction(images, labels, Match(leak, squared_distance)(images, labels))

    def _undone(self, leak: Leak, network: Chain) -> Float[Tensor, "victims pixels"]:
        """From the last layer to the first: `a` and `variance` of a layer's input, `d` of its output."""
        layers = network.layers
        gradients = [leak.observed[layer.weight].double().flatten(2) for layer in layers]
        tensors = [layer.parameters(leak.weights or {}, len(leak), leak.stacked) for layer in layers]
        means = _grey(network, tensors)
        slopes = leak.observed[str(layers[-1].bias)].double()
        a, variance, d = _top(gradients[-1], slopes, self._noise(leak, gradients[-1]))
        for which in range(len(layers) - 2, -1, -1):
            layer, s, (weight, bias) = layers[which], layers[which].activation, tensors[which]
            a = a.clamp(s.low + EDGE, s.high - EDGE)
            slope = s.slope(a)
            d = layer.by_place(layers[which + 1].scatter(d @ tensors[which + 1][0]) * slope)
            unit = network.scale if which == 0 else torch.ones_like(means[which][0])
            equations = Equations(
                layer=layer,
                weight=weight,
                forward=layer.by_place(s.inverse(a)) - bias[:, None],
                doubt=layer.by_place(variance / slope.square()),
                d=d,
                gradient=gradients[which],
                noise=self._noise(leak, gradients[which]).square(),
                mean=means[which],
                precision=(self.prior_std * unit).square().reciprocal(),
            )
            a, variance = (equations if self.weighted else equations.plain()).solve(variances=which > 0)
        return (a - network.shift) / network.scale

    def _noise(self, leak: Leak, gradient: Tensor) -> Float[Tensor, "victims"]:
        """Standard error of an entry: of the floating point format, or the wire's or the defence's where larger."""
        rounding = torch.finfo(_dtype(leak)).eps
        return (rounding * gradient.square().mean((1, 2)).sqrt()).clamp_min(max(leak.resolution, self.sigma, 1e-150))


def _top(
    gradient: Float[Tensor, "victims classes inputs"],
    slopes: Float[Tensor, "victims classes"],
    noise: Float[Tensor, "victims"],
) -> tuple[Tensor, Tensor, Float[Tensor, "victims 1 classes"]]:
    """The last layer's input, its variance, and d: ``a = G'd / |d|^2`` with d the bias's gradient as it is.

    Recomputing d as ``softmax(W a + b) - onehot`` would undo the cancellation in the label's entry, but the client's
    own backward pass went on from the rounded d; and where noise counts, the softmax feeds a's error back into d.
    """
    power = slopes.square().sum(1, keepdim=True).clamp_min(1e-300)
    a = torch.einsum("vc,vci->vi", slopes, gradient) / power
    return a, (noise[:, None].square() / power).expand_as(a), slopes[:, None]


def _grey(network: Chain, tensors: list[tuple[Tensor, Tensor]]) -> list[Float[Tensor, "victims inputs"]]:
    """What each layer is fed where the image is grey: the means of the prior."""
    fed = [(0.5 * network.scale + network.shift).expand(len(tensors[0][0]), -1)]
    for layer, (weight, bias) in zip(network.layers[:-1], tensors, strict=False):
        z = layer.gather(fed[-1]) @ weight.transpose(1, 2) + bias[:, None]
        fed.append(layer.activation.apply(z).transpose(1, 2).flatten(1))
    return fed


@dataclass(frozen=True)
class Equations:
    """All that is known of one layer's input a; `noise`, `doubt` and 1 / `precision` are variances.

    Lowest ``|K(d) a - gradient|^2 / noise + sum (W a - forward)^2 / doubt + sum precision (a - mean)^2`` is sought.
    """

    layer: Layer
    weight: Float[Tensor, "victims filters patch"]
    forward: Float[Tensor, "victims places filters"]
    doubt: Float[Tensor, "victims places filters"]
    d: Float[Tensor, "victims places filters"]
    gradient: Float[Tensor, "victims filters patch"]
    noise: Float[Tensor, "victims"]
    mean: Float[Tensor, "victims inputs"]
    precision: Float[Tensor, "inputs"]

    def plain(self) -> Equations:
        """The same with every equation worth the same, and no prior."""
        doubt, noise = torch.ones_like(self.doubt), torch.ones_like(self.noise)
        return dataclasses.replace(self, doubt=doubt, noise=noise, precision=torch.zeros_like(self.precision))

    def solve(self, variances: bool) -> tuple[Float[Tensor, "victims inputs"], Float[Tensor, "victims inputs"]]:
        """The a that is sought and, where asked, its variance, by the normal equations

        ``(K'K / noise + W' diag(1 / doubt) W + diag(precision)) (a - mean) = K' (...) / noise + W' (...) / doubt``.
        """
        seen = self.layer.gather(self.mean)
        forward = (self.forward - seen @ self.weight.transpose(1, 2)) / self.doubt
        gradient = (self.gradient - self.d.transpose(1, 2) @ seen) / self.noise[:, None, None]
        right = self.layer.scatter(forward @ self.weight + self.d @ gradient)
        matrix = self.normal_matrix()
        matrix.diagonal(dim1=1, dim2=2).add_(self.precision)
        scale = matrix.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
        matrix.mul_(scale[:, :, None]).mul_(scale[:, None, :])
        matrix.diagonal(dim1=1, dim2=2).add_(JITTER)
        factor = torch.linalg.cholesky(matrix)
        del matrix
        a = self.mean + scale * torch.cholesky_solve((scale * right)[:, :, None], factor)[:, :, 0]
        if not variances:
            return a, torch.zeros_like(a)
        return a, torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2) * scale.square()

    def normal_matrix(self) -> Float[Tensor, "victims inputs inputs"]:
        """``K'K / noise + W' diag(1 / doubt) W``, summed where it is not zero, since an equation sees few inputs.

        Of W: at each place ``sum_filters w w' / doubt``, on the pairs of entries of its patch. Of K: for each entry of
        a patch ``sum_filters d d' / noise``, on the pairs of places that see it.
        """
        patches, side = self.layer.patches, self.layer.inputs + 1
        total = self.weight.new_zeros(len(self.weight), side * side)
        of_places = torch.einsum("vpf,vfi,vfj->vpij", 1 / self.doubt, self.weight, self.weight)
        _add_pairs(total, patches, of_places)
        between = self.d @ self.d.transpose(1, 2) / self.noise[:, None, None]
        _add_pairs(total, patches.T, between[:, None].expand(-1, patches.shape[1], -1, -1))
        return total.reshape(-1, side, side)[:, :-1, :-1].contiguous()


def _add_pairs(total: Tensor, groups: Tensor, values: Float[Tensor, "victims groups size size"]) -> None:
    """Add to the flat square matrices `total` each group's square, at the pairs of the group's members.

    Not by `index_add_`, whose order of summation is left to chance on a GPU.
    """
    side = math.isqrt(total.shape[1])
    pairs = (groups[:, :, None] * side + groups[:, None, :]).flatten()
    victims = torch.arange(len(total), device=total.device)[:, None]
    total.index_put_((victims, pairs[None]), values.flatten(1), accumulate=True)


def _dtype(leak: Leak) -> torch.dtype:
    return next(iter(leak.observed.values())).dtype


def _room(layer: Layer) -> int:
    """Entries of the largest tensor that solving for one victim takes."""
    places, patch = layer.patches.shape
    return max(layer.inputs**2, places * places * patch, places * patch * patch)
