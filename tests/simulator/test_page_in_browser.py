"""Pages in headless Chromium: nothing overflows, nothing is asked for, tables sort and are filtered, sliders show the
original, and axe-core finds nothing serious."""

from __future__ import annotations

import importlib.util
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

LANDSCAPE = 1047
"""Of an A4 page on its side, on which the widest tables are printed."""

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
seen.charts = document.querySelectorAll('.figure svg').length;
seen.keep = [...document.querySelectorAll('.keep button')].map(one => one.textContent).filter(one => one !== 'Copy');
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
const tables = [...document.querySelectorAll('table.sortable')];
const filters = [...document.querySelectorAll('.filter input')];
seen.filters = [filters.length, tables.filter(one => one.tBodies[0].rows.length > 5).length];
seen.filtered = filters.map(input => {
  const body = input.parentElement.nextElementSibling.querySelector('tbody'), told = input.nextElementSibling;
  const word = [...body.rows].at(-1).cells[0].textContent.trim();
  const ask = text => {
    input.value = text;
    input.dispatchEvent(new Event('input'));
    return [[...body.rows].filter(line => line.offsetParent !== null), told.textContent];
  };
  const [some, count] = ask(word.toUpperCase() + ' '), [none] = ask(word + ' no such line'), [all, silent] = ask('');
  return {some: some.length, all: all.length, lines: body.rows.length, none: none.length, count, silent,
    right: some.every(line => line.textContent.toLowerCase().includes(word.toLowerCase()))};
});
const slider = document.querySelector('input[type=range]');
seen.slides = slider.offsetParent !== null;
slider.value = 60;
slider.dispatchEvent(new Event('input'));
seen.clip = getComputedStyle(slider.previousElementSibling.lastElementChild).clipPath;
seen.copied = [...document.querySelectorAll('pre.copied')].map(text => {
  text.nextElementSibling.querySelector('button').click();
  return [text.textContent, String(getSelection())];
});
</script>"""
"""How the page of a scenario about images is used."""

REPORT = """<script>
Promise.resolve(seen.axe).then(found => {
  seen.axe = found;
  setTimeout(() => parent.postMessage(JSON.stringify(seen), '*'), 200);
});
</script>"""

_FOUND = importlib.util.find_spec("axe_playwright_python")
AXE = Path(_FOUND.origin).with_name("axe.min.js") if _FOUND and _FOUND.origin else None
"""axe-core, of which that package has a copy; the browser is driven without it."""

AUDIT = """<script>
seen.axe = axe.run({resultTypes: ['violations']}).then(({violations, passes}) => ({
  passed: passes.map(one => one.id),
  serious: violations.filter(one => ['serious', 'critical'].includes(one.impact))
    .flatMap(one => one.nodes.map(node => `${one.id}: ${node.html.slice(0, 160)}`)),
}));
</script>"""


@pytest.fixture(scope="module", params=list(RUNS))
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / request.param
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "run", request.param, *RUNS[request.param], "--out", str(folder)) == 0
    return folder / "report.html"


def audited(page: Path) -> None:
    """axe-core finds nothing serious, on a narrow light page and on a wide dark one, with nothing folded."""
    assert AXE is not None
    script = f"<script>{AXE.read_text(encoding='utf-8').replace('</script', '<' + chr(92) + '/script')}</script>"
    for width, dark in ((390, False), (1280, True)):
        found = probed(page, width, LOOK + script + AUDIT, dark=dark)["axe"]
        assert "color-contrast" in found["passed"]  # it has looked
        assert found["serious"] == []


def probed(page: Path, width: int, probe: str, dark: bool = False) -> dict[str, Any]:
    """What the probe saw in a frame of this width, in pixels: a window of Chromium's is no narrower than 500.
    At the widths of A4 the page looks as it does on paper.

    Args:
        probe: the page's last scripts.
        dark: whether the page looks as it does where dark pages are asked for.
    """
    copy, frame = page.with_name(f"probe-{width}.html"), page.with_name(f"frame-{width}.html")
    text = page.read_text().replace("<head>", "<head>" + LISTENER).replace("</body>", probe + REPORT + "</body>")
    text = text.replace("(prefers-color-scheme: dark)", "all") if dark else text
    if width in (A4, LANDSCAPE):
        text = text.replace("@media print {", "@media all {")
    if width == A4:
        text = text.replace(" page: wide;", " display: none;")  # these are on pages of their own
    copy.write_text(text)
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
    assert seen["keep"] == ["SVG", "PNG"] * seen["charts"]
    if width != 390:
        assert seen["cut"] == []
    return seen


def paper(page: Path) -> list[tuple[float, float]]:
    """Width and height of each printed page, in points."""
    made = page.with_name("printed.pdf")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", f"--print-to-pdf={made}")
    profile = f"--user-data-dir={page.with_name('profile')}"
    subprocess.run([str(CHROMIUM), *flags, profile, page.as_uri()], capture_output=True, timeout=120, check=True)
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", made.read_bytes())
    return [(float(wide), float(tall)) for wide, tall in boxes]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_fits_and_works(page: Path, width: int) -> None:
    seen = probed(page, width, LOOK + USE)
    assert seen["rising"] == sorted(seen["rising"])
    assert seen["falling"] == sorted(seen["rising"], reverse=True)
    assert seen["sorted"] == "ascending"
    assert len(set(seen["filters"])) == 1
    for one in seen["filtered"]:
        assert one["right"]
        assert one["some"] >= 1
        assert (one["none"], one["all"]) == (0, one["lines"])
        assert (one["count"], one["silent"]) == (f"{one['some']} of {one['lines']} lines", "")
    assert seen["slides"] == (width != A4)  # not on paper
    assert seen["clip"] == "inset(0px 40% 0px 0px)"
    (entries, line), chosen = zip(*seen["copied"], strict=True)
    assert [text.strip() for text in chosen] == [entries.strip(), line]
    assert entries.startswith("@misc{zhao2020,")
    assert line == replayed_by(read_run(page.parent))


def test_a_table_of_many_columns_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--attack", "idlg(steps=1)", "--epsilon", "10,100", "--victims", "1", "--rounds", "1")
    assert command(monkeypatch, "run", "dp", *words, "--out", str(tmp_path / "dp")) == 0
    page = tmp_path / "dp/report.html"
    assert page.read_text().count("<table class='sortable many most'>") == 2
    for width in (*WIDTHS, LANDSCAPE):
        probed(page, width, LOOK)
    assert {wide > tall for wide, tall in paper(page)} == {False, True}


@pytest.mark.skipif(AXE is None, reason="the extra `browser` is not installed")
def test_axe_finds_nothing_serious(page: Path) -> None:
    audited(page)


@pytest.mark.parametrize("run", RECORDED[1:], ids=lambda run: run["scenario"])
def test_the_pages_of_other_scenarios_fit(run: dict[str, Any], tmp_path: Path) -> None:
    if run["scenario"] == "text_gradients" and not (DATA / "ag_news_test.csv").is_file():
        pytest.skip(f"{DATA / 'ag_news_test.csv'} is absent: set FEDTAP_DATA_ROOT to the folder that holds it")
    play(plan(run["scenario"], run["options"]), tmp_path / "out", data_root=DATA)
    for width in WIDTHS:
        probed(tmp_path / "out/report.html", width, LOOK)
    if AXE is not None:
        audited(tmp_path / "out/report.html")
