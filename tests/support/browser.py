"""Pages in headless Chromium, as a reader has them: narrow and wide, light and dark, and on paper."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

A4 = 718
"""Of an A4 page between its margins, in CSS pixels."""

LANDSCAPE = 1047
"""Of an A4 page on its side, on which the widest tables are printed."""

FOLD = 800
"""Pixels of a page that are seen first."""


class View(NamedTuple):
    """How a page is looked at."""

    width: int
    """Of the frame, in pixels; at the widths of A4 the page looks as it does on paper."""
    dark: bool = False
    """Whether it looks as it does where dark pages are asked for."""


LIGHT = (View(390), View(1280), View(A4))

VIEWS = (*LIGHT, View(390, True), View(1280, True), View(LANDSCAPE))

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
const bottom = found => Math.max(0, ...[...found].map(one => one.getBoundingClientRect().bottom + scrollY));
seen.bottoms = {
  answer: bottom(document.querySelectorAll('.answer')),
  chart: bottom([...document.querySelectorAll('.figure svg')].slice(0, 1)
    .flatMap(one => [...one.querySelectorAll('[id^=axes_] > [id^=patch_]:first-child')])),
  picture: bottom([...document.querySelectorAll('.pictures img')].slice(0, 1)),
};
seen.answers = [...document.querySelectorAll('.answer p')].map(one => one.textContent);
seen.charts = document.querySelectorAll('.figure svg').length;
seen.keep = [...document.querySelectorAll('.keep button')].map(one => one.textContent).filter(one => one !== 'Copy');
for (const folded of document.querySelectorAll('details')) folded.open = true;
seen.unfolded = document.documentElement.scrollWidth - innerWidth;
seen.unnamed = [...document.querySelectorAll('button, input, img, [role=region]')].filter(one =>
  !(one.textContent.trim() || one.ariaLabel || one.hasAttribute('alt'))).length;
</script>"""
"""What every page is looked at for: widths with nothing folded but the cut tables, which are those shown at once."""

REPORT = """<script>
Promise.all([seen.axe, seen.kept]).then(([axe, kept]) => {
  Object.assign(seen, {axe, kept});
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


AXE_SCRIPT = (
    f"<script>{AXE.read_text(encoding='utf-8').replace('</script', '<' + chr(92) + '/script')}</script>" if AXE else ""
)


def chromium(profile: Path, *words: str) -> str:
    """What Chromium prints, with no window and a profile of its own."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    profiled = f"--user-data-dir={profile}"
    done = subprocess.run(
        [str(CHROMIUM), *flags, profiled, *words], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


def looked(
    page: Path, views: Sequence[View] = VIEWS, probe: str = "", audit: bool = True
) -> dict[View, dict[str, Any]]:
    """What is seen of the page in each view, each in a frame of one window; what every page has to hold is asserted.

    Args:
        probe: more scripts for the end of the page.
        audit: whether axe-core looks at it with nothing folded, where it is installed.
    """
    audit = audit and AXE is not None
    frames = ""
    for number, view in enumerate(views):
        copy = page.with_name(f"{page.stem}-view-{number}.html")
        copy.write_text(_seen_as(page.read_text(), view, LOOK + probe + (AXE_SCRIPT + AUDIT) * audit + REPORT))
        frames += f"<iframe src='{copy.name}' style='border: 0; width: {view.width}px; height: 1000px'></iframe>"
    frame = page.with_name(f"{page.stem}-views.html")
    frame.write_text(f"<script>{_COLLECT}</script>{frames}")
    words = ("--dump-dom", "--window-size=1400,1100", "--virtual-time-budget=60000", frame.as_uri())
    found = re.search(r'data-seen="([^"]*)"', text := chromium(page.with_name("profile"), *words))
    assert found, text[-500:]
    told = json.loads(unescape(found[1]))
    seen = {view: json.loads(told[str(number)]) for number, view in enumerate(views)}
    for view, one in seen.items():
        _check(view, one, audit)
    return seen


_COLLECT = """
const seen = {};
addEventListener('message', event => {
  for (let number = 0; number < frames.length; number++)
    if (frames[number] === event.source) seen[number] = event.data;
  document.documentElement.dataset.seen = JSON.stringify(seen);
});
"""


def _seen_as(text: str, view: View, probe: str) -> str:
    """The page as it looks there, with listeners before all else and the probe behind."""
    before, _, after = text.rpartition("</body>")  # a script of the page's may hold the word
    text = (before + probe + "</body>" + after).replace("<head>", "<head>" + LISTENER, 1)
    text = text.replace("(prefers-color-scheme: dark)", "all") if view.dark else text
    text = text.replace("@media print {", "@media all {") if view.width in (A4, LANDSCAPE) else text
    return (
        text.replace(" page: wide;", " display: none;") if view.width == A4 else text
    )  # these are on pages of their own


def _check(view: View, seen: dict[str, Any], audit: bool) -> None:
    assert seen["width"] == view.width
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["across"] <= 0, view
    assert seen["unfolded"] <= 0, view
    assert seen["unnamed"] == 0
    assert seen["keep"] == ["SVG", "PNG"] * seen["charts"]
    if view.width != 390:
        assert seen["cut"] == [], view
    if audit:
        assert "color-contrast" in seen["axe"]["passed"]  # it has looked
        assert seen["axe"]["serious"] == [], view


def answer_and_chart_come_first(seen: dict[View, dict[str, Any]], headline: str = "chart") -> None:
    """The first pixels of a wide page hold the answer, and all of the chart's plot or of the first picture.

    Args:
        headline: `chart` or `picture`.
    """
    bottoms = seen[View(1280)]["bottoms"]
    assert 0 < bottoms["answer"] < bottoms[headline] <= FOLD
