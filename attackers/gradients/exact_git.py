"""Exact-GIT: invert the network from its output to its input, each layer by weighted least squares in closed form.

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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.gradients.recursion import (
    check_undoable,
    dtype_of,
    gradients_below,
    linear_input,
    normal_matrix,
    undone,
)
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.layers import Layer, LayerChain, chain
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.defences.chained import sigma
from fedtap.simulator.defences.defence import Defence, Trace
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak
from fedtap.simulator.wire.replay import trained

_JITTER = 1e-13
"""What is added to the normal matrix's diagonal, scaled to ones, so that rounding leaves it positive."""


@dataclass(frozen=True)
class ExactGIT(Attack):
    """The recursion from logits to pixels; one image a victim, weights known.

    The size of the noise is known: it is what the defence announces, and what the wire and the floating point format
    round.
    """

    leaks = (GradientLeak,)

    prior_std: float = 0.25
    """Standard deviation of a pixel around 0.5, and of an activation around that of a grey image."""
    weighted: bool = True
    """Whether each equation is weighed by its error and the prior is used; otherwise plain least squares."""

    def __post_init__(self) -> None:
        check_fields(self, prior_std=1e-6)

    def knows(self, defence: Defence) -> bool:
        """Noise, and the clipping of one image's gradient: a layer's input is a ratio of gradients."""
        return Trace.RATIOS in defence.survives

    def accepts(self, leak: Leak) -> None:
        """One image a victim, and a chain of layers whose activations have an inverse."""
        super().accepts(leak)
        check_undoable(self, leak, _all)
        if chain(leak).layers[-1].bias not in trained(leak.network):
            raise FedtapError(
                f"exact_git begins at the gradient of the last layer's bias, and {leak.protocol.model!r} has none "
                "there that is trained: use rgap or idlg, which do without."
            )

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        return undone(leak, _all, self._undone)

    def _undone(self, leak: Leak, network: LayerChain) -> Float[Tensor, "victims pixels"]:
        """From the last layer to the first: `a` and `variance` of a layer's input, `d` of its output."""
        layers = network.layers
        gradients = [leak.observed[layer.weight].double().flatten(2) for layer in layers]
        tensors = [layer.parameters(leak.weights or {}, len(leak), leak.stacked) for layer in layers]
        means = _grey(network, tensors)
        logit_gradients = leak.observed[str(layers[-1].bias)].double()
        # d = p - onehot at the top
        a, variance, d = _top(gradients[-1], logit_gradients, self._noise(leak, gradients[-1]))
        for which in range(len(layers) - 2, -1, -1):
            layer, s, (weight, bias) = layers[which], layers[which].activation, tensors[which]
            a = s.inside(a)
            derivative = s.derivative(a)
            # d = W'^T d' * s'(z)
            d = layer.by_place(gradients_below(layers[which + 1], tensors[which + 1][0], d, derivative))
            # the prior is on pixels; the first layer's input is scale pixel + shift
            unit = network.scale if which == 0 else torch.ones_like(means[which][0])
            equations = Equations(
                layer=layer,
                weight=weight,
                # W a = s^-1(a') - b
                forward=layer.by_place(s.inverse(a)) - bias[:, None],
                # Var s^-1(a') = Var a' / s'(z)^2, to first order
                doubt=layer.by_place(variance / derivative.square()),
                d=d,
                gradient=gradients[which],
                noise=self._noise(leak, gradients[which]).square(),
                mean=means[which],
                precision=(self.prior_std * unit).square().reciprocal(),
            )
            a, variance = (equations if self.weighted else equations.plain()).solve(variances=which > 0)
        return a

    def _noise(self, leak: Leak, gradient: Tensor) -> Float[Tensor, "victims"]:
        """Standard error of an entry: of the floating point format, or the wire's or the defence's where larger."""
        rounding = torch.finfo(dtype_of(leak)).eps
        return (rounding * gradient.square().mean((1, 2)).sqrt()).clamp_min(
            max(leak.resolution, sigma(leak.protocol), 1e-150)
        )


def _top(
    gradient: Float[Tensor, "victims classes inputs"],
    logit_gradients: Float[Tensor, "victims classes"],
    noise: Float[Tensor, "victims"],
) -> tuple[Tensor, Tensor, Float[Tensor, "victims 1 classes"]]:
    """The last layer's input, its variance, and d: ``a = G'd / |d|^2`` with d the bias's gradient as it is.

    Recomputing d as ``softmax(W a + b) - onehot`` would undo the cancellation in the label's entry, but the client's
    own backward pass went on from the rounded d; and where noise counts, the softmax feeds a's error back into d.
    """
    power = logit_gradients.square().sum(1, keepdim=True).clamp_min(1e-300)
    a = linear_input(gradient, logit_gradients)
    return a, (noise[:, None].square() / power).expand_as(a), logit_gradients[:, None]


def _grey(network: LayerChain, tensors: list[tuple[Tensor, Tensor]]) -> list[Float[Tensor, "victims inputs"]]:
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
    """The layer whose input is solved for."""
    weight: Float[Tensor, "victims filters patch"]
    """W, in float64."""
    forward: Float[Tensor, "victims places filters"]
    """s^-1(a') - b, with a' the layer's output: the right side of ``W a = forward``."""
    doubt: Float[Tensor, "victims places filters"]
    """Variance of each entry of `forward`."""
    d: Float[Tensor, "victims places filters"]
    """dL/dz of the layer."""
    gradient: Float[Tensor, "victims filters patch"]
    """G = dL/dW."""
    noise: Float[Tensor, "victims"]
    """Variance of an entry of `gradient`."""
    mean: Float[Tensor, "victims inputs"]
    """Prior mean of a: its value for a grey image."""
    precision: Float[Tensor, "inputs"]
    """1 / prior variance of each entry of a."""

    def plain(self) -> Equations:
        """These equations with all weights 1 and without the prior: plain least squares."""
        doubt, noise = torch.ones_like(self.doubt), torch.ones_like(self.noise)
        return dataclasses.replace(self, doubt=doubt, noise=noise, precision=torch.zeros_like(self.precision))

    def solve(self, variances: bool) -> tuple[Float[Tensor, "victims inputs"], Float[Tensor, "victims inputs"]]:
        """The a that is sought and, where asked, its variance, by the normal equations

        ``(K'K / noise + W' diag(1 / doubt) W + diag(precision)) (a - mean) = K' (...) / noise + W' (...) / doubt``.
        """
        seen = self.layer.gather(self.mean)
        # both right sides are taken relative to the prior mean
        forward = (self.forward - seen @ self.weight.transpose(1, 2)) / self.doubt
        gradient = (self.gradient - self.d.transpose(1, 2) @ seen) / self.noise[:, None, None]
        # K'(G - K mean) / noise + W'(forward - W mean) / doubt
        right = self.layer.scatter(forward @ self.weight + self.d @ gradient)
        # scaled to a unit diagonal before it is factored: the entries span many orders of magnitude
        matrix = self.normal_matrix()
        matrix.diagonal(dim1=1, dim2=2).add_(self.precision)
        scale = matrix.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
        matrix.mul_(scale[:, :, None]).mul_(scale[:, None, :])
        matrix.diagonal(dim1=1, dim2=2).add_(_JITTER)
        factor = torch.linalg.cholesky(matrix)
        del matrix
        a = self.mean + scale * torch.cholesky_solve((scale * right)[:, :, None], factor)[:, :, 0]
        if not variances:
            return a, torch.zeros_like(a)
        # the posterior covariance is the inverse of the normal matrix; its diagonal is kept
        return a, torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2) * scale.square()

    def normal_matrix(self) -> Float[Tensor, "victims inputs inputs"]:
        """``K'K / noise + W' diag(1 / doubt) W``."""
        return normal_matrix(self.layer, self.weight, 1 / self.doubt, self.d, 1 / self.noise)


def _all(network: LayerChain) -> Sequence[Layer]:
    return network.layers
