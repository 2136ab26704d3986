"""Image priors: penalties on candidate images, one value for each batch element, and a Gaussian of public images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fedtap.attackers.parts.teaching import free_memory
from fedtap.simulator.attack import Images
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Tensors
from fedtap.simulator.wire.replay import BatchStatistics, stateless

PerElement = Float[Tensor, "elements"]


def total_variation(images: Images) -> PerElement:
    """Mean absolute difference of neighbouring pixels, across plus down."""
    across = (images[..., :, 1:] - images[..., :, :-1]).abs()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs()
    return across.flatten(1).mean(1) + down.flatten(1).mean(1)


def smooth_variation(images: Images) -> PerElement:
    """`total_variation` with ``sqrt(d^2 + 1e-4)`` for ``|d|``, which is differentiable everywhere."""
    across = (images[..., :, 1:] - images[..., :, :-1]).square().add(1e-4).sqrt()
    down = (images[..., 1:, :] - images[..., :-1, :]).square().add(1e-4).sqrt()
    return across.flatten(1).mean(1) + down.flatten(1).mean(1)


def isotropic_variation(images: Images) -> PerElement:
    """Sum over an element's images of the l2 norms of their differences across, down and along both diagonals."""
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return torch.stack([_norms(difference) for difference in differences]).sum(0)


def shrinkage(trace: Tensor, square: Tensor, samples: int, size: int) -> Tensor:
    """How far, 0 to 1, a covariance S of few samples is best shrunk towards ``tr(S) / size`` times the identity.

    The oracle approximating estimator for a Gaussian: Chen, Wiesel, Eldar and Hero 2010,
    https://arxiv.org/abs/0907.4698, equation 23.

    Args:
        trace: tr S.
        square: tr S^2.
        size: rows of S.
    """
    n, p = samples, size
    # rho = ((1 - 2/p) tr S^2 + tr^2 S) / ((n + 1 - 2/p) (tr S^2 - tr^2 S / p))
    apart = ((n + 1 - 2 / p) * (square - trace**2 / p)).clamp_min(1e-300)
    return (((1 - 2 / p) * square + trace**2) / apart).clamp(0, 1)


class PublicImages(nn.Module):
    """A Gaussian of public images, by its mean and a root of its covariance.

    Raises:
        FedtapError: memory does not hold the covariance.
    """

    mean: Float[Tensor, "pixels"]
    root: Float[Tensor, "pixels pixels"]
    """L of the covariance ``L L'``, lower triangular."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        # the covariance in float64, its factor and the root
        if (needed := 24 * pixels**2) > (free := free_memory()):
            raise FedtapError(
                f"The covariance of images of {pixels:,} numbers takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
                "are free: use smaller images, --size."
            )
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("root", torch.zeros(pixels, pixels))

    def see(self, images: Float[Tensor, "images channel height width"]) -> None:
        """Take mean and covariance of these images, the covariance shrunk towards a multiple of the identity."""
        rows = images.flatten(1)
        n, p = rows.shape
        self.mean.copy_(rows.mean(0))
        covariance = torch.zeros_like(self.root, dtype=torch.float64)
        for some in torch.split(rows - self.mean, 4096):
            covariance += some.T @ some / n
        trace, square = covariance.diagonal().sum(), covariance.square().sum()
        share = shrinkage(trace, square, n, p)
        covariance *= 1 - share
        # a grey level of 255 is the least doubt that is left, where all images are the same
        covariance.diagonal().add_((share * trace / p).clamp_min(255.0**-2))
        self.root.copy_(torch.linalg.cholesky(covariance))

    def images(self, z: Float[Tensor, "elements numbers"]) -> Float[Tensor, "elements numbers"]:
        """``m + L z`` of each image of an element's batch: images of this Gaussian where z is white."""
        return (self.mean + z.reshape(-1, len(self.mean)) @ self.root.T).reshape(z.shape)


def length(images: Images) -> PerElement:
    """Sum over an element's images of their l2 norms."""
    return _norms(images)


def statistics_gap(network: nn.Module, weights: Tensors, buffers: Tensors, images: Tensor) -> Tensor:
    """How far one element's batch is from each BatchNorm's running mean and variance: a sum of l2 norms.

    Zero where the network has no BatchNorm with running statistics.
    """
    gaps = []

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        (hidden,), mean, variance = inputs, norm.running_mean, norm.running_var
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            # mean and variance over images and places, as BatchNorm takes them
            over = [0, *range(2, hidden.ndim)]
            gaps.append(_length(hidden.mean(over) - mean))
            gaps.append(_length(hidden.var(over, correction=0) - variance))

    silent = stateless(network)
    hooks = [
        module.register_forward_pre_hook(measure) for module in silent.modules() if isinstance(module, BatchStatistics)
    ]
    try:
        functional_call(silent, {**weights, **buffers}, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(gaps).sum() if gaps else images.new_zeros(())


def _norms(images: Tensor) -> PerElement:
    return (images.flatten(2).square().sum(2) + 1e-12).sqrt().sum(1)


def _length(vector: Tensor) -> Tensor:
    return (vector.square().sum() + 1e-12).sqrt()  # 1e-12 makes the norm differentiable at zero
