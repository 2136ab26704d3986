"""Pages in headless Chromium: nothing overflows, nothing is asked for, tables sort and are filtered, sliders show the
original, charts are kept, answer and chart come first, and axe-core finds nothing serious."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from PIL import Image

from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.command.results import replayed_by
from fedtap.simulator.report.charts import Panel, Series, chart
from fedtap.simulator.report.page import Page, html
from fedtap.simulator.report.saved_run import read_run
from tests.scenarios.test_recorded_rows import DATA, RECORDED
from tests.support.answers import check_answers
from tests.support.browser import A4, LIGHT, View, answer_and_chart_come_first, chromium, looked, needs_chromium
from tests.support.played import command, play
from tests.support.whole_pages import MADE, made

pytestmark = needs_chromium

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

TWO = {"first": 1.0, "second": 9.0}
"""Words of a chart -> where its line begins."""

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


KEEP = """<script>
seen.kept = new Promise(resolve => {
  const files = [], asked = [...document.querySelectorAll('.figure .keep button')];
  HTMLAnchorElement.prototype.click = function() {
    files.push([this.download, this.href]);
    if (files.length === asked.length) resolve(files);
  };
  for (const button of asked) button.click();
});
</script>"""
"""Every chart is kept as SVG and as PNG: names and contents."""


@pytest.fixture(scope="module", params=list(RUNS))
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / request.param
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "run", request.param, *RUNS[request.param], "--out", str(folder)) == 0
    return folder / "report.html"


def paper(page: Path) -> list[tuple[float, float]]:
    """Width and height of each printed page, in points."""
    printed = page.with_name("printed.pdf")
    chromium(page.with_name("profile"), f"--print-to-pdf={printed}", page.as_uri())
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", printed.read_bytes())
    return [(float(wide), float(tall)) for wide, tall in boxes]


def test_a_page_is_used(page: Path) -> None:
    for view, seen in looked(page, LIGHT, USE, audit=False).items():
        assert seen["rising"] == sorted(seen["rising"])
        assert seen["falling"] == sorted(seen["rising"], reverse=True)
        assert seen["sorted"] == "ascending"
        assert len(set(seen["filters"])) == 1
        for one in seen["filtered"]:
            assert one["right"]
            assert one["some"] >= 1
            assert (one["none"], one["all"]) == (0, one["lines"])
            assert (one["count"], one["silent"]) == (f"{one['some']} of {one['lines']} lines", "")
        assert seen["slides"] == (view.width != A4)  # not on paper
        assert seen["clip"] == "inset(0px 40% 0px 0px)"
        (entries, line), chosen = zip(*seen["copied"], strict=True)
        assert [text.strip() for text in chosen] == [entries.strip(), line]
        assert entries.startswith("@misc{zhao2020,")
        assert line == replayed_by(read_run(page.parent))


def test_a_page_fits_and_its_answer_is_that_of_its_rows(page: Path) -> None:
    seen = looked(page)
    answer_and_chart_come_first(seen, "chart" if page.parent.name == "batch_size" else "picture")
    assert check_answers(page.parent) >= 1


def test_a_table_of_many_columns_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--attack", "idlg(steps=1)", "--epsilon", "10,100", "--victims", "1", "--rounds", "1")
    assert command(monkeypatch, "run", "dp", *words, "--out", str(tmp_path / "dp")) == 0
    page = tmp_path / "dp/report.html"
    assert page.read_text().count("<table class='sortable many most'>") == 2
    answer_and_chart_come_first(looked(page))
    check_answers(page.parent)
    assert {wide > tall for wide, tall in paper(page)} == {False, True}


def test_each_chart_of_a_figure_is_kept(tmp_path: Path) -> None:
    """A figure of two charts among them: the second is not the first."""
    charts = [chart([Panel("x", words, [Series("a", [1, 2], [high, 2.0])])], words) for words, high in TWO.items()]
    page = Page("kept", "Are both?", "", {}, {}, charts={"Two in one": "".join(charts), "Folded": charts[0]})
    (tmp_path / "report.html").write_text(html(page, []))
    (seen,) = looked(tmp_path / "report.html", [View(1280)], KEEP, audit=False).values()
    files = dict(seen["kept"])
    assert {*files} == {
        f"{name}.{kind}" for name in ("Two_in_one", "Two_in_one_2", "Folded") for kind in ("svg", "png")
    }
    for name, words in (("Two_in_one", "first"), ("Two_in_one_2", "second"), ("Folded", "first")):
        drawn = ElementTree.fromstring(unquote(files[f"{name}.svg"].partition(",")[2]))
        assert drawn.get("aria-label") == words
        assert words in {"".join(text.itertext()).strip() for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
        pixels = Image.open(io.BytesIO(b64decode(files[f"{name}.png"].partition(",")[2])))
        _, _, width, height = map(float, str(drawn.get("viewBox")).split())
        assert pixels.size == pytest.approx((2 * width, 2 * height), abs=1)
        assert len(pixels.convert("RGB").getcolors(2**24) or ()) > 20
    assert files["Two_in_one.png"] == files["Folded.png"] != files["Two_in_one_2.png"]


@pytest.mark.parametrize("run", RECORDED[1:], ids=lambda run: run["scenario"])
def test_the_pages_of_other_scenarios_fit(run: dict[str, Any], tmp_path: Path) -> None:
    if run["scenario"] == "text_gradients" and not (DATA / "ag_news_test.csv").is_file():
        pytest.skip(f"{DATA / 'ag_news_test.csv'} is absent: set FEDTAP_DATA_ROOT to the folder that holds it")
    play(plan(run["scenario"], run["options"]), tmp_path / "out", data_root=DATA)
    looked(tmp_path / "out/report.html")
    check_answers(tmp_path / "out")


@pytest.mark.parametrize("name", MADE)
def test_the_answer_and_the_chart_of_a_whole_run_come_first(name: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(made(name))
    answer_and_chart_come_first(looked(tmp_path / "report.html", LIGHT[1:], audit=False))
