"""Pages in headless Chromium: nothing overflows, nothing is asked for, tables sort, sliders show the original."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.support.played import command

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

RUNS = {
    "first_leak": ("--attack", "idlg(steps=3),linear", "--model", "mlp"),
    "batch_size": ("--attack", "idlg(steps=3),inverting_gradients(steps=3)", "--batch", "1,16", "--victims", "2"),
    "secagg": ("--attack", "idlg(steps=3)", "--clients", "3", "--victims", "2"),
}

PROBE = """
<script>
const seen = {errors: [], requests: performance.getEntriesByType('resource').map(one => one.name)};
window.addEventListener('error', event => seen.errors.push(event.message));
seen.across = document.documentElement.scrollWidth - innerWidth;
seen.cut = [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1)
  .map(box => box.ariaLabel);
const table = document.querySelector('table.sortable');
const place = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.startsWith('PSNR dB'));
const column = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[place].textContent));
const button = table.tHead.rows[0].cells[place].querySelector('button');
button.click();
seen.rising = column();
seen.sorted = table.tHead.rows[0].cells[place].ariaSort;
button.click();
seen.falling = column();
const slider = document.querySelector('input[type=range]');
slider.value = 60;
slider.dispatchEvent(new Event('input'));
seen.clip = getComputedStyle(slider.previousElementSibling.lastElementChild).clipPath;
seen.unnamed = [...document.querySelectorAll('button, input, img, [role=region]')].filter(one =>
  !(one.textContent.trim() || one.ariaLabel || one.hasAttribute('alt'))).length;
seen.charts = document.querySelectorAll('.figure svg').length;
seen.keep = [...document.querySelectorAll('.keep button')].map(one => one.textContent);
document.documentElement.dataset.seen = JSON.stringify(seen);
</script>
"""


@pytest.fixture(scope="module", params=list(RUNS))
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / request.param
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "run", request.param, *RUNS[request.param], "--out", str(folder)) == 0
    return folder / "report.html"


def probed(page: Path, width: int) -> dict[str, Any]:
    """What the probe saw at this width, in pixels."""
    copy = page.with_name(f"probe-{width}.html")
    copy.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom")
    profile = f"--user-data-dir={page.with_name('profile')}"
    done = subprocess.run(
        [str(CHROMIUM), *flags, profile, f"--window-size={width},1000", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.parametrize("width", [500, 1280])
def test_a_page_fits_and_works(page: Path, width: int) -> None:
    seen = probed(page, width)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["across"] <= 0
    if width == 1280:
        assert seen["cut"] == []
    assert seen["rising"] == sorted(seen["rising"])
    assert seen["falling"] == sorted(seen["rising"], reverse=True)
    assert seen["sorted"] == "ascending"
    assert seen["clip"] == "inset(0px 40% 0px 0px)"
    assert seen["unnamed"] == 0
    assert seen["keep"] == ["SVG", "PNG"] * seen["charts"]
