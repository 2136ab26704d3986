"""A small U-Net that leads from an image's estimate to the mean of the images that could be behind it.

After Ronneberger, Fischer and Brox 2015 (U-Net), https://arxiv.org/abs/1505.04597, with a residual connection from
input to output as in DnCNN (Zhang et al. 2017), https://arxiv.org/abs/1608.03981.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_MULTIPLE = 4
"""Sides are padded to a multiple of this: halved once on entry, once more on the way down."""


class ImageDenoiser(nn.Module):
    """A correction of each image, zero at first, that depends on the image and on numbers told of it.

    Args:
        shape: channel, height and width of an image.
        told: how many numbers are told of each.
        width: channels at half the resolution; at a quarter there are twice as many.
    """

    def __init__(self, shape: tuple[int, ...], told: int, width: int) -> None:
        super().__init__()
        self.shape = shape
        corners = 4 * shape[0]  # channels of half the resolution, in which each place has four pixels
        self.enter = nn.Conv2d(corners, width, 3, padding=1)
        self.tell = nn.Linear(told, width)
        self.before, self.after = _Residual(width), _Residual(width)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.coarse = nn.Sequential(_Residual(2 * width), _Residual(2 * width), _Residual(2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Conv2d(width, corners, 3, padding=1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def forward(self, rows: Float[Tensor, "images numbers"]) -> Float[Tensor, "images 1 pixels"]:
        """The corrected pixels, from rows of an image's pixels and of what is told of it."""
        pixels, told = rows[:, : -self.tell.in_features], rows[:, -self.tell.in_features :]
        images = pixels.reshape(-1, *self.shape)
        high, wide = self.shape[1:]
        framed = F.pad(images, (0, -wide % _MULTIPLE, 0, -high % _MULTIPLE), mode="replicate")
        # pixels are around 0.5
        hidden = self.enter(F.pixel_unshuffle(framed - 0.5, 2)) + self.tell(told)[:, :, None, None]
        hidden = self.before(hidden)
        hidden = self.after(hidden + self.up(self.coarse(self.down(hidden))))
        correction = F.pixel_shuffle(self.leave(F.silu(hidden)), 2)[..., :high, :wide]
        return (images + correction).flatten(1)[:, None]


class _Residual(nn.Module):
    """``x + conv(silu(conv(silu(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(F.silu(self.first(F.silu(hidden))))  # type: ignore[no-any-return]
