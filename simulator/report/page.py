"""What a run leaves for people: the terminal's table, a strip of pictures, and one self-contained page.

A row is what one attack made of one victim: settings, scores (None where there is none), and an error in words.
"""

from __future__ import annotations

import base64
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import as_file, files
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from rich.markup import escape as plain
from rich.table import Table
from torch import Tensor

from fedtap.simulator.files import write_atomically
from fedtap.simulator.report import defence_report, privacy_report
from fedtap.simulator.report.curves import Curve, svg
from fedtap.simulator.report.outcomes import MEASURE, Outcome, median, outcome, psnrs, ranged
from fedtap.simulator.scores import LEVELLED, LEVELS, mse, psnr
from fedtap.simulator.wire.soundness import CAUSES, EXPLAINED

Row: TypeAlias = Mapping[str, Any]
Batch: TypeAlias = Float[Tensor, "batch channel height width"]

SCORES = ("mse", "psnr", "ssim", "lpips", "label_correct", "recovered", "psnr_blind", "seconds", "objective", "error")
"""What comes out of a row's exchange."""

IMAGES = ("psnr_images", "psnr_blind_images", "levels", "recognisable", "identical")
"""Likewise, image by image."""

DOUBTS = ("unexplained", "doubts")
"""What speaks against a row: the share of the gradient that its guess does not explain, and words."""

NOTES = ("ssim_note", "lpips_note")
"""Why a score is empty."""

PROMISED = ("delta", "protects", "adjacency", "sensitivity", "epsilon_all", "epsilon_note", "releases", "not_covered")
"""What a defence guarantees: it follows from the knobs."""

SUCCESS = ("success", "success_low", "success_high", "success_db", "bound")

KNOWING = ("adaptive", "adaptive_note", "strongest", "upper_bound_psnr", "overhead", "held_out", "accuracy_lost")
"""Of attackers that know the defence, and of what it costs."""

ASIDE = (
    *("accuracy", "drift_norm", "labels", "settings", "unit", "fit_seconds"),
    *(*IMAGES, *DOUBTS, *NOTES, *PROMISED, *SUCCESS, *KNOWING),
)
"""What else a row may hold that is not a knob."""

SOUND = ("unexplained", "doubts")
"""Whether the leak was read as it was meant."""

WHO = ("scenario", "attack", "client", "round", "seed")
"""Whose row it is; seeds are repetitions, so they are summarised over."""

FAILURES = 3
"""Reasons given under the table, at most."""

SHOWN = 8
"""Victims in the strip, at most."""


@dataclass(frozen=True)
class Picture:
    """A victim's images, pixels in [0, 1]. `original` is None where the truth is not known."""

    title: str
    original: Batch | None
    guesses: dict[str, tuple[Batch, float | None]]
    """Attack's label -> its guess, in the original's order, and PSNR in dB; of a batch, that of its mean error."""
    blind: Tensor | None
    """The blind guess: one image, or a batch."""
    levels: dict[str, Sequence[str]] = field(default_factory=dict)
    """Attack's label -> of each image of its guess, one of scores.LEVELS."""


@dataclass(frozen=True)
class About:
    """What a run was: all in words."""

    scenario: str
    question: str
    threat: str
    settings: Mapping[str, str]
    environment: Mapping[str, str]
    finished: bool = True


@dataclass(frozen=True)
class Summary:
    """An attack's rows at one setting of the swept knobs. PSNR in dB; medians over victims, shares in [0, 1]."""

    knobs: dict[str, str]
    attack: str
    victims: int
    failed: int
    """Victims that gave no answer, or on whom the attack stopped."""
    back: Outcome
    psnrs: list[float]
    """Of each image."""
    psnr: float | None
    """Median over images."""
    spread: tuple[float, float] | None
    """First and third quartile of the images' PSNR."""
    mse: float | None
    """Mean over victims."""
    ssim: float | None
    lpips: float | None
    label_correct: float | None
    psnr_blind: float | None
    """Median over images."""
    seconds: float | None
    """Mean for each victim."""
    unexplained: float | None
    """Median share of a victim's gradient that the guess does not cause."""


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary for each attack and setting of the knobs that vary over the rows, in the rows' order."""
    rows = [row for row in rows if "attack" in row]
    knobs = _varying(rows)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*(_said(row, knob) for knob in knobs), str(row.get("attack"))), []).append(row)
    return [_summary(dict(zip(knobs, key, strict=False)), key[-1], group) for key, group in groups.items()]


def _varying(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row if name not in (*SCORES, *WHO, *ASIDE, *SOUND))
    if "epsilon" in names:  # σ follows from it
        names.pop("sigma", None)
    told = {(_said(row, "epsilon"), _text(row.get("defence"))) for row in rows if "success" in row}
    if not told:  # ε follows from the defence, and is not what is asked
        names.pop("epsilon", None)
    if told and len(told) == len({epsilon for epsilon, _ in told}):  # ε stands for the defence, whose numbers are long
        names.pop("defence", None)
    return [name for name in names if len({_said(row, name) for row in rows}) > 1]


def _summary(knobs: dict[str, str], attack: str, rows: list[Row]) -> Summary:
    def over(column: str, middle: Callable[[list[float]], float]) -> float | None:
        values = _values(rows, column)
        return middle(values) if values else None

    each = psnrs(rows)
    low, _, high = statistics.quantiles(each, method="inclusive") if len(each) > 1 else (each * 3 or [0.0] * 3)
    return Summary(
        knobs=knobs,
        attack=attack,
        victims=len(rows),
        failed=sum(1 for row in rows if row.get("error")),
        back=outcome(rows),
        psnrs=each,
        psnr=median(each),
        spread=(low, high) if each else None,
        mse=over("mse", statistics.mean),
        ssim=over("ssim", statistics.median),
        lpips=over("lpips", statistics.median),
        label_correct=over("label_correct", statistics.mean),
        psnr_blind=median(psnrs(rows, "psnr_blind")),
        seconds=over("seconds", statistics.mean),
        unexplained=over("unexplained", statistics.median),
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    """Why scores are empty, what is doubted of the leak, and whose guess does not explain it, each reason once."""
    notes = dict.fromkeys(str(row[note]) for row in rows for note in NOTES if row.get(note))
    notes |= dict.fromkeys(f"{row['attack']} {row['adaptive_note']}" for row in rows if row.get("adaptive_note"))
    failed = dict.fromkeys(f"{row.get('attack')} failed: {row['error']}" for row in rows if row.get("error"))
    doubted = dict.fromkeys(f"Client {row.get('client')}: {row['doubts']}" for row in rows if row.get("doubts"))
    told = [row["unexplained"] for row in rows if row.get("unexplained") is not None]
    many = sum(share > EXPLAINED for share in told)
    left = [f"{many} of {len(told)} guesses leave over {EXPLAINED:g} of the gradient unexplained: {CAUSES}."]
    return [*notes, *left[: bool(many)], *list(doubted)[:FAILURES], *list(failed)[:FAILURES]]


def _values(rows: Iterable[Row], column: str) -> list[float]:
    values = (row.get(column) for row in rows)
    return [float(value) for value in values if value is not None and math.isfinite(value)]


# The answer, in words.

SETTINGS = 8
"""Settings of an attack that its sentence names one by one."""

UNEXPLAINED = 0.1
"""Share of an undefended gradient, left unexplained by a guess, above which the attack did not converge."""


def answers(rows: Sequence[Row]) -> list[str]:
    """A sentence for each attack, made of the rows alone; none where there is no truth to score them against."""
    attacks: dict[str, list[Summary]] = {}
    for entry in summarise(rows):
        if entry.back.images or entry.failed:
            attacks.setdefault(entry.attack, []).append(entry)
    return [_answer(attack, entries) for attack, entries in attacks.items()]


def _answer(attack: str, entries: Sequence[Summary]) -> str:
    images, failed = (sum(numbers) for numbers in zip(*((one.back.images, one.failed) for one in entries), strict=True))
    lost = f"; {failed} {'victim' if failed == 1 else 'victims'} without a result" if failed else ""
    if not images:
        return f"{attack}: no result{lost}."
    known, names = [entry for entry in entries if entry.back.images], _untold(entries)
    if len(known) == 1:
        (entry,) = known
        low, high = entry.back.interval
        same = "" if entry.back.identical is None else f", {entry.back.identical} of them identical"
        middle = "" if entry.psnr is None else f"; median {entry.psnr:.1f} dB{_blind(known)}"
        return (
            f"{attack}: {_counted(entry)} {entry.back.measure} (95 % interval {100 * low:.0f}–{100 * high:.0f} %)"
            f"{same}{middle}{lost}."
        )
    if len(known) > SETTINGS:
        ranked = sorted(known, key=lambda entry: (entry.back.share or 0.0, entry.psnr or 0.0))
        span = " to ".join(f"{_counted(entry)} ({_where(entry, names)})" for entry in (ranked[0], ranked[-1]))
        return f"{attack}: over {len(known)} settings from {span} {known[0].back.measure}{_blind(known)}{lost}."
    each = "; ".join(f"{_where(entry, names)}: {_counted(entry)}{_middle(entry)}" for entry in known)
    return f"{attack}, images {known[0].back.measure}{_blind(known)}: {each}{lost}."


def _counted(entry: Summary) -> str:
    return f"{entry.back.won} of {entry.back.images}" + (" images" if entry.back.images > 1 else " image")


def _middle(entry: Summary) -> str:
    return "" if entry.psnr is None else f", {entry.psnr:.1f} dB"


def _blind(entries: Sequence[Summary]) -> str:
    floors = [entry.psnr_blind for entry in entries if entry.psnr_blind is not None]
    if not floors:
        return ""
    low, high = f"{min(floors):.1f}", f"{max(floors):.1f}"
    return f" (blind guess {low if low == high else f'{low}–{high}'} dB)"


def _where(entry: Summary, names: Sequence[str]) -> str:
    said = (f"{name.replace('_', ' ')} {entry.knobs[name]}" for name in names if entry.knobs[name] != "–")
    return ", ".join(said) or "otherwise"


def alarms(rows: Sequence[Row], finished: bool = True) -> list[str]:
    """What has to be known before a figure of these rows is believed, in sentences; none of a sound, finished run."""
    found = [] if finished else ["This run is not finished: what follows is of the attacks that were done by then."]
    attacked = [row for row in rows if "attack" in row]
    if failed := [row for row in attacked if row.get("error")]:
        reasons = "; ".join(dict.fromkeys(str(row["error"]) for row in failed[:FAILURES]))
        found.append(f"{len(failed)} of {len(attacked)} rows hold no result, so shares are of the others: {reasons}")
    far: dict[str, int] = {}
    for row in attacked:
        if row.get("defence") == "none" and (row.get("unexplained") or 0.0) > UNEXPLAINED:
            far[str(row["attack"])] = far.get(str(row["attack"]), 0) + 1
    found += [
        f"{attack} did not converge on {many} {'victim' if many == 1 else 'victims'}: its guess leaves more than "
        f"{UNEXPLAINED:.0%} of the gradient unexplained, so that it failed says nothing of what the gradient tells."
        for attack, many in far.items()
    ]
    return found + list(dict.fromkeys(f"The gradient is doubted: {row['doubts']}" for row in rows if row.get("doubts")))


# The terminal's table.


LEGEND = (
    "n: victims (× images of each); shares are of images, PSNR is the median over images, both with 95 % intervals "
    "(Clopper-Pearson; order statistics, of few the least and the largest)"
)
WIDER = "MSE: mean over victims, whose PSNR is -10 log10(MSE); s/victim: seconds"
LEFT = "left: share of the gradient that the guess does not cause"


def table(rows: Sequence[Row]) -> Table:
    """The summaries, for a terminal of 80 columns: MSE, SSIM, LPIPS and seconds are left to the page."""
    summaries = summarise(rows)
    shown = Table(caption=plain("\n".join([f"{LEGEND}; {LEFT}", *_notes(rows)])), box=None, padding=(0, 1, 0, 0))
    knobs = _untold(summaries)
    for name in knobs:
        shown.add_column(plain(name.replace("_", " ")))
    shown.add_column("attack", overflow="fold")
    for name in ("n", _measure(summaries), "identical", "PSNR dB", "blind", "label", "left"):
        shown.add_column(plain(name), justify="right", no_wrap=True)
    for entry in summaries:
        cells = _cells(entry, "mse", "ssim", "lpips", "seconds")
        words = map(plain, (*(entry.knobs[name] for name in knobs), entry.attack, *cells))
        shown.add_row(*words, style="red" if entry.back.won else None)
    return shown


def _measure(summaries: Sequence[Summary]) -> str:
    return next((entry.back.measure for entry in summaries if entry.back.images), MEASURE)


def _untold(summaries: Sequence[Summary]) -> list[str]:
    """The knobs whose value is not told by another one's: 80 columns are few."""
    names = list(summaries[0].knobs) if summaries else []
    for name in reversed(names.copy()):
        for other in names:
            pairs = {(entry.knobs[other], entry.knobs[name]) for entry in summaries}
            if other != name and len(pairs) == len({told for told, _ in pairs}):
                names.remove(name)
                break
    return names


def _cells(entry: Summary, *but: str) -> list[str]:
    answered = entry.victims - entry.failed
    each = f"×{entry.back.images // answered}" if answered and entry.back.images > answered else ""
    back = entry.back
    cells = {
        "victims": f"{entry.victims}{each}" + (f" ({entry.failed} failed)" if entry.failed else ""),
        "back": str(back),
        "identical": "–" if back.identical is None or not back.images else f"{back.identical / back.images:.0%}",
        "psnr": ranged(entry.psnrs),
        "blind": _number(entry.psnr_blind, ".1f"),
        "mse": _number(entry.mse, ".2g"),
        "ssim": _number(entry.ssim, ".3f"),
        "lpips": _number(entry.lpips, ".3f"),
        "label": _number(entry.label_correct, ".0%"),
        "unexplained": _number(entry.unexplained, ".0e"),
        "seconds": _number(entry.seconds, ".2f"),
    }
    return [cell for name, cell in cells.items() if name not in but]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


def _said(row: Row, name: str) -> str:
    return "∞" if name == "epsilon" and "∞" in str(row.get("epsilon_note")) else _text(row.get(name))


# Pictures.

CELL, GAP, CAPTION, MARGIN = 192, 20, 64, 32
ORIGINAL, BLIND = "original", "blind guess"
INK, PALE, ALARM, PAPER = "#1d2129", "#737a87", "#b3261e", "#ffffff"


def strip(pictures: Sequence[Picture]) -> bytes:
    """A PNG with a row for each victim (SHOWN at most): original, each guess with what it shows, blind guess."""
    pictures = pictures[:SHOWN]
    columns = _columns(pictures)
    headings = [_wrapped(column, _font(18, bold=True), CELL) for column in columns]
    head = 24 * max(map(len, headings), default=1) + 12
    rows = [[_cell(picture, column) for column in columns] for picture in pictures]
    shown = [[None if images is None else _enlarged(images, CELL) for images, _ in row] for row in rows]
    tall = [max((picture.height for picture in row if picture), default=CELL) for row in shown]
    left = MARGIN + (150 if any(picture.title for picture in pictures) else 0)
    width, height = (
        left + len(columns) * (CELL + GAP) - GAP + MARGIN,
        2 * MARGIN + head + sum(tall) + len(rows) * CAPTION,
    )
    page = Image.new("RGB", (max(width, 2 * MARGIN), height), PAPER)
    draw = ImageDraw.Draw(page)
    centres = [left + number * (CELL + GAP) + CELL // 2 for number in range(len(columns))]
    for x, lines in zip(centres, headings, strict=True):
        draw.multiline_text((x, MARGIN), "\n".join(lines), INK, _font(18, bold=True), "ma", spacing=4, align="center")
    y = MARGIN + head
    for row, picture in enumerate(pictures):
        title = "\n".join(_wrapped(picture.title, _font(16), 130))
        draw.multiline_text((MARGIN, y + tall[row] // 2), title, PALE, _font(16), "lm", spacing=4)
        for x, column, image, (_, decibels) in zip(centres, columns, shown[row], rows[row], strict=True):
            if image is not None:
                page.paste(image, (x - image.width // 2, y), image)
            if decibels is not None:
                words, colour = _caption(picture, column), ALARM if _leaked(picture, column) else PALE
                said = "\n".join(filter(None, (words, f"{decibels:.1f} dB")))
                draw.multiline_text((x, y + tall[row] + 6), said, colour, _font(16), "ma", spacing=4, align="center")
        y += tall[row] + CAPTION
    return _png(page)


def _leaked(picture: Picture, column: str) -> bool:
    """Whether any of the guess's images is recognisable."""
    return any(level != LEVELS[0] for level in picture.levels.get(column, ()))


def _caption(picture: Picture, column: str) -> str:
    """What a guess shows: its level, or of a batch how many images are recognisable."""
    found = picture.levels.get(column, ())
    if len(found) < 2:
        return "".join(found)
    return f"{sum(level != LEVELS[0] for level in found)} of {len(found)} {MEASURE}"


def _columns(pictures: Sequence[Picture]) -> list[str]:
    """`original` where one is known, every attack's label, `blind guess` where there is one."""
    attacks = list(dict.fromkeys(label for picture in pictures for label in picture.guesses))
    original = [ORIGINAL] if any(picture.original is not None for picture in pictures) else []
    return original + attacks + ([BLIND] if any(picture.blind is not None for picture in pictures) else [])


def _cell(picture: Picture, column: str) -> tuple[Batch | None, float | None]:
    """The images of this column, and their PSNR where there is one."""
    if column in picture.guesses:
        return picture.guesses[column]
    if column == ORIGINAL:
        return picture.original, None
    if column != BLIND or picture.blind is None:
        return None, None
    blind, original = picture.blind, picture.original
    if original is None:
        return blind.reshape(-1, *blind.shape[-3:]), None
    blind = blind.expand_as(original)
    return blind, float(psnr(mse(blind.cpu(), original.cpu()).mean()))


def _grid(images: Batch) -> Image.Image:
    """A batch as one picture, as square as it goes, its images a transparent pixel apart."""
    pixels = images.detach().cpu().float().nan_to_num(0.0).clamp(0, 1)
    if pixels.shape[1] != 3:
        pixels = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    tiles = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    count, height, width, _ = tiles.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    sheet = Image.new("RGBA", (across * (width + 1) - 1, down * (height + 1) - 1))
    for number, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (number % across * (width + 1), number // across * (height + 1)))
    return sheet


def _enlarged(images: Batch, side: int) -> Image.Image:
    """The batch, `side` pixels at its longer side. Small images keep crisp pixels: enlarged further, then averaged."""
    picture = _grid(images)
    larger = side / max(picture.size)
    size = (max(1, round(picture.width * larger)), max(1, round(picture.height * larger)))
    whole = 4 * math.ceil(larger) if larger > 1 else 1
    picture = picture.resize((picture.width * whole, picture.height * whole), Image.Resampling.NEAREST)
    return picture.resize(size, Image.Resampling.BOX)


def _png(picture: Image.Image) -> bytes:
    content = BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
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


# The page.

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --pale: #666d7a; --line: #dfe2e8; --paper: #fff; --panel: #f6f7f9;
  --alarm: #b3261e; --mark: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --pale: #9aa1ae; --line: #343943; --paper: #15171b;
  --panel: #1d2025; --alarm: #ff8a80; --mark: #f0c35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3em; letter-spacing: -.02em; }
h2 { font-size: 1.2rem; margin: 2.8em 0 .6em; letter-spacing: -.01em; }
p { max-width: 46em; margin: .5em 0; } .lead { font-size: 1.15rem; white-space: pre-line; }
.pale, figcaption, caption { color: var(--pale); font-size: .875rem; } .leak { color: var(--alarm); font-weight: 600; }
.answer { border-left: 4px solid var(--ink); padding: 2px 0 2px 16px; margin: 1em 0; } .answer p { font-size: 1.05rem; }
.banner { border: 2px solid var(--alarm); border-radius: 10px; padding: 8px 16px; margin: 1em 0; }
.scroll { overflow: auto; max-height: 70vh; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--panel); font-weight: 600; z-index: 1; }
tr:last-child td { border-bottom: 0; } .number { text-align: right; } .attack { white-space: normal; min-width: 11em; }
td.error { white-space: normal; min-width: 18em; }
.pictures td, .pictures th { border: 0; text-align: center; vertical-align: top; padding: 6px 8px;
  white-space: normal; }
.pictures { table-layout: fixed; } .pictures th:first-child { width: 7.5em; }
.pictures th { white-space: normal; vertical-align: bottom; }
.pictures td:first-child { text-align: left; color: var(--pale); white-space: pre-line; overflow-wrap: anywhere; }
.pictures img { display: block; width: 100%; max-width: 144px; margin: 0 auto 4px; border-radius: 4px; }
  .pixels { image-rendering: pixelated; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 0; font-size: .9rem; }
dt { color: var(--pale); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; font-family: ui-monospace, monospace; }
svg { display: block; } td svg text { fill: var(--pale); font: 10px system-ui, sans-serif; }
.chart svg { width: 100%; height: auto; }
.dot { fill: var(--ink); fill-opacity: .35; }
.axis { stroke: var(--line); } .floor { stroke: var(--mark); stroke-width: 2; }
@media print { .scroll { max-height: none; overflow: visible; } }
"""


def html(about: About, rows: Sequence[Row], pictures: Sequence[Picture]) -> str:
    """The page: no scripts, and nothing fetched from anywhere."""
    every, rows = rows, [row for row in rows if "attack" in row]
    sections = [
        privacy_report.section(every),
        defence_report.section(every),
        gallery(pictures),
        _curves(rows),
        "<h2>What each attack got</h2>" + _summaries(rows) if rows else "",
        f"<h2>Who listens, and what they know</h2><p style='white-space: pre-line'>{escape(about.threat)}</p>",
        "<h2>Every victim</h2>" + _rows(rows) if rows else "",
    ]
    return page(about, sections, answers(rows), alarms(rows, about.finished))


def page(about: About, sections: Iterable[str], answer: Sequence[str] = (), warned: Sequence[str] | None = None) -> str:
    """A page of these sections, some of them empty, between the question and the settings.

    Args:
        answer: what the rows say, in sentences: it stands before what the question's author expects.
        warned: what has to be known first; unless said, only whether the run is finished.
    """
    warned = alarms((), about.finished) if warned is None else warned
    question, _, expected = about.question.partition("\n\n")
    framed = [
        f"<h1>{escape(about.scenario)}</h1>",
        _box("banner", "Read this first", [f"⚠ {sentence}" for sentence in warned]),
        f"<p class='lead'>{escape(question)}</p>",
        _box("answer", "Answer", answer),
        f"<p style='white-space: pre-line'>{escape(expected)}</p>" if expected else "",
        *sections,
        "<h2>Settings</h2>" + _definitions(about.settings),
        "<h2>Environment</h2>" + _definitions(about.environment),
    ]
    whole = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>fedtap: {escape(about.scenario)}</title><style>{STYLE}</style></head><body><main>"
        "<p class='pale'>fedtap: what a federation's server can learn from what its clients send</p>"
        + "\n".join(filter(None, framed))
        + "</main></body></html>\n"
    )
    return whole.encode(errors="replace").decode()  # the name of a file need not be text


def write(folder: Path, about: About, rows: Sequence[Row], pictures: Sequence[Picture]) -> None:
    """`report.html` in this folder, and `strip.png` where there are pictures.

    Raises:
        FedtapError: the folder cannot be written.
    """
    if pictures:
        write_atomically(folder / "strip.png", strip(pictures))
    write_atomically(folder / "report.html", html(about, rows, pictures).encode())


def _box(kind: str, heading: str, sentences: Sequence[str]) -> str:
    """A heading and its sentences; nothing where there are none."""
    body = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f"<section class='{kind}'><b>{heading}</b>{body}</section>" if body else ""


def _curves(rows: Sequence[Row]) -> str:
    """PSNR and MSE against each knob that varies over numbers."""
    summaries = [
        entry for entry in summarise(rows) if entry.psnr is not None and entry.spread and entry.mse is not None
    ]
    charts = []
    for knob in summaries[0].knobs if summaries else ():
        points = [(entry, _numeric(entry.knobs[knob])) for entry in summaries]
        if len({value for _, value in points if value is not None}) < 2:
            continue
        curves: dict[str, Curve] = {}
        for entry, value in points:
            if value is None or entry.psnr is None or entry.spread is None or entry.mse is None:
                continue
            others = [
                f"{name.replace('_', ' ')} {said}"
                for name, said in entry.knobs.items()
                if name != knob and not _follows(name, knob, summaries)
            ]
            label = ", ".join([entry.attack, *others])
            curves.setdefault(label, Curve(label)).add(value, entry.psnr, *entry.spread, entry.mse)
        floors = [entry.psnr_blind for entry in summaries if entry.psnr_blind is not None]
        floor = statistics.median(floors) if floors else None
        charts.append(f"<div class='chart'>{svg(knob.replace('_', ' '), list(curves.values()), floor)}</div>")
    return "<h2>Curves</h2>" + "".join(charts) if charts else ""


def _follows(name: str, knob: str, summaries: Sequence[Summary]) -> bool:
    """Whether one knob's value is told by the attack and another knob's value."""
    told: dict[tuple[str, str], str] = {}
    return all(
        told.setdefault((entry.attack, entry.knobs[knob]), entry.knobs[name]) == entry.knobs[name]
        for entry in summaries
    )


def _numeric(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def gallery(pictures: Sequence[Picture]) -> str:
    """Each victim's pictures side by side, as an element of the page; empty where there are none."""
    if not pictures:
        return ""
    columns = _columns(pictures)
    head = "".join(f"<th>{_breakable(column)}</th>" for column in ("", *columns))
    body = []
    for picture in pictures:
        cells = [f"<td>{escape(picture.title)}</td>"]
        for column in columns:
            images, decibels = _cell(picture, column)
            kind = "leak" if _leaked(picture, column) else "pale"
            words = ", ".join(filter(None, (_caption(picture, column), f"{_number(decibels, '.1f')} dB")))
            caption = f"<span class='{kind}'>{escape(words)}</span>" if decibels is not None else ""
            shown = _embedded(images, f"{column}, {picture.title}") if images is not None else "–"
            cells.append(f"<td>{shown}{caption}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        "<h2>Pictures</h2><div class='scroll' style='max-height: none'>"
        f"<table class='pictures' style='min-width: {110 * (len(columns) + 1)}px'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        + (
            "<p class='pale'>Below each guess what it shows, and its PSNR (of a batch: that of its mean squared "
            "error). The blind guess is made without any leak, from public images.</p>"
        )
        * any(picture.original is not None for picture in pictures)
    )


def png(images: Batch) -> bytes:
    """A batch of images as one picture, pixel by pixel."""
    return _png(_grid(images))


def _embedded(images: Batch, words: str) -> str:
    picture = _grid(images)
    kind = "pixels" if max(picture.size) <= 144 else ""
    content = base64.b64encode(_png(picture)).decode()
    return f"<img class='{kind}' alt='{escape(words)}' src='data:image/png;base64,{content}'>"


def _summaries(rows: Sequence[Row]) -> str:
    summaries = summarise(rows)
    right = max([60.0, *(value for entry in summaries for value in entry.psnrs)])
    names = [name.replace("_", " ") for name in summaries[0].knobs]
    back = (f"{_measure(summaries)} [95 %]", "identical", "PSNR dB [95 %]", "blind dB")
    numbers = ("victims", *back, "MSE", "SSIM", "LPIPS", "labels", "unexplained", "s/victim")
    head = "".join(f"<th>{escape(name)}</th>" for name in (*names, "attack", "PSNR of each image"))
    head += "".join(f"<th class='number'>{name}</th>" for name in numbers)
    body = []
    for entry in summaries:
        words = "".join(f"<td>{escape(value)}</td>" for value in entry.knobs.values())
        words += f"<td class='attack'>{_breakable(entry.attack)}</td>"
        figures = "".join(
            f"<td class='number{' leak' if place == 1 and entry.back.won else ''}'>{escape(figure)}</td>"
            for place, figure in enumerate(_cells(entry))
        )
        body.append(f"<tr>{words}<td>{_dots(entry, right)}</td>{figures}</tr>")
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"<p class='pale'>{escape(LEGEND)}; {escape(WIDER)}. {escape(LEVELLED)} Dots: the line is the blind guess. "
        f"Unexplained is the share of the gradient that a guess does not cause; over {EXPLAINED:g} it is {CAUSES}. "
        "An attack that fails shows that this attack fails here: it does not show that the data are private.</p>"
        + "".join(f"<p class='pale'>{escape(note)}</p>" for note in _notes(rows))
    )


def _dots(entry: Summary, right: float) -> str:
    """A dot for each image on an axis from 0 to `right` dB."""

    def x(decibels: float) -> str:
        return f"{5 + 150 * min(max(decibels / right, 0.0), 1.0):.1f}"

    heights = [6 + number * 7 % 15 for number in range(len(entry.psnrs))]  # so that equal ones do not hide each other
    dots = "".join(
        f"<circle class='dot' cx='{x(value)}' cy='{y}' r='3'/>" for value, y in zip(entry.psnrs, heights, strict=True)
    )
    floor = entry.psnr_blind
    line = "" if floor is None else f"<line class='floor' x1='{x(floor)}' x2='{x(floor)}' y1='2' y2='26'/>"
    return (
        "<svg width='160' height='38' role='img' aria-label='PSNR of each image'>"
        f"<line class='axis' x1='5' x2='155' y1='26.5' y2='26.5'/>{line}{dots}"
        f"<text x='2' y='36'>0</text><text x='158' y='36' text-anchor='end'>{right:.0f} dB</text></svg>"
    )


def _rows(rows: Sequence[Row]) -> str:
    """Every row; settings that are the same in all of them are left to the settings."""
    rows = [
        {**row, **{name: median(psnrs([row], name)) for name in ("psnr", "psnr_blind")}, **_share(row)} for row in rows
    ]
    forms = {
        "back": ".0%",
        "identical": ".0%",
        "psnr": ".1f",
        "psnr_blind": ".1f",
        "ssim": ".3f",
        "lpips": ".3f",
        "mse": ".2g",
        "objective": ".2g",
    }
    forms |= {"label_correct": ".0%", "accuracy": ".0%", "unexplained": ".1e", "seconds": ".2f"}
    names = {"psnr": "PSNR dB", "psnr_blind": "blind dB", "ssim": "SSIM", "lpips": "LPIPS", "mse": "MSE"}
    names |= {"label_correct": "labels right", "accuracy": "model accuracy", "back": outcome(rows).measure}
    seeds = ["seed"] if len({row.get("seed") for row in rows}) > 1 else []
    words = ("labels", "adaptive_note", "doubts", "error")
    scores = [name for name in (*forms, *words) if any(row.get(name) is not None for row in rows)]
    columns = [*_varying(rows), "attack", "client", "round", *seeds, *scores]

    def cell(row: Row, name: str) -> str:
        value = row.get(name)
        if name in forms:
            return f"<td class='number'>{_number(value, forms[name])}</td>"
        kind = {"attack": "attack", "error": "error", "doubts": "error"}.get(name, "")
        return f"<td class='{kind}'>{_breakable(_said(row, name))}</td>"

    head = "".join(
        f"<th class='{'number' if name in forms else ''}'>{escape(names.get(name, name.replace('_', ' ')))}</th>"
        for name in columns
    )
    body = "".join(f"<tr>{''.join(cell(row, name) for name in columns)}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _share(row: Row) -> Row:
    """The share of its images that came back; `identical` is no column where a PSNR is the measure."""
    back = outcome([row])
    return {"back": back.share, "identical": row.get("identical") if back.identical is not None else None}


def _breakable(text: str) -> str:
    """Escaped, and free to go on in a new line after _ ( , and before a capital."""
    return re.sub(r"(?<=[_,])|(?<=\()(?!\))|(?<=[a-z])(?=[A-Z])", "<wbr>", escape(text))


def _definitions(words: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in words.items())}</dl>"
