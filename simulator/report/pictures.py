"""Pictures of what came back: a strip as PNG, and a gallery for the page."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import as_file, files
from io import BytesIO
from typing import TypeAlias

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fedtap.simulator.report.columns import breakable, scrolled
from fedtap.simulator.report.outcomes import MEASURE
from fedtap.simulator.scores import LEVELS, mse, psnr

_Batch: TypeAlias = Float[Tensor, "batch channel height width"]

_SHOWN = 8
"""Victims in the strip, at most."""

_AT_ONCE = 2
"""Victims whose pictures the page shows at once; the others' are folded."""

_TILES = 9
"""Images of a batch that the page shows large; of more, the nearest to the originals and the farthest."""

_WIDE, _LEAST = 1170, 74
"""Of the page's table of pictures, in CSS pixels: up to which it grows with its columns, so that a screen of 1280 shows
all; and what a column has at least."""

CELL, GAP, CAPTION, MARGIN, TITLE = 192, 20, 64, 32, 150
"""Of the strip, in pixels: a picture's side, what is between two, below one, and around all; and a title's width."""

INK, PALE, ALARM, PAPER = "#1d2129", "#737a87", "#b3261e", "#ffffff"

ORIGINAL, _BLIND = "original", "blind guess"


@dataclass(frozen=True)
class Picture:
    """A victim's images, pixels in [0, 1]. `original` is None where the truth is not known."""

    title: str
    original: _Batch | None
    reconstructions: dict[str, tuple[_Batch, float | None]]
    """Attack's label -> its reconstruction, in the original's order, and PSNR in dB; of a batch, that of its mean
    squared error."""
    blind: Tensor | None
    """The blind guess: one image, or a batch."""
    levels: dict[str, Sequence[str]] = field(default_factory=dict)
    """Attack's label -> of each image of its reconstruction, one of scores.LEVELS."""

    def cell(self, column: str) -> tuple[_Batch | None, float | None]:
        """The images of this column, and their PSNR where there is one."""
        if column in self.reconstructions:
            return self.reconstructions[column]
        if column != _BLIND or self.blind is None:
            return self.original if column == ORIGINAL else None, None
        if self.original is None:
            return self.blind.reshape(-1, *self.blind.shape[-3:]), None
        blind = self.blind.expand_as(self.original)
        return blind, float(psnr(mse(blind.cpu(), self.original.cpu()).mean()))

    def leaked(self, column: str) -> bool:
        """Whether any of the column's images is recognisable."""
        return any(level != LEVELS[0] for level in self.levels.get(column, ()))

    def caption(self, column: str) -> list[str]:
        """What is shown, its level or of a batch how many images are recognisable, and the PSNR; where it is known."""
        found, (_, decibels) = self.levels.get(column, ()), self.cell(column)
        if decibels is None:
            return []
        many = f"{sum(level != LEVELS[0] for level in found)} of {len(found)} {MEASURE}"
        return [*([many] if len(found) > 1 else found), f"{decibels:.1f} dB"]

    def some(self) -> Picture:
        """Of a large batch the images that came back best, and the last of them worst; itself where it is small.

        The first attack with levels or a PSNR says which those are.
        """
        known = [found for found, decibels in self.reconstructions.values() if decibels is not None]
        if self.original is None or len(self.original) <= _TILES or not known:
            return self
        order = mse(known[0].cpu(), self.original.cpu()).argsort()
        chosen = torch.cat([order[: (_TILES + 1) // 2], order[-(_TILES // 2) :]])
        best, worst = (_TILES + 1) // 2, _TILES // 2
        return dataclasses.replace(
            self,
            title=f"{self.title}\nthe {best} best and {worst} worst of {len(order)}",
            original=self.original[chosen],
            reconstructions={
                name: (found[chosen], decibels) for name, (found, decibels) in self.reconstructions.items()
            },
            blind=self.blind[chosen] if self.blind is not None and self.blind.shape[0] == len(order) else self.blind,
        )


def columns_of(pictures: Sequence[Picture]) -> list[str]:
    """`original` where one is known, every attack's label, `blind guess` where there is one."""
    attacks = list(dict.fromkeys(label for picture in pictures for label in picture.reconstructions))
    original = [ORIGINAL] * any(picture.original is not None for picture in pictures)
    return original + attacks + [_BLIND] * any(picture.blind is not None for picture in pictures)


def gallery(pictures: Sequence[Picture], blind: str = "public images") -> str:
    """Each victim's pictures side by side, the first victims' at once, as an element of the page; empty where there are
    none.

    Args:
        blind: what the blind guess is made from.
    """
    if not pictures:
        return ""
    columns = columns_of(pictures)
    said = (
        "<p class='pale'>Below each reconstruction stands what it shows, and its PSNR (of a batch: that of its mean "
        "squared error). The slider lays the original over it from the left. The blind guess is made without any leak, "
        f"from {escape(blind)}.</p>"
    ) * any(picture.original is not None for picture in pictures)
    more = pictures[_AT_ONCE:]
    folded = f"<details><summary>{len(more)} more</summary>{_rows_of(more, columns)}</details>" if more else ""
    cut = [picture for picture in pictures if picture.some() is not picture]
    if cut:
        folded += f"<details><summary>All images of these batches</summary>{_rows_of(cut, columns, False)}</details>"
    return f"<h2>Pictures</h2>{_rows_of(pictures[:_AT_ONCE], columns)}{folded}{said}"


def _rows_of(pictures: Sequence[Picture], columns: Sequence[str], large: bool = True) -> str:
    """A table of pictures with a row for each victim.

    Args:
        large: whether of a large batch some images are shown, and not all.
    """
    head = "<td></td>" + "".join(f"<th scope='col'>{breakable(column)}</th>" for column in columns)
    body = ""
    for whole in pictures:
        picture = whole.some() if large else whole
        body += f"<tr><th scope='row'>{escape(picture.title)}</th>"
        for column in columns:
            images, _ = picture.cell(column)
            shown = picture_html(images, f"{column}, {picture.title}") if images is not None else "–"
            if column in picture.reconstructions and picture.original is not None:
                over = picture_html(picture.original, "")
                shown = f"<span class='slides'>{shown}{over}</span>"
            caption = escape(", ".join(whole.caption(column)))
            many = " class='many'" * (images is not None and len(images) > 1)
            body += f"<td{many}>{shown}<span class='{'leak' if whole.leaked(column) else 'pale'}'>{caption}</span></td>"
        body += "</tr>"
    wanted = 110 * (len(columns) + 1) if large else 120 + 250 * len(columns)
    width = f"style='min-width: {max(min(wanted, _WIDE), _LEAST * (len(columns) + 1))}px'"
    return scrolled(
        f"<table class='pictures{'' if large else ' whole'}' {width}><caption>A row for each victim</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        f"Pictures of {len(pictures)} victims",
        "max-height: none",
    )


def picture_html(images: _Batch, words: str) -> str:
    """A batch as one picture within the page.

    Args:
        words: what it shows, for who cannot see it.
    """
    picture = _grid(images)
    kind = "pixels" if max(picture.size) <= 144 else ""
    content = base64.b64encode(_bytes(picture)).decode()
    return f"<img class='{kind}' alt='{escape(words)}' src='data:image/png;base64,{content}'>"


def strip(pictures: Sequence[Picture]) -> bytes:
    """A PNG with a row for each victim, SHOWN at most: original, captioned reconstructions, blind guess."""
    pictures = pictures[:_SHOWN]
    columns = columns_of(pictures)
    bold, usual = font(18, bold=True), font(16)
    headings = [_wrapped(column, bold, CELL) for column in columns]
    head = 24 * max(map(len, headings), default=1) + 12
    shown = [
        [None if (images := picture.cell(column)[0]) is None else enlarged(images) for column in columns]
        for picture in pictures
    ]
    tall = [max((image.height for image in row if image), default=CELL) for row in shown]
    left = MARGIN + TITLE * any(picture.title for picture in pictures)
    width = max(left + len(columns) * (CELL + GAP) - GAP, MARGIN) + MARGIN
    page = Image.new("RGB", (width, 2 * MARGIN + head + sum(tall) + len(tall) * CAPTION), PAPER)
    draw = ImageDraw.Draw(page)
    centres = [left + number * (CELL + GAP) + CELL // 2 for number in range(len(columns))]
    for x, lines in zip(centres, headings, strict=True):
        draw.multiline_text((x, MARGIN), "\n".join(lines), INK, bold, "ma", spacing=4, align="center")
    y = MARGIN + head
    for picture, height, row in zip(pictures, tall, shown, strict=True):
        title = "\n".join(_wrapped(picture.title, usual, TITLE - GAP))
        draw.multiline_text((MARGIN, y + height // 2), title, PALE, usual, "lm", spacing=4)
        for x, column, image in zip(centres, columns, row, strict=True):
            if image is not None:
                page.paste(image, (x - image.width // 2, y), image)
            said, colour = "\n".join(picture.caption(column)), ALARM if picture.leaked(column) else PALE
            draw.multiline_text((x, y + height + 6), said, colour, usual, "ma", spacing=4, align="center")
        y += height + CAPTION
    return _bytes(page)


def png(images: _Batch) -> bytes:
    """A batch of images as one picture, pixel by pixel."""
    return _bytes(_grid(images))


def _grid(images: _Batch) -> Image.Image:
    """A batch as one picture, as square as it goes, its images a transparent pixel apart."""
    pixels = images.detach().cpu().float().nan_to_num(0.0).clamp(0, 1)
    if pixels.shape[1] != 3:
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    tiles = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    count, height, width, _ = tiles.shape
    across = math.ceil(math.sqrt(count))
    sheet = Image.new("RGBA", (across * (width + 1) - 1, math.ceil(count / across) * (height + 1) - 1))
    for number, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (number % across * (width + 1), number // across * (height + 1)))
    return sheet


def enlarged(images: _Batch) -> Image.Image:
    """The batch as one picture, CELL pixels at its longer side.

    Small images keep crisp pixels: they are enlarged further, and then averaged.
    """
    picture = _grid(images)
    larger = CELL / max(picture.size)
    size = (max(1, round(picture.width * larger)), max(1, round(picture.height * larger)))
    whole = 4 * math.ceil(larger) if larger > 1 else 1
    picture = picture.resize((picture.width * whole, picture.height * whole), Image.Resampling.NEAREST)
    return picture.resize(size, Image.Resampling.BOX)


def _bytes(picture: Image.Image) -> bytes:
    content = BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans out of matplotlib: it has the letters of every name that a model or attack may carry."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    with as_file(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / name) as path:
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken where words end (also at _ and capitals); three at most."""
    lines: list[str] = []
    for line in text.splitlines():
        lines.append("")
        for word in re.findall(r"[A-Z]*[^A-Z\s_(),]*[\s_(),]*", line):
            if lines[-1] and font.getlength((lines[-1] + word).strip()) > width:
                lines.append("")
            lines[-1] += word
    kept = [line.strip() for line in lines[:3]]
    return [*kept[:-1], kept[-1] + " …"] if len(lines) > 3 else kept
