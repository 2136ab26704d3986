"""A page with a slider for each number that a run swept: what came back at that setting, beside the original.

It is made of what the run left, its rows and the pictures of its page, and opens in any browser without a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from statistics import median
from typing import Any

from fedtap.scenarios.course.notebooks import UNITS_FOLDER
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import read_bytes
from fedtap.simulator.report.saved_run import SavedRun, read_run

SLIDER_PAGE = "slider.html"
"""File of a unit's folder."""

_LARGEST = 2**26
"""Bytes of a run's page, at most."""
_PICTURE = re.compile(r"alt='([^']+)' src='(data:image/png;base64,[A-Za-z0-9+/=]+)'")
_SIGNS = {"sigma": "σ"}
_MOST = 3
"""Sliders of a page: more settings than a hand can hold in mind."""


@dataclass(frozen=True)
class SliderPage:
    """A page that a notebook shows in a frame of its own."""

    html: str
    """All of it."""

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html)}" style="width: 100%; height: 34rem; border: 0"></iframe>'


def unit_slider(number: int) -> SliderPage:
    """The page that comes with a unit.

    Raises:
        FedtapError: none comes with it.
    """
    found = [*UNITS_FOLDER.glob(f"{number}_*/{SLIDER_PAGE}")]
    if not found:
        raise FedtapError(f"No slider page comes with unit {short(number)}: make one of a run by fedtap course slider.")
    return SliderPage(read_bytes(found[0], _LARGEST).decode())


def slider_page(folder: Path, source: str = "") -> SliderPage:
    """The page of a finished run of one attack, of its first victim.

    Args:
        source: whose pictures they are, and by which licence they are shown.

    Raises:
        FedtapError: there is no run, it sweeps no number, or its page has no picture of a setting.
    """
    run = read_run(folder)
    axes = _swept(run)
    pictures = _pictures(run)
    stops, images = {}, dict[str, int]()
    for row in run.rows:
        setting = {name: row[name] for name in axes}
        place = ",".join(str(values.index(row[name])) for name, values in axes.items())
        if place not in stops:
            stops[place] = _shown(row, setting, pictures, images, run)
    data = {
        "axes": [{"name": _SIGNS.get(name, name), "values": values} for name, values in axes.items()],
        "images": [*images],
        "stops": stops,
    }
    return SliderPage(_html(run, data, source))


def _swept(run: SavedRun) -> dict[str, list[Any]]:
    """Setting -> its values, of the settings that the run swept over numbers, in ascending order."""
    attacks = {row.get("attack") for row in run.rows}
    values: dict[str, set[Any]] = {name: {row.get(name) for row in run.rows} for name in run.options}
    swept = {
        name: sorted(found)
        for name, found in values.items()
        if len(found) > 1 and all(type(value) in (int, float) for value in found)
    }
    if not 1 <= len(swept) <= _MOST or len(attacks) != 1:
        raise FedtapError(
            f"The run in {short(run.path)} has {len(swept)} settings of several numbers and {len(attacks)} attacks, "
            f"and a slider page shows one attack over 1 to {_MOST} settings: play one with --batch 1,2,4 and --attack "
            "idlg."
        )
    return swept


def _pictures(run: SavedRun) -> dict[tuple[str, ...], str]:
    """What the run's page says of a picture, part by part, -> the picture."""
    page = read_bytes(run.path / "report.html", _LARGEST).decode()
    said = ((unescape(found[1]), found[2]) for found in _PICTURE.finditer(page))
    return {tuple(words.split(", ")): picture for words, picture in said if "\n" not in words}  # else a part of a batch


def _shown(
    row: Mapping[str, Any],
    setting: Mapping[str, Any],
    pictures: Mapping[tuple[str, ...], str],
    images: dict[str, int],
    run: SavedRun,
) -> dict[str, Any]:
    """What the page shows at one setting: the pictures' numbers, and the row's values."""
    wanted = {f"client {row['client']}", *(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())}
    found = {words[0]: picture for words, picture in pictures.items() if wanted <= {*words[1:]}}
    attack = [words for words in found if words not in ("original", "blind guess")]
    if len(attack) != 1 or not {"original", "blind guess"} <= found.keys() or not row.get("psnr_images"):
        raise FedtapError(
            f"The page of the run in {short(run.path)} has no picture of {', '.join(sorted(wanted))}: play it again, "
            "with an attack that works at each setting."
        )
    numbers = [images.setdefault(found[words], len(images)) for words in ("original", *attack, "blind guess")]
    levels = [level for level in row.get("levels") or () if level != "nothing"]
    kept = {name: row[name] for name in ("psnr_images", "psnr_blind_images")}
    return {"images": numbers, "recognisable": len(levels), **kept}


def _html(run: SavedRun, data: Mapping[str, Any], source: str) -> str:
    axes: Sequence[Mapping[str, Any]] = data["axes"]
    names = " and ".join(axis["name"] for axis in axes)
    sliders = "".join(
        f"<p><label for='axis{number}'>{escape(axis['name'])}</label> <input type='range' id='axis{number}' min='0' "
        f"max='{len(axis['values']) - 1}' value='0'> <output for='axis{number}'>{axis['values'][0]:g}</output></p>"
        for number, axis in enumerate(axes)
    )
    figures = "".join(
        f"<figure><img alt='{words}'><figcaption><b>{words}</b><br><span></span></figcaption></figure>"
        for words in ("original", "what came back", "blind guess")
    )
    lines = ""
    for place, stop in data["stops"].items():
        at = [axis["values"][int(index)] for axis, index in zip(axes, place.split(","), strict=True)]
        cells = "".join(f"<td>{value:g}</td>" for value in at)
        cells += "".join(f"<td>{median(stop[name]):.1f}</td>" for name in ("psnr_images", "psnr_blind_images"))
        lines += f"<tr>{cells}<td>{stop['recognisable']} of {len(stop['psnr_images'])}</td></tr>"
    head = "".join(f"<th scope='col'>{escape(axis['name'])}</th>" for axis in axes)
    made = f"<p>Made by <code>{escape(str(run.about.get('command', run.name)))}</code>. {escape(source)}</p>"
    content = json.dumps(data).replace("<", "\\u003c")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>What came back: {escape(names)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body><main>"
        f"<h1>What came back, by {escape(names)}</h1>{sliders}<div class='pictures'>{figures}</div>"
        "<noscript><p>The sliders need JavaScript; the table has all values.</p></noscript>"
        f"<details><summary>All values</summary><table><thead><tr>{head}<th scope='col'>PSNR, dB</th><th scope='col'>"
        "blind guess, dB</th><th scope='col'>recognisable</th></tr></thead>"
        f"<tbody>{lines}</tbody></table><p>Of a batch, PSNR is the median over its images. A blind guess is made "
        f"without the gradient, from public pictures.</p>{made}</details>"
        f"<script type='application/json' id='data'>{content}</script><script>{_SCRIPT}</script></main></body></html>\n"
    )


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2129; background: #fff; margin: 1rem }
h1 { font-size: 1.2rem }
label { display: inline-block; min-width: 4rem; font-weight: bold }
input { width: min(24rem, 55vw); vertical-align: middle }
output { display: inline-block; min-width: 5rem; margin-left: .5rem; font-variant-numeric: tabular-nums }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 192px }
figcaption { min-height: 4.5rem }
img { width: 192px; height: 192px; object-fit: contain; image-rendering: pixelated }
td, th { text-align: right; padding: 0 .8rem }
"""

_SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const sliders = [...document.querySelectorAll('input')], figures = [...document.querySelectorAll('figure')];
const median = values => {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};
const decibels = values => (values.length > 1 ? 'median ' : '') + median(values).toFixed(1) + ' dB';
const show = () => {
  const stop = data.stops[sliders.map(slider => slider.value).join(',')];
  sliders.forEach((slider, axis) => {
    const value = String(data.axes[axis].values[slider.value]);
    slider.ariaValueText = value;
    slider.parentElement.querySelector('output').value = value;
  });
  if (!stop) return;
  const many = stop.psnr_images.length;
  const said = ['', decibels(stop.psnr_images) + ', recognisable: ' + stop.recognisable + ' of ' + many,
                decibels(stop.psnr_blind_images)];
  figures.forEach((figure, at) => {
    figure.querySelector('img').src = data.images[stop.images[at]];
    figure.querySelector('span').textContent = said[at];
  });
};
for (const slider of sliders) slider.oninput = show;
show();
"""
