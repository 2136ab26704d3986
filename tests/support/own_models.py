"""Small models as people write them, each `function(shape, classes)` on images, by what is unusual about it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


class Rows(nn.Module):
    """Classifies the mean of what becomes of an image's rows."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(shape[0] * shape[2], WIDTH), nn.Linear(WIDTH, classes)
        self.made()

    def made(self) -> None:
        """Further layers."""

    def mixed(self, rows: Tensor) -> Tensor:
        """What becomes of them."""
        return torch.tanh(rows)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mixed(self.into(images.permute(0, 2, 1, 3).flatten(2))).mean(1))  # type: ignore[no-any-return]


class FusedAttention(Rows):
    def mixed(self, rows: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rows[:, None], rows[:, None], rows[:, None])[:, 0]


class MultiHead(Rows):
    def made(self) -> None:
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def mixed(self, rows: Tensor) -> Tensor:
        return self.attention(rows, rows, rows, need_weights=False)[0]  # type: ignore[no-any-return]


class Encoder(Rows):
    def made(self) -> None:
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)

    def mixed(self, rows: Tensor) -> Tensor:
        return self.block(rows)  # type: ignore[no-any-return]


class Tied(Rows):
    def made(self) -> None:
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight

    def mixed(self, rows: Tensor) -> Tensor:
        return torch.tanh(self.other(torch.tanh(self.one(rows))))


class InPlace(Rows):
    def made(self) -> None:
        self.layers = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))

    def mixed(self, rows: Tensor) -> Tensor:
        return self.layers(rows)  # type: ignore[no-any-return]


class InPlaceByHand(Rows):
    def mixed(self, rows: Tensor) -> Tensor:
        return F.relu_(rows)


class Unused(Rows):
    def made(self) -> None:
        self.unused = nn.Linear(WIDTH, WIDTH)


class Recurrent(Rows):
    def made(self) -> None:
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def mixed(self, rows: Tensor) -> Tensor:
        return self.lstm(rows)[0]  # type: ignore[no-any-return]


class Gated(Rows):
    def made(self) -> None:
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def mixed(self, rows: Tensor) -> Tensor:
        return self.gru(rows)[0]  # type: ignore[no-any-return]


class Spectral(Rows):
    def made(self) -> None:
        self.bounded = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def mixed(self, rows: Tensor) -> Tensor:
        return torch.tanh(self.bounded(rows))


class Positions(Rows):
    def made(self) -> None:
        self.place = nn.Embedding(64, WIDTH)
        self.places: Tensor
        self.register_buffer("places", torch.arange(8))

    def mixed(self, rows: Tensor) -> Tensor:
        return torch.tanh(rows + self.place(self.places))  # type: ignore[no-any-return]


class Probabilities(Rows):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(1)


class Fixed(nn.Sequential):
    """Of one size alone: it takes no arguments."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8))


def private(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The attention that Opacus's fixer makes."""
    from opacus.validators import ModuleValidator

    return ModuleValidator.fix(MultiHead(shape, classes))  # type: ignore[no-any-return]
