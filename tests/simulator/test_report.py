"""The report: medians that are right, pixels that are the images', and a page that is whole and harmless."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from scipy.stats import binom
from torch import Tensor

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.report import images, pictures
from fedtap.simulator.report.charts import COLORS
from fedtap.simulator.report.columns import Column, listing, summary, table
from fedtap.simulator.report.outcomes import outcome
from fedtap.simulator.report.page import Page, as_csv, html, write
from fedtap.simulator.report.pictures import Picture, gallery, strip
from fedtap.simulator.report.script import SCRIPT
from fedtap.simulator.report.sentences import figures_said
from fedtap.simulator.scores import median_interval

EVIL = "<script>alert('x')</script> & [bold]"


def row(attack: str = "dlg", client: int = 0, **changes: Any) -> dict[str, Any]:
    settings = {"scenario": "first_leak", "attack": attack, "defence": "none", "dataset": "photos", "model": "lenet"}
    who = {"client": client, "round": 1, "seed": 0, "batch": 1, "local_steps": 1, "threat_model": "curious_server"}
    scores = {"mse": 1e-4, "psnr": 40.0, "ssim": 0.9, "lpips": 0.1, "label_correct": 1.0, "recovered": 1.0}
    scores |= {"levels": ["identical"], "recognisable": 1.0, "identical": 1.0}
    return settings | who | scores | {"psnr_blind": 12.0, "seconds": 2.0, "objective": 1e-9, "error": None} | changes


def failed(**changes: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("mse", "psnr", "ssim", "lpips", "label_correct", "recovered", "seconds", "objective"))
    empty |= dict.fromkeys(("levels", "recognisable", "identical"))
    return row(**empty, **({"error": "client 3 did not answer"} | changes))


def picture(batch: int = 1, size: int = 32, channels: int = 3, **changes: Any) -> Picture:
    original = torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))
    fields = {
        "title": "cat\nclient 0",
        "original": original,
        "reconstructions": {"dlg": (original.flip(3), 41.0), "idlg": (original.flip(2), None)},
        "blind": torch.full((channels, size, size), 0.5),
    }
    return Picture(**(fields | changes))


def about(**changes: Any) -> Page:
    fields = {
        "title": "first_leak",
        "question": "Does a gradient give away the photograph behind it?",
        "threat": "A curious server.",
        "settings": {"model": "lenet"},
        "environment": {"torch": "2"},
    }
    return Page(**(fields | changes))


def page_of(rows: list[dict[str, Any]], shown: Sequence[Picture] = (), **changes: Any) -> str:
    return html(*images.page_of(about(pictures=shown, **changes), rows))


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Heading -> cell of each line of the summary."""
    groups, columns = summary(rows, images.image_columns(rows))
    return [{column.title: column.cell(group) for column in columns} for group in groups]


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


# Summaries.


def test_a_summary_is_of_medians_over_victims() -> None:
    values = [10.0, 20.0, 31.0, 50.0, 60.0]
    levels = ["nothing", "nothing", "recognisable", "identical", "identical"]
    rows = [
        row(client=n, psnr=value, levels=[level]) for n, (value, level) in enumerate(zip(values, levels, strict=True))
    ]
    (line,) = summarised(rows)
    assert (line["n"], line["PSNR dB"], line["blind"], line["seconds"]) == ("5", "31.0 [10–60]", "12.0", "2.00")
    assert (line["recognisable"], line["identical"]) == ("60% [15–95]", "40%")


def test_swept_knobs_make_groups_and_seeds_do_not() -> None:
    rows = [
        row(attack, client, sigma=sigma, seed=seed)
        for sigma in (0.0, 0.01)
        for attack in ("dlg", "idlg")
        for client in range(2)
        for seed in range(3)
    ]
    assert [(line["sigma"], line["attack"], line["n"]) for line in summarised(rows)] == [
        (sigma, attack, "6") for sigma in ("0", "0.01") for attack in ("dlg", "idlg")
    ]


def test_epsilon_stands_for_the_defence_only_where_it_is_what_is_asked() -> None:
    plain = [row(epsilon=float(number), defence=f"noise({number})") for number in (1, 2)]
    assert [column.title for column in images.chosen(plain)] == ["defence"]
    asked = [{**one, "success": 0.5} for one in plain]
    assert [column.title for column in images.chosen(asked)] == ["ε"]
    alike = [{**one, "epsilon": 1.0} for one in asked]
    assert [column.title for column in images.chosen(alike)] == ["defence"]


def test_a_failed_client_is_counted_and_spoils_no_median() -> None:
    (line,) = summarised([row(psnr=40.0), failed(client=1), row(client=2, psnr=50.0)])
    assert (line["n"], line["PSNR dB"], line["recognisable"]) == ("3 (1 failed)", "45.0 [40–50]", "100% [16–100]")
    (line,) = summarised([failed()])
    assert (line["n"], line["PSNR dB"], line["recognisable"]) == ("1 (1 failed)", "–", "–")
    (line,) = summarised([row(psnr=40.0)])
    assert line["PSNR dB"] == "40.0"


def test_a_guess_with_nan_counts_as_not_recovered() -> None:
    (line,) = summarised([row(), row(client=1, psnr=None, psnr_images=None, mse=None, levels=["nothing"])])
    assert (line["PSNR dB"], line["recognisable"]) == ("40.0", "50% [1–99]")


# Batches: image by image.

HALF_LOST = {
    "batch": 2,
    "mse": 0.026,  # 15.9 dB
    "psnr": 55.9,  # the mean of 100, where PSNR is capped, and 11.8
    "psnr_images": [100.0, 11.8],
    "levels": ["identical", "nothing"],
    "psnr_blind_images": [12.0, 13.0],
}


def test_a_batch_of_which_half_is_lost_is_not_a_batch_at_56_decibels() -> None:
    rows = [row(client=n, **HALF_LOST) for n in range(3)]
    (line,) = summarised(rows)
    assert line["blind"] == "12.5"  # of six images the median lies between the two kinds
    text = shown(rows)
    assert "3×2" in text
    assert "50% [12–88]" in text
    assert "55.9 [12–100]" in text  # and its interval says that it stands for no image
    page = page_of(rows)
    assert "3 of 6 images recognisable (95 % interval 12–88 %), 3 of them identical" in page


def test_an_interval_holds_its_median_and_of_few_values_is_their_range() -> None:
    for count in range(1, 40):
        low, high = median_interval([float(value) for value in range(count)])
        rank = int(low)
        assert low + high == count - 1  # as many order statistics are left out on either side
        assert rank == 0 or 2 * binom.cdf(rank, count, 0.5) <= 0.05  # how often the median lies outside
        assert rank == (count - 1) // 2 or 2 * binom.cdf(rank + 1, count, 0.5) > 0.05  # it could not be narrower


@given(st.integers(0, 40), st.integers(1, 40))
def test_every_share_has_clopper_and_pearsons_interval(won: int, more: int) -> None:
    rows = [row(levels=["recognisable"] * won + ["nothing"] * more)]
    low, high = outcome(rows).interval
    assert low <= won / (won + more) <= high
    assert binom.sf(won - 1, won + more, low) == pytest.approx(0.025, abs=1e-6) or won == 0
    assert binom.cdf(won, won + more, high) == pytest.approx(0.025, abs=1e-6)


def test_a_psnr_that_the_user_names_is_the_only_measure_of_its_page() -> None:
    rows = [row(success_db=20.0, psnr_images=[25.0, 19.0], levels=["nothing", "recognisable"])]
    assert (outcome(rows).won, outcome(rows).identical) == (1, None)
    page = page_of(rows)
    assert "1 of 2 images ≥20 dB" in page
    assert "recognisable" not in page.partition("<h2>Summary")[0]
    assert re.findall(r"<th [^>]*>(≥20 dB|recognisable|identical)</th>", page.split("<h2>Every row")[1]) == ["≥20 dB"]


# The answer and the banner.


def test_the_answer_is_what_the_rows_say_whatever_was_expected() -> None:
    question = "Does it leak?\n\nExpect: nothing comes back."
    page = Parsed(page_of([row(client=n) for n in range(8)], question=question)).text
    answer = "dlg: 8 of 8 images recognisable (95 % interval 63–100 %), 8 of them identical; "
    answer += "median 40.0 dB (blind guess 12.0 dB)."
    assert page.index("Does it leak?") < page.index(answer) < page.index("Expect: nothing comes back.")
    assert "Read this first" not in page
    lost = [row(client=n, psnr=9.0, levels=["nothing"]) for n in range(8)]
    assert images.answers(lost)[0].startswith("dlg: 0 of 8 images recognisable (95 % interval 0–37 %)")


def test_a_sweeps_answer_names_each_setting_or_the_two_ends() -> None:
    def swept(count: int) -> list[dict[str, Any]]:
        return [row(sigma=n / 10, levels=["nothing" if n else "identical"], psnr=40.0 - n) for n in range(count)]

    (few,), (many,) = images.answers(swept(2)), images.answers(swept(9))
    assert few == (
        "dlg, images recognisable (blind guess 12.0 dB): sigma 0: 1 of 1, 40.0 dB; sigma 0.1: 0 of 1, 39.0 dB."
    )
    assert many.startswith("dlg: over 9 settings from 0 of 1 image (sigma 0.8) to 1 of 1 (sigma 0) recognisable")


def test_a_failed_attack_is_no_answer_about_privacy() -> None:
    (said,) = images.answers([failed(), failed(client=1)])
    assert said == "dlg: no result; 2 victims without a result."
    (said,) = images.answers([row(), failed(client=1)])
    assert said.endswith("; 1 victim without a result.")


@pytest.mark.parametrize(
    ("rows", "finished", "said"),
    [
        (
            [row(), failed(client=1)],
            True,
            "1 of 2 rows hold no result, so shares are of the others: dlg: client 3 did not",
        ),
        ([row()], False, "This run is not finished"),
        ([row(unexplained=0.4), row(client=1, unexplained=0.02)], True, "dlg did not converge on 1 victim:"),
        ([row(doubts="all gradients are zero")], True, "The gradient is doubted: all gradients are zero"),
        ([row(unexplained=0.4, defence="noise(0.1)"), row(client=1, unexplained=None, doubts=None)], True, ""),
        ([row()], True, ""),
    ],
)
def test_what_is_wrong_with_a_run_stands_above_its_answer(
    rows: list[dict[str, Any]], finished: bool, said: str
) -> None:
    page = Parsed(page_of(rows, finished=finished)).text
    if not said:
        assert "Read this first" not in page
        return
    assert page.index("Read this first") < page.index(said) < page.index("Answer")
    assert {column.name for column in images.chosen(rows)} <= {"defence"}  # doubts are no settings


def test_a_leak_is_said_in_words_and_in_the_colour_of_alarm() -> None:
    found = page_of([row()], [picture(levels={"dlg": ["identical"], "idlg": ["nothing"]})])
    assert re.findall(r"<span class='(\w+)'>([^<]+)</span>", found)[0] == ("leak", "identical, 41.0 dB")
    assert "green" not in shown([row()])
    batch = picture(batch=3, levels={"dlg": ["identical", "nothing", "recognisable"]})
    assert "2 of 3 recognisable, 41.0 dB" in page_of([], [batch])
    none = picture(levels={"dlg": ["nothing"]})
    assert "<span class='pale'>nothing, 41.0 dB" in page_of([], [none])


def shown(rows: list[dict[str, Any]]) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table(rows, images.image_columns(rows), images.notes(rows)))
    return console.export_text()


def test_the_terminals_table_leaves_out_what_another_knob_tells() -> None:
    """One client is heard alone and more in sums, so clients tell the listener; others do not tell clients."""
    settings = [
        ("1", "honest", "curious_server"),
        ("5", "honest", "sums"),
        ("9", "honest", "sums"),
        ("9", "silent", "sums"),
    ]
    rows = [
        row(clients=clients, others=others, threat_model=threat_model) for clients, others, threat_model in settings
    ]
    headings = [str(column.header) for column in table(rows, images.image_columns(rows)).columns]
    assert headings[:3] == ["clients", "others", "attack"]
    assert "threat_model" in [column.name for column in images.chosen(rows)]


def test_the_table_shows_figures_knobs_and_failures() -> None:
    text = shown([row(sigma=0.0), row(client=1, sigma=0.0, psnr=50.0), failed(sigma=0.01, attack="idlg [bold]")])
    assert "45.0 [40–50]" in text
    assert "1 (1 failed)" in text
    assert re.search(r"sigma\s.*attack\s.*PSNR dB", text)
    assert "idlg [bold]" in text
    assert "0.01" in text


def test_a_table_of_nothing_is_empty() -> None:
    assert "PSNR" in shown([])


def test_what_is_no_knob_makes_no_groups_and_reasons_are_said_once() -> None:
    reason = "LPIPS needs 31 pixels a side [here]."
    rows = [
        row(
            client=n,
            unit=f"part_0-{n}",
            settings=f"DLG({n})",
            accuracy=n / 4,
            labels=[n],
            lpips=None,
            lpips_note=reason,
        )
        for n in range(4)
    ]
    (line,) = summarised(rows)
    assert (images.chosen(rows), line["n"], line["LPIPS"]) == ([], "4", "–")
    assert shown(rows).count(reason) == 1
    assert page_of(rows).count(reason) == 1


# The strip.


def test_the_strip_holds_the_originals_pixels_enlarged_to_whole_squares() -> None:
    image = picture()
    page = opened(strip([image])).convert("RGB")
    assert image.original is not None
    expected = (image.original[0] * 255).round().byte().permute(1, 2, 0)
    found = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(page.height, page.width, 3)
    enlarged = expected.repeat_interleave(6, 0).repeat_interleave(6, 1)
    x, y = pictures.MARGIN + 150, pictures.MARGIN + 24 + 12
    assert torch.equal(found[y : y + 192, x : x + 192], enlarged)


def test_the_strip_has_a_row_for_each_victim_up_to_eight() -> None:
    heights = [opened(strip([picture()] * count)).height for count in (1, 2, 8, 20)]
    assert heights[1] - heights[0] == pictures.CELL + pictures.CAPTION
    assert heights[2] == heights[3]


@pytest.mark.parametrize(
    "shown",
    [
        [],
        [picture(batch=5), picture(batch=1)],
        [picture(channels=1)],
        [picture(size=300)],
        [picture(size=1)],
        [picture(original=None)],
        [picture(original=None, blind=None, reconstructions={})],
        [picture(blind=None, title="")],
        [
            picture(
                title=EVIL * 4,
                reconstructions={
                    "Refine(CoarseGIT(), InvertingGradients(steps=2000, σ=0.1))" * 3: (
                        picture().blind.expand(1, -1, -1, -1),
                        1.0,
                    )
                },
            )
        ],
        [
            picture(reconstructions={"dlg": (torch.full((1, 3, 32, 32), float("nan")), None)}),
            picture(reconstructions={}),
        ],
    ],
)
def test_pictures_of_every_kind_are_shown(shown: list[Picture]) -> None:
    assert opened(strip(shown)).format == "PNG"
    assert page_of([row()], shown).endswith("</html>\n")


def test_originals_have_no_column_where_none_is_known() -> None:
    assert pictures.columns_of([picture(original=None)]) == ["dlg", "idlg", "blind guess"]
    assert pictures.columns_of(
        [picture(), picture(original=None, reconstructions={"linear": (torch.zeros(1, 3, 2, 2), 1.0)})]
    ) == [
        "original",
        "dlg",
        "idlg",
        "linear",
        "blind guess",
    ]


def test_the_blind_guess_is_captioned_with_its_own_psnr() -> None:
    truth = torch.full((2, 3, 8, 8), 0.6)
    _, decibels = picture(reconstructions={}, original=truth, blind=torch.full((3, 8, 8), 0.5)).cell("blind guess")
    assert decibels == pytest.approx(20.0, abs=1e-4)


# The page.


class Parsed(HTMLParser):
    """Every tag and attribute of a page; that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_self_contained() -> None:
    text = page_of([row(client=n) for n in range(3)], [picture(), picture(batch=4)])
    page = Parsed(text)
    assert page.open == []
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert text.count("<script") == text.count(f"<script>{SCRIPT}</script>") == 1
    assert "//" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    for words in ("Does a gradient give away", "A curious server.", "lenet", "40.0", "Every row", "Environment"):
        assert words in page.text


def test_the_pages_pictures_are_the_images_pixel_for_pixel() -> None:
    image = picture()
    (first, *_) = re.findall(r"base64,([A-Za-z0-9+/=]+)", page_of([], [image]))
    found = pixels(opened(base64.b64decode(first)).convert("RGB"))
    assert image.original is not None
    assert torch.equal(found, (image.original[0] * 255).round().byte().permute(1, 2, 0))


def pixels(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def test_nothing_in_a_run_becomes_markup() -> None:
    told = {"settings": {EVIL: EVIL}, "environment": {EVIL: EVIL}, "notes": [EVIL], "alarms": [EVIL], "answers": [EVIL]}
    shown = [picture(title=EVIL, reconstructions={EVIL: (torch.zeros(1, 3, 32, 32), 2.0)})]
    named = about(title=EVIL, question=EVIL, threat=EVIL, charts={EVIL: ""}, pictures=shown, **told)
    rows = [row(attack=EVIL, defence=EVIL), failed(error=EVIL, client=EVIL)]
    page = Parsed(html(*images.page_of(named, rows)))
    assert page.tags.count("script") == 1
    assert "bold" not in page.tags
    assert page.text.count("alert('x')") >= 8


def test_settings_that_do_not_vary_are_left_out_of_the_rows() -> None:
    text = page_of([row(sigma=0.0), row(client=1, sigma=0.5)])
    headings = re.findall(r"<th [^>]*>(.*?)</th>", text.split("<h2>Every row")[1])
    assert headings[:4] == ["sigma", "attack", "client", "round"]
    assert "threat_model" not in headings
    assert "error" not in headings


def test_a_leak_attacked_without_the_truth_has_a_page_too() -> None:
    unknown = dict.fromkeys(("mse", "psnr", "ssim", "lpips", "label_correct", "recovered", "psnr_blind", "levels"))
    page = Parsed(page_of([row(**unknown)], [picture(original=None)]))
    assert "Every row" in page.text
    assert not {"Answer", "None", "nan"} & set(page.text.split())


def test_write_leaves_a_strip_and_a_page_and_nothing_half_done(tmp_path: Path) -> None:
    write(tmp_path / "out", about(pictures=[picture()]), [row()])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "report.html",
        "rows.csv",
        "strip.png",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(FedtapError, match="could not be written"):
        write(tmp_path / "file", about(pictures=[picture()]), [row()])


def test_a_swept_number_is_drawn_as_a_curve() -> None:
    rows = [
        row(attack, client, sigma=sigma, psnr=30.0 - 20 * sigma)
        for sigma in (0.0, 0.01, 0.5)
        for attack in ("dlg", "lti <b>")
        for client in range(3)
    ]
    page = page_of(rows)
    chart = page[page.index("<h2>PSNR against sigma</h2>") :].partition("<h2>Summary")[0]
    assert "<summary>MSE against sigma</summary>" in chart
    assert "sigma (3 images a point)" in chart
    assert "lti &lt;b&gt;" in chart
    assert "<b>" not in chart
    assert chart == page_of(rows)[page.index("<h2>PSNR against sigma</h2>") :].partition("<h2>Summary")[0]
    follows = [
        each | {"defence": f"noise({each['sigma']})", "pairs": 10 if "lti" in each["attack"] else None} for each in rows
    ]
    legend = page_of(follows)
    assert "defence noise" not in legend.partition("<h2>Summary")[0].partition("<h2>PSNR against sigma</h2>")[2]
    for flat in ([row(sigma=0.0), row(client=1, sigma=0.0)], [row(model="lenet"), row(model="vit")], [failed()]):
        assert "<h2>PSNR against sigma</h2>" not in page_of(flat)


# The order of the page, and who reads it.


def test_the_page_answers_first_and_folds_what_few_need() -> None:
    rows = [row(client=n, sigma=sigma) for sigma in (0.0, 0.5) for n in range(5)]
    told = {"question": "Does it?\n\nExpect: it does.", "settings": {"model": "vit", "size": 32}}
    text = page_of(rows, [picture(title=f"victim {n}") for n in range(4)], **told, defaults={"size": "32"})
    parts = ("dlg, images recognisable", "<h2>PSNR against", "<h2>Pictures", "<summary>2 more", "<summary>MSE against")
    parts += ("<h2>Summary", "<h2>Every row", "<h2>What was expected", "<h2>Threat model", "<h2>Settings")
    parts += ("<dt>model", "<summary>1 setting at its default", "<dt>size", "<summary>Environment")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    first, folded = text.split("<summary>2 more")
    assert ("victim 1" in first, "victim 2" in first, "victim 2" in folded) == (True, False, True)
    assert "Every setting is at its default." in page_of(rows, settings={"size": 32}, defaults={"size": "32"})


def test_every_table_has_a_caption_headings_with_a_scope_and_a_box_that_keys_scroll() -> None:
    text = page_of([row(client=n, sigma=n % 2) for n in range(9)], [picture()])
    assert (
        text.count("<table") == text.count("<caption>") == text.count("class='scroll' role='region' tabindex='0'") == 3
    )
    assert not re.search(r"<th(?! scope='(col|row)')", text.replace("<thead", ""))


def test_text_and_lines_are_told_from_a_light_and_a_dark_page() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one: str, other: str) -> float:  # WCAG 2.2, relative luminance
        dark, light = sorted(map(luminance, (one, other)))
        return (light + 0.05) / (dark + 0.05)

    text = page_of([])
    themes = [dict(re.findall(r"--(\w+): (#\w+)", some)) for some in text.split("prefers-color-scheme: dark")[:2]]
    for theme in themes:
        full = {
            name: color if len(color) == 7 else "#" + "".join(2 * sign for sign in color[1:])
            for name, color in theme.items()
        }
        for ink in ("ink", "pale", "alarm"):
            assert min(contrast(full[ink], full[paper]) for paper in ("paper", "panel")) >= 4.5, (ink, full)
        assert min(contrast(color, full["paper"]) for color in COLORS) >= 3


def test_an_answer_about_other_data_tells_the_first_figure_beside_the_blind_guess() -> None:
    columns = (Column("client", over="rows"), Column("exact_tokens", form=".3g"), Column("blind", form=".3g"))
    rows = [
        {"attack": "dager", "client": n, "layers": layers, "exact_tokens": 1 - n / 4 - layers / 8, "blind": 0.1}
        for layers in (0, 2)
        for n in range(2)
    ]
    (one,) = figures_said(rows[:2], columns)
    assert one == "dager: exact tokens 0.875 (median of 2, 0.75 to 1); blind guess 0.1."
    (swept,) = figures_said(rows, columns)
    assert swept.startswith("dager: exact tokens (blind guess 0.1): layers 0: 0.875 (median of 2")
    assert "; layers 2: 0.625" in swept
    many = [dict(rows[0], layers=n, exact_tokens=n / 10) for n in range(10)]
    (ends,) = figures_said(many, columns)
    assert "over 10 settings from 0 (layers 0) to 0.9 (layers 9)" in ends
    assert figures_said(rows, columns, leads="blind")[0].startswith("dager: blind")
    assert figures_said([{"attack": "dager", "error": "no reply"}], columns) == []


def test_a_table_for_spreadsheets_has_every_value_and_no_formula() -> None:
    rows = [{"a": 1.5, "b": "=1+1", "levels": ["nothing", "identical"]}, {"a": None, "c": True}]
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [dict(row) for row in read] == [
        {"a": "1.5", "b": "'=1+1", "levels": '["nothing", "identical"]', "c": ""},
        {"a": "", "b": "", "levels": "", "c": "True"},
    ]


def test_of_a_large_batch_the_best_and_the_worst_are_shown() -> None:
    original = torch.full((20, 3, 8, 8), 0.5)
    found = original + torch.linspace(0.4, 0.0, 20).view(-1, 1, 1, 1)
    picture = Picture("client 0", original, {"idlg": (found, 10.0)}, original[:1])
    some = picture.some()
    assert some.original is not None
    assert torch.equal(some.reconstructions["idlg"][0], found[[19, 18, 17, 16, 15, 3, 2, 1, 0]])
    assert "5 best and 4 worst of 20" in some.title
    small = Picture("client 0", original[:9], {"idlg": (found[:9], 10.0)}, None)
    assert small.some() is small
    assert "All images of these batches" in gallery([picture])
    assert "All images of these batches" in gallery([small, small, picture])  # also of one that is folded itself
    assert "All images of these batches" not in gallery([small])


def test_a_run_without_a_promise_stands_beside_one_with_it() -> None:
    promise = {"protects": "client", "adjacency": "replace", "sensitivity": 2.0, "success": 0.6, "epsilon": 1.0}
    (column,) = (one for one in images.image_columns([row(**promise), row()]) if one.name == "protects")
    assert [column.cell([one]) for one in (row(**promise), row())] == ["a client, replace, sensitivity 2", "–"]


def test_many_attacks_share_the_sentence_of_those_that_bring_back_as_much() -> None:
    rows = [row(f"a{number}", levels=["nothing" if number < 6 else "identical"]) for number in range(9)]
    most, least, blind = images.answers([*rows, failed(attack="b")])[:2] + images.answers(rows)[-1:]
    assert most.startswith("1 of 1 image recognisable (95 % interval 2–100 %): a6 (40.0 dB), a7 (40.0 dB)")
    assert least.startswith("0 of 1 image recognisable (95 % interval 0–98 %): a0 (40.0 dB), a1")
    assert blind == "Blind guess: 12.0 dB; figures in brackets are medians."
    assert images.answers([*rows, failed(attack="b")])[2] == "No result: b."
    assert [*images.curves(rows)] == ["PSNR of each attack"]
    defended = [row(defence=defence) for defence in ("none", "sign()", "prune(0.9)", "clip(1)", "a", "b")]
    assert [*images.curves(defended)] == ["PSNR of each defence"]
    assert images.curves(defended[:3]) == {}


def test_settings_that_are_the_same_in_every_line_of_a_wide_table_stand_below_it() -> None:
    columns = [Column("kind", over="same"), Column("what", over="same"), *(Column(f"c{n}") for n in range(20))]
    rows = [{"kind": "<b>", "what": n} | {f"c{m}": m + 0.5 for m in range(20)} for n in range(3)]
    wide, narrow = (listing([[one] for one in rows], some) for some in (columns, columns[:6]))
    assert "In every line kind: &lt;b&gt;." in wide
    assert ">kind</th>" not in wide
    assert ">what</th>" in wide
    assert "In every line" not in narrow
    assert ">kind</th>" in narrow
