"""An attack's film, for people: an animated GIF with the original on one side and the objective on the other."""

from __future__ import annotations

import base64
import math
from html import escape
from io import BytesIO

from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from fedtap.simulator.film import Film
from fedtap.simulator.report.charts import Panel, Series, chart, unzipped
from fedtap.simulator.report.pictures import ALARM, CELL, GAP, INK, PALE, PAPER, enlarged, font
from fedtap.simulator.scores import match, mse, psnr

_SECONDS, _LAST_SECONDS, _LINE = 0.12, 3.0, 28
"""How long a frame is shown, and the last one; the height of the line below it, in pixels."""


def gif(film: Film, truth: Float[Tensor, "batch channel height width"] | None) -> bytes:
    """The film as an animated GIF: the original on the left where it is known, the step below, and on the right the
    objective with a mark at the frame's step.

    Args:
        truth: the original; its images are put in the order of the last frame's.
    """
    original = None
    if truth is not None:
        order = match(film.frames[-1], truth)  # of each original the image that came back for it
        truth = truth[order.argsort()]
        original = enlarged(truth)
    sheets, places = [], _places(film)
    scale = ", logarithmic" * all(film.objectives[number] > 0 for number in places)
    for number, (frame, step) in enumerate(zip(film.frames, film.steps, strict=True)):
        picture = enlarged(frame)
        left = 0 if original is None else original.width + GAP
        right = left + picture.width + GAP
        sheet = Image.new("RGB", (right + CELL if places else right - GAP, picture.height + _LINE), PAPER)
        if original is not None:
            sheet.paste(original, (0, 0), original)
        sheet.paste(picture, (left, 0), picture)
        said = f"step {step}"
        if truth is not None:
            said += f", {float(psnr(mse(frame, truth).mean())):.1f} dB"
        draw = ImageDraw.Draw(sheet)
        draw.text((left, picture.height + 6), said, INK, font(14))
        if places:
            points = {at: (right + x * CELL, 24 + y * (picture.height - 32)) for at, (x, y) in places.items()}
            draw.line([(right, 0), (right, picture.height), (right + CELL, picture.height)], PALE)
            draw.line([*points.values()], INK, 2)
            if number in points:
                x, y = points[number]
                draw.ellipse((x - 5, y - 5, x + 5, y + 5), ALARM)
            draw.text((right + CELL, 2), f"to step {film.steps[-1]}{scale}", PALE, font(12), "ra")
            draw.text((right, picture.height + 6), f"objective {film.objectives[number]:.2g}", INK, font(14))
        sheets.append(sheet.quantize(128))
    content, times = BytesIO(), [1000 * _SECONDS] * (len(sheets) - 1) + [1000 * _LAST_SECONDS]
    sheets[0].save(content, "GIF", save_all=True, append_images=sheets[1:], duration=times, loop=0)
    return content.getvalue()


def _places(film: Film) -> dict[int, tuple[float, float]]:
    """Frame -> where its objective is drawn, from the left and from the top as shares; of logarithms where they have
    one. Nothing where fewer than two are finite."""
    known = {number: value for number, value in enumerate(film.objectives) if math.isfinite(value)}
    if len(known) < 2:
        return {}
    if min(known.values()) > 0:
        known = {number: math.log(value) for number, value in known.items()}
    high, last = max(known.values()), film.steps[-1]
    span = high - min(known.values()) or 1.0
    return {number: (0.95 * film.steps[number] / last, (high - value) / span) for number, value in known.items()}


def film_html(content: bytes, attack: str, film: Film | None) -> str:
    """The film as an element of the page, with the falling objective where the film was made in this run."""
    words = f"{attack}: the first victim on the way"
    url = base64.b64encode(content).decode()
    shown = f"<img style='max-width: 100%' alt='{escape(words)}' src='data:image/gif;base64,{url}'>"
    taken = [] if film is None else zip(film.steps, film.objectives, strict=True)
    known = [(float(step), value) for step, value in taken if math.isfinite(value)]
    if len(known) < 2:
        return shown
    steps, values = unzipped(known)
    panel = Panel("step", "objective", [Series("objective", steps, values, kind="smooth")], log=min(values) > 0)
    figure = chart([panel], f"{attack}: the objective at each frame")
    return f"{shown}<details><summary>The objective, to be read and kept</summary>{figure}</details>"
