"""The image of a vision transformer, read in closed form from the gradients of its patch embedding and its positions.

Lu et al. 2022 (APRIL), https://arxiv.org/abs/2112.14087. Tokens are ``z_t = W x_t + b + p_t``, so at batch 1 the
gradient of the learned position p_t is the token's own error signal d_t = dL/dz_t, and that of the embedding is

    G = sum_t d_t x_t'

It is linear in the patches x_t: each entry of a patch has an equation for each feature of a token, and an unknown for
each token. No weight is needed. Departs from the paper, which goes on into the attention block with known weights: the
solution is the nearest to an estimate of the image, as far as the gradient's noise demands, and how far that is, is
chosen on auxiliary pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_RIDGES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""Candidates for the pull towards the estimate, in units of the error signals' mean square."""


class PatchSolution(nn.Module):
    """Replaces an estimate of the images by the one that explains the embedding's gradient, where that is closer.

    Args:
        weight: name of the embedding's weight, of a convolution whose stride is its kernel.
        position: name of the learned positions, added to the tokens.
        side: rows and columns of a patch.
        shape: of an image.
    """

    scale: Tensor
    shift: Tensor
    ridge: Tensor

    def __init__(self, weight: str, position: str, side: tuple[int, int], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.position, self.side, self.shape = weight, position, side, shape
        # the network may normalise pixels: a patch's entry is scale * pixel + shift, by channel
        self.register_buffer("scale", torch.ones(shape[0]))
        self.register_buffer("shift", torch.zeros(shape[0]))
        self.register_buffer("ridge", torch.tensor(torch.inf))  # infinite: the estimate stays as it is

    def forward(self, gradients: Mapping[str, Tensor], images: Float[Tensor, "victims pixels"]) -> Tensor:
        """The images that explain the gradient, nearest to these."""
        if not bool(self.ridge.isfinite()):
            return images
        errors, gradient = self._read(gradients)
        entries = self.side[0] * self.side[1]
        scale, shift = (each.double().repeat_interleave(entries) for each in (self.scale, self.shift))
        near = self._patches(images) * scale + shift
        # x = near + D (D'D + r I)^-1 (G - D' near), with the tokens' error signals as the rows of D
        unit = errors.square().mean((1, 2), keepdim=True).clamp_min(1e-30)
        gram = errors @ errors.mT + self.ridge.double() * unit * torch.eye(errors.shape[1]).to(errors)
        step = torch.linalg.solve(gram, errors @ (gradient - errors.mT @ near))
        folded = F.fold(((near + step - shift) / scale).mT, self.shape[1:], self.side, stride=self.side)
        return folded.flatten(1).to(images)

    @torch.no_grad()
    def fit(self, gradients: Mapping[str, Tensor], images: Tensor, starts: Tensor) -> None:
        """Fit how pixels are normalised, and choose the ridge whose images are closest.

        Args:
            images: the true ones, `pairs pixels`.
            starts: estimates that have not seen these images, `pairs pixels`.
        """
        errors, gradient = self._read(gradients)
        patches, entries = self._patches(images), self.side[0] * self.side[1]
        for channel in range(self.shape[0]):
            mine = slice(channel * entries, (channel + 1) * entries)
            # G = D' (scale x + shift): two unknowns, over all pairs
            seen, one = errors.mT @ patches[..., mine], errors.sum(1)[..., None].expand(-1, -1, entries)
            given = torch.stack([seen.flatten(), one.flatten()], 1)
            normal = given.T @ given
            normal.diagonal().add_(1e-12 * normal.diagonal().mean() + 1e-30)  # regular where no error signal arrives
            found = torch.linalg.solve(normal, given.T @ gradient[..., mine].flatten())
            self.scale[channel], self.shift[channel] = found
        tried = {torch.inf: F.mse_loss(starts, images)}
        for ridge in _RIDGES if bool((self.scale.abs() > 1e-6).all()) else ():
            self.ridge.fill_(ridge)
            tried[ridge] = F.mse_loss(self(gradients, starts).clamp(0, 1), images)
        self.ridge.fill_(min(tried, key=lambda ridge: float(tried[ridge].nan_to_num(torch.inf))))

    def _read(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The tokens' error signals, `victims tokens features`, and G, `victims features entries`, in float64."""
        errors, gradient = gradients[self.position].squeeze(1), gradients[self.weight].flatten(2)
        return errors.double(), gradient.double()

    def _patches(self, images: Tensor) -> Tensor:
        return F.unfold(images.reshape(-1, *self.shape), self.side, stride=self.side).mT.double()
