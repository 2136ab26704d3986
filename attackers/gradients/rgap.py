"""R-GAP: invert the network from its output to its input, each layer by plain least squares in closed form.

Zhu and Blaschko 2021, https://arxiv.org/abs/2010.07733. With z = W a + b, d = dL/dz and the layer above marked ', a
layer's input a obeys

    W a    = s^-1(a') - b      forward, from the layer above
    K(d) a = G = dL/dW         the gradient: G = d a^T, for a convolution summed over its places
    d      = W'^T d' * s'(z)   and so on down

and the pseudo-inverse solves both together, with equal weights and no model of the noise. A linear layer's input is
read off the gradient's equations alone, as in the authors' code (which averages the rows of G / d).
Departs from the paper in four ways: it has one logit, of which ``<G, W> = z dL/dz`` gives z (twice, where the image is
classified rightly), and here there is a logit for each class, which `_logit_gradients` finds; it has no biases, and
here they are subtracted, and the last one's gradient is d where it is trained; zeros of the padding are left out, not
solved for; and the normal equations are solved in float64, with a trace of ridge that loses what is seen a million
times more weakly than the rest, where the authors' code factors the stacked matrix.
At a convolution these are the equations of ``exact_git(weighted=False)``, so on convolutions below one linear layer
with a bias (lenet) the two are one attack. They differ where the last bias is missing, at linear layers further down,
and in what the equations leave open, which is shortest here and nearest to grey there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.attackers.gradients.recursion import check_undoable, gradients_below, linear_input, normal_matrix, undone
from fedtap.attackers.parts.labels import recovered
from fedtap.attackers.parts.layers import Layer, LayerChain, chain
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Leak
from fedtap.simulator.wire.replay import trained

RIDGE = 1e-13
"""Share of the normal matrix's size that is added to its diagonal, so that rounding leaves it positive."""


@dataclass(frozen=True)
class RGAP(Attack):
    """The recursion from logits to pixels, unweighted and without a prior; one image a victim, weights known."""

    leaks = (GradientLeak,)

    def accepts(self, leak: Leak) -> None:
        """One image a victim, and a chain of layers whose activations have an inverse."""
        super().accepts(leak)
        check_undoable(self, leak, _solved)
        biased = chain(leak).layers[-1].bias in trained(leak.network)
        if leak.protocol.loss != "cross_entropy" and not biased:
            raise FedtapError(
                f"rgap tells the logits of a last layer without a bias by the softmax of cross-entropy, and this "
                f"client's loss is {leak.protocol.loss}: use idlg, which replays it."
            )
        if leak.protocol.classes < 3 and not biased:
            raise FedtapError(
                f"rgap tells the logits by the ratios of the classes that are not the label, and model "
                f"{leak.protocol.model!r} has {leak.protocol.classes} classes and no bias in its last layer that is "
                "trained: use idlg, which does without."
            )

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        return undone(leak, _solved, _fed)


def _solved(network: LayerChain) -> Sequence[Layer]:
    """The convolutions: a linear layer's input is read off its gradient."""
    return [layer for layer in network.layers if not layer.linear]


def _fed(leak: Leak, network: LayerChain) -> Float[Tensor, "victims pixels"]:
    """Input of the first layer: from the last layer down, `a` is a layer's input and `d` is dL/dz of its output."""
    layers = network.layers
    gradients = [leak.observed[layer.weight].double().flatten(2) for layer in layers]
    tensors = [layer.parameters(leak.weights or {}, len(leak), leak.stacked) for layer in layers]
    if layers[-1].bias in trained(leak.network):
        d = leak.observed[str(layers[-1].bias)].double()
    else:
        d = _logit_gradients(gradients[-1], *tensors[-1], recovered(leak)[:, 0])
    a, d = linear_input(gradients[-1], d), d[:, None]
    for which in range(len(layers) - 2, -1, -1):
        layer, s, (weight, bias) = layers[which], layers[which].activation, tensors[which]
        a = s.inside(a)
        d = layer.by_place(gradients_below(layers[which + 1], tensors[which + 1][0], d, s.derivative(a)))
        if layer.linear:
            a = linear_input(gradients[which], d[:, 0])
        else:
            a = solve(layer, weight, layer.by_place(s.inverse(a)) - bias[:, None], d, gradients[which])
    return a


def _logit_gradients(
    gradient: Float[Tensor, "victims classes inputs"],
    weight: Float[Tensor, "victims classes inputs"],
    bias: Float[Tensor, "victims classes"],
    labels: Tensor,
) -> Float[Tensor, "victims classes"]:
    """d = softmax(z) - onehot of the last layer, from its weight's gradient alone.

    G = d a^T leaves open how long a is. The label's row points against it, so with e = a / |a|, ``G e = |a| d`` and
    ``u = W e`` are known. As d is the softmax for the other classes, ``log (G e) = |a| u + b + const`` for these:
    |a| is the gradient of a regression line, in which each class weighs by the precision of its logarithm.
    """
    rows = torch.arange(len(gradient), device=gradient.device)
    e = torch.nn.functional.normalize(-gradient[rows, labels], dim=1, eps=1e-150)
    long, u = torch.einsum("vci,vi->vc", gradient, e), torch.einsum("vci,vi->vc", weight, e)
    # log (G e)_c has the standard error noise / (G e)_c, so weights are (G e)_c^2, and 0 for the label
    worth = long.clamp_min(0).square().index_put((rows, labels), long.new_zeros(()))
    worth = worth / worth.sum(1, keepdim=True).clamp_min(1e-300)
    # weighted least squares of log (G e) - b on u, with an intercept
    u = u - (worth * u).sum(1, keepdim=True)
    length = (worth * u * (long.clamp_min(1e-150).log() - bias)).sum(1) / (worth * u.square()).sum(1).clamp_min(1e-300)
    # d = G e / |a|
    return long / length.clamp_min(1e-9)[:, None]


def solve(
    layer: Layer,
    weight: Float[Tensor, "victims filters patch"],
    forward: Float[Tensor, "victims places filters"],
    d: Float[Tensor, "victims places filters"],
    gradient: Float[Tensor, "victims filters patch"],
) -> Float[Tensor, "victims inputs"]:
    """The a of lowest ``|W a - forward|^2 + |K(d) a - gradient|^2``, and the shortest of these.

    By ``(W'W + K'K) a = W' forward + K' gradient``.
    """
    # W'forward + K'G
    right = layer.scatter(forward @ weight + d @ gradient)
    matrix = normal_matrix(layer, weight, torch.ones_like(d), d, torch.ones_like(d[:, 0, 0]))
    size = matrix.abs().sum(2).amax(1)
    matrix.diagonal(dim1=1, dim2=2).add_(RIDGE * size.clamp_min(1e-300)[:, None])
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
