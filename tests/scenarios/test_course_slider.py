"""Slider pages of the course: what they show are the rows and pictures of a run."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from PIL import Image

import fedtap
from fedtap.scenarios.course import slider
from fedtap.scenarios.course.pictures import course_photos
from fedtap.scenarios.course.slider import slider_page, unit_slider
from fedtap.simulator.errors import FedtapError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

EACH_STOP = """<script>
const shown = {};
for (const place of Object.keys(data.stops)) {
  place.split(',').forEach((value, axis) => { sliders[axis].value = value; sliders[axis].oninput(); });
  const said = figure => [figure.querySelector('img').src, figure.querySelector('span').textContent];
  shown[place] = figures.map(said);
}
document.body.innerHTML = '<pre>' + JSON.stringify(shown).replaceAll('<', '&lt;') + '</pre>';
</script>"""


def content_of(page: str) -> dict[str, Any]:
    found = re.search(r"id='data'>(.*?)</script>", page)
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


def decoded(picture: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "noise"
    options: dict[str, Any] = {"victims": 1, "size": 16, "attack": "idlg(steps=2)"}
    fedtap.run("noise", **options, batch=[1, 10], sigma=[0.0, 0.01], out=out, as_frame=False)
    return out


def test_a_page_holds_the_rows_and_pictures_of_its_run(run: Path) -> None:
    content = content_of(slider_page(run).html)
    assert content["axes"] == [{"name": "batch", "values": [1, 10]}, {"name": "σ", "values": [0.0, 0.01]}]
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert len(content["stops"]) == len(rows) == 4
    for row in rows:
        stop = content["stops"][f"{[1, 10].index(row['batch'])},{[0.0, 0.01].index(row['sigma'])}"]
        assert stop["psnr_images"] == row["psnr_images"]
        assert stop["psnr_blind_images"] == row["psnr_blind_images"]
        assert stop["recognisable"] == round(row["recognisable"] * row["batch"])
        sizes = {decoded(content["images"][number]).size for number in stop["images"]}
        assert sizes == {(16, 16) if row["batch"] == 1 else (4 * 17 - 1, 3 * 17 - 1)}  # all of a batch, not some


def test_a_run_without_a_number_to_move_is_refused(tmp_path: Path) -> None:
    fedtap.run("first_leak", victims=1, size=16, attack="idlg(steps=1)", out=tmp_path / "one", as_frame=False)
    with pytest.raises(FedtapError, match="0 settings of several numbers"):
        slider_page(tmp_path / "one")
    with pytest.raises(FedtapError, match="holds no run"):
        slider_page(tmp_path)
    with pytest.raises(FedtapError, match="unit 1"):
        unit_slider(1)


@pytest.mark.parametrize(("number", "axes"), [(2, ["batch"]), (3, ["batch", "σ"])])
def test_a_units_page_is_small_and_its_originals_are_photographs(number: int, axes: list[str]) -> None:
    page = unit_slider(number)
    assert slider._STYLE in page.html  # made by this version of the command
    assert slider._SCRIPT in page.html
    assert len(page.html) < 100_000
    assert page._repr_html_().startswith("<iframe srcdoc=")
    assert "://" not in page.html, "it asks nobody for anything"
    assert "public domain" in page.html
    content = content_of(page.html)
    assert [axis["name"] for axis in content["axes"]] == axes
    dataset = course_photos()
    motorcycle = dataset.classes.index("motorcycle")
    side = dataset.target
    known = {image.numpy().tobytes() for image in side.images[side.labels != motorcycle]}  # whose licence is not stated
    for stop in content["stops"].values():
        sheet = decoded(content["images"][stop["images"][0]]).convert("RGB")
        tiles = (
            sheet.crop((left, top, left + 16, top + 16))
            for top in range(0, sheet.height, 17)
            for left in range(0, sheet.width, 17)
        )
        some = [tile for tile, _ in zip(tiles, stop["psnr_images"], strict=False)]
        assert all(_channels_first(tile) in known for tile in some)
    best = max(stop["psnr_images"][0] - stop["psnr_blind_images"][0] for stop in content["stops"].values())
    worst = min(median(stop["psnr_images"]) for stop in content["stops"].values())
    assert best > 20
    assert worst < 12


def _channels_first(tile: Image.Image) -> bytes:
    return b"".join(channel.tobytes() for channel in tile.split())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("number", [2, 3])
def test_a_browser_shows_each_row_where_the_sliders_stand(number: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    html, content = unit_slider(number).html, content_of(unit_slider(number).html)
    (tmp_path / "page.html").write_text(html.replace("</main>", f"{EACH_STOP}</main>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom")
    said = subprocess.run(
        [CHROMIUM, *options, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<pre>(.*?)</pre>", said.stdout, re.DOTALL)
    assert found is not None, said.stdout[-500:]
    shown = json.loads(found[1])
    assert shown.keys() == content["stops"].keys()
    for place, stop in content["stops"].items():
        pictures, words = zip(*shown[place], strict=True)
        assert list(pictures) == [content["images"][number] for number in stop["images"]]
        for name, text in (("psnr_images", words[1]), ("psnr_blind_images", words[2])):
            (decibels,) = re.findall(r"([\d.]+) dB", text)
            assert float(decibels) == pytest.approx(median(stop[name]), abs=0.051)
        assert f"recognisable: {stop['recognisable']} of {len(stop['psnr_images'])}" in words[1]
