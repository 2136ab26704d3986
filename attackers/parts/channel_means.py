"""A ridge regression from what convolutions before a norm tell of their inputs, whatever their error signals are.

A part without a paper. With d the error signal at the norm's output, the gradient of the norm's bias and row c of the
convolution's are both linear in channel c of it,

    beta_c = sum_p d_c(p)        G_c = s_c sum_p d_c(p) a(p + k)

up to what training mode subtracts. So G_c / beta_c is the mean of the input a, weighted by the error signal, as the row
G'd / |d|^2 of a linear layer is its input. It no longer depends on the label, nor on how sure the network was. The last
convolutions have error signals of nearly one sign in each channel; there the mean is one of positive weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fedtap.attackers.parts.teaching import FeatureHashing
from fedtap.simulator.attack import generator

_LONGEST = 16384
"""Numbers to which all means together are hashed."""

_FAINTEST = 0.03
"""Added to a channel's share of beta's length, by which its row is divided."""

_OUTLIER = 3.0
"""Standard deviations at which a mean is cut: a quotient has a long tail."""

_MEAN_RIDGES = tuple(10.0**power for power in (-3, -2.5, -2, -1.5, -1, -0.5, 0, 1))
"""Candidate ridges, in units of the Gram matrix's mean diagonal."""

_AT_ONCE = 256
"""Victims whose means are computed at once: they are as large as their gradients."""

_Gradients = Mapping[str, Tensor]


class ChannelMeans(nn.Module):
    """From gradients, and features that are known of each image besides, to images.

    Args:
        layers: of each convolution the name of its weight, that of the norm's bias, and the weight's shape.
        features: number of the other features.
        pixels: of an image.
    """

    slope: Tensor
    offset: Tensor
    used: Tensor

    def __init__(self, layers: Sequence[tuple[str, str, tuple[int, ...]]], features: int, pixels: int) -> None:
        super().__init__()
        self.layers, self.length = list(layers), _LONGEST
        sizes = [(shape[0], math.prod(shape[1:])) for _, _, shape in layers]
        for number, (channels, entries) in enumerate(sizes):
            self.register_buffer(f"mean{number}", torch.zeros(channels, entries))
            self.register_buffer(f"size{number}", torch.ones(channels, entries))
        draw, total = generator("channel means"), sum(channels * entries for channels, entries in sizes)
        self.hashing = FeatureHashing(total, self.length, draw)
        self.register_buffer("slope", torch.zeros(self.length + features, pixels))
        self.register_buffer("offset", torch.zeros(pixels))
        self.register_buffer("used", torch.tensor(0.0))

    def forward(self, gradients: _Gradients, features: Tensor, otherwise: Tensor) -> Float[Tensor, "victims pixels"]:
        """The images; `otherwise`, where those were closer on auxiliary pairs."""
        return self.read(gradients, features) @ self.slope + self.offset if bool(self.used) else otherwise

    def read(self, gradients: _Gradients, features: Tensor) -> Float[Tensor, "victims numbers"]:
        """The hashed means beside the features; both have a mean square length of about one."""
        rows = []
        for some in torch.arange(len(features)).split(_AT_ONCE):  # type: ignore[no-untyped-call]
            parts = []
            for number, (weight, bias, _) in enumerate(self.layers):
                row, share = self._shares(gradients[weight][some], gradients[bias][some])
                rest = self._rest(row, share, number) / self.get_buffer(f"size{number}")
                parts.append((rest.clamp(-_OUTLIER, _OUTLIER) * share.abs()[:, :, None]).flatten(1))
            means = torch.cat(parts, 1) / len(parts) ** 0.5
            rows.append(torch.cat([self.hashing(means) / self._entries, features[some] / features.shape[1] ** 0.5], 1))
        return torch.cat(rows)

    @property
    def _entries(self) -> float:
        # the squared shares of a layer's channels sum to one, so its means have the length sqrt(entries of a row)
        entries = [math.prod(shape[1:]) for _, _, shape in self.layers]
        return math.sqrt(sum(entries) / len(entries))

    @staticmethod
    def _shares(gradient: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's rows, `victims channels entries`, and beta, both over the length of beta."""
        unit = beta.norm(dim=1, keepdim=True).clamp_min(1e-20)
        return gradient.flatten(2) / unit[:, :, None], beta / unit

    def _rest(self, row: Tensor, share: Tensor, number: int) -> Tensor:
        """The weighted mean of each row's inputs, less what it is over all pairs."""
        rest = (row - share[:, :, None] * self.get_buffer(f"mean{number}")) * share.sign()[:, :, None]
        return rest / (share.abs() + _FAINTEST)[:, :, None]

    @torch.no_grad()
    def fit(
        self,
        gradients: _Gradients,
        features: Tensor,
        images: Float[Tensor, "pairs pixels"],
        folds: Int[Tensor, " pairs"],
        otherwise: Tensor,
    ) -> Float[Tensor, "pairs pixels"]:
        """Fit the regression on pairs, to be used where it is closer than the estimates `otherwise`.

        Args:
            otherwise: estimates that have not seen the pair's own fold, `pairs pixels`.

        Returns:
            The closer ones: each by a regression that did not see its fold, or `otherwise`.
        """
        for number, (weight, bias, _) in enumerate(self.layers):
            row, share = self._shares(gradients[weight], gradients[bias])
            # least squares of row = share * mean
            mean = torch.einsum("nce,nc->ce", row, share) / share.square().sum(0).clamp_min(1e-12)[:, None]
            self.get_buffer(f"mean{number}").copy_(mean)
            size = self._rest(row, share, number).square().mean(0).sqrt()
            self.get_buffer(f"size{number}").copy_(size.clamp_min(1e-12))
        seen = self.read(gradients, features)
        self.offset.copy_(images.mean(0))
        wanted = (images - self.offset).double()
        gram = (seen @ seen.T).double()
        unit = gram.diagonal().mean().clamp_min(1e-30)

        def dual(ridge: float, kept: Tensor) -> Tensor:
            ridged = gram[kept][:, kept] + ridge * unit * torch.eye(int(kept.sum())).to(gram)
            solved: Tensor = torch.linalg.solve(ridged, wanted[kept])
            return solved

        def without(fold: int, ridge: float) -> Tensor:
            others = folds != fold
            return gram[~others][:, others] @ dual(ridge, others)

        def error(ridge: float) -> float:
            return F.mse_loss(without(0, ridge), wanted[folds == 0]).item()

        best = min(_MEAN_RIDGES, key=error)
        found = torch.empty_like(images)
        for fold in set(folds.tolist()):
            found[folds == fold] = without(fold, best).to(images) + self.offset
        if F.mse_loss(found, images) >= F.mse_loss(otherwise, images):
            return otherwise
        self.used.fill_(1.0)
        # slope = X' (X X' + r I)^-1 Y
        self.slope.copy_(seen.T @ dual(best, torch.ones_like(folds, dtype=torch.bool)).to(seen))
        return found
