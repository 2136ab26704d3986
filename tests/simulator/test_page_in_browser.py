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

from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.command.results import replayed_by
from fedtap.simulator.report.saved_run import read_run
from tests.scenarios.test_recorded_rows import DATA, RECORDED
from tests.support.played import command, play

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

A4 = 718
"""Of an A4 page between its margins, in CSS pixels."""

WIDTHS = (390, 1280, A4)

RUNS = {
    "first_leak": ("--attack", "idlg(steps=3),linear", "--model", "mlp"),
    "batch_size": (
        "--attack",
        "idlg(steps=3),inverting_gradients(steps=3)",
        "--batch",
        "1,16",
        "--victims",
        "2",
        "--defence",
        "prune(0.5)",
    ),
    "secagg": ("--attack", "idlg(steps=3)", "--clients", "3", "--victims", "2"),
}

LISTENER = """<script>
const seen = {errors: []};
window.addEventListener('error', event => seen.errors.push(event.message));
window.addEventListener('unhandledrejection', event => seen.errors.push(String(event.reason)));
console.error = console.warn = (...words) => seen.errors.push(words.join(' '));
</script>"""
"""Stands before all else on the page, so that errors of the page's own script are heard."""

LOOK = """<script>
seen.requests = performance.getEntriesByType('resource').map(one => one.name);
seen.width = innerWidth;
seen.across = document.documentElement.scrollWidth - innerWidth;
seen.cut = [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1)
  .map(box => box.ariaLabel);
for (const folded of document.querySelectorAll('details')) folded.open = true;
seen.unfolded = document.documentElement.scrollWidth - innerWidth;
seen.unnamed = [...document.querySelectorAll('button, input, img, [role=region]')].filter(one =>
  !(one.textContent.trim() || one.ariaLabel || one.hasAttribute('alt'))).length;
</script>"""
"""What every page is looked at for: widths with nothing folded but the cut tables, which are those shown at once."""

USE = """<script>
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
seen.slides = slider.offsetParent !== null;
slider.value = 60;
slider.dispatchEvent(new Event('input'));
seen.clip = getComputedStyle(slider.previousElementSibling.lastElementChild).clipPath;
seen.charts = document.querySelectorAll('.figure svg').length;
seen.keep = [...document.querySelectorAll('.keep button')].map(one => one.textContent).filter(one => one !== 'Copy');
seen.copied = [...document.querySelectorAll('pre.copied')].map(text => {
  text.nextElementSibling.querySelector('button').click();
  return [text.textContent, String(getSelection())];
});
</script>"""
"""How the page of a scenario about images is used."""

REPORT = "<script>setTimeout(() => parent.postMessage(JSON.stringify(seen), '*'), 200)</script>"


@pytest.fixture(scope="module", params=list(RUNS))
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / request.param
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "run", request.param, *RUNS[request.param], "--out", str(folder)) == 0
    return folder / "report.html"


def probed(page: Path, width: int, probe: str) -> dict[str, Any]:
    """What the probe saw in a frame of this width, in pixels: a window of Chromium's is no narrower than 500.
    At the width of A4 the page looks as it does on paper.
    """
    copy, frame = page.with_name(f"probe-{width}.html"), page.with_name(f"frame-{width}.html")
    text = page.read_text().replace("<head>", "<head>" + LISTENER).replace("</body>", probe + REPORT + "</body>")
    copy.write_text(text.replace("@media print", "@media all") if width == A4 else text)
    frame.write_text(
        "<script>addEventListener('message', event => document.documentElement.dataset.seen = event.data)</script>"
        f"<iframe src='{copy.name}' style='border: 0; width: {width}px; height: 1000px'></iframe>"
    )
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom")
    done = subprocess.run(
        [
            str(CHROMIUM),
            *flags,
            f"--user-data-dir={page.with_name('profile')}",
            "--window-size=1400,1100",
            "--virtual-time-budget=5000",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    assert seen["width"] == width
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["across"] <= 0
    assert seen["unfolded"] <= 0
    assert seen["unnamed"] == 0
    if width != 390:
        assert seen["cut"] == []
    return seen


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_fits_and_works(page: Path, width: int) -> None:
    seen = probed(page, width, LOOK + USE)
    assert seen["rising"] == sorted(seen["rising"])
    assert seen["falling"] == sorted(seen["rising"], reverse=True)
    assert seen["sorted"] == "ascending"
    assert seen["slides"] == (width != A4)  # not on paper
    assert seen["clip"] == "inset(0px 40% 0px 0px)"
    assert seen["keep"] == ["SVG", "PNG"] * seen["charts"]
    (entries, line), chosen = zip(*seen["copied"], strict=True)
    assert [text.strip() for text in chosen] == [entries.strip(), line]
    assert entries.startswith("@misc{zhao2020,")
    assert line == replayed_by(read_run(page.parent))


@pytest.mark.parametrize("run", RECORDED[1:], ids=lambda run: run["scenario"])
def test_the_pages_of_other_scenarios_fit(run: dict[str, Any], tmp_path: Path) -> None:
    if run["scenario"] == "text_gradients" and not (DATA / "ag_news_test.csv").is_file():
        pytest.skip(f"{DATA / 'ag_news_test.csv'} is absent: set FEDTAP_DATA_ROOT to the folder that holds it")
    play(plan(run["scenario"], run["options"]), tmp_path / "out", data_root=DATA)
    for width in WIDTHS:
        probed(tmp_path / "out/report.html", width, LOOK)
