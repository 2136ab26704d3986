"""`fedtap show`, `open`, `compare` and `index`: what a run left, read again."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedtap.scenarios.command.main import main
from fedtap.scenarios.command.runs import page_of_saved
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.report.columns import Column
from fedtap.simulator.report.comparison import differences, paired_interval, welch_interval
from fedtap.simulator.report.saved_run import SavedRun, read_run


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedtap", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two victims."""
    out = tmp_path_factory.mktemp("runs") / "mlp"
    with pytest.MonkeyPatch.context() as patch:
        words = ["first_leak", "--victims", "2", "--attack", "linear", "--model", "mlp"]
        assert run(patch, "run", *words, "--out", str(out)) == 0
    return out


@pytest.fixture
def copy(played: Path, tmp_path: Path) -> Path:
    """That run in a folder that a test may damage."""
    return Path(shutil.copytree(played, tmp_path / "copy"))


def changed(folder: Path, **more: Any) -> None:
    """Write these into run.json."""
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | more))


def test_show_tells_the_answer_and_the_table(
    played: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "show", str(played)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("Does a photograph come back")
    assert "linear: 2 of 2 images recognisable" in shown
    assert shown.index("linear: 2 of 2") < shown.index("PSNR dB")


def test_open_hands_the_page_to_a_browser_or_prints_where_it_is(
    played: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for there in (True, False):
        asked: list[str] = []
        monkeypatch.setattr(webbrowser, "open", lambda uri, asked=asked, there=there: asked.append(uri) or there)
        assert run(monkeypatch, "open", str(played)) == 0
        shown = capsys.readouterr().out
        assert asked == [(played / "report.html").as_uri()]
        assert str(played / "report.html") in shown
        assert ("No browser" in shown) is not there


def test_compare_is_paired_over_the_same_victims(
    played: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (copy / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        line["psnr"] -= 10
    (copy / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(monkeypatch, "compare", str(played), str(copy), "--figure", "psnr") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "linear psnr" in shown
    assert "-10 [-10, -10] 2 pairs" in shown
    one, other = read_run(played), read_run(copy)
    (of_all, *_) = differences(one, other, page_of_saved(one)[0].columns)
    assert of_all.figure == "recognisable"
    assert (of_all.low, of_all.high) == (0, 0)


def test_index_lists_every_run_and_what_is_wrong_with_one(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(copy, copy.parent / "half")
    changed(copy.parent / "half", finished=False)
    shutil.copytree(copy, copy.parent / "torn")
    (copy.parent / "torn/run.json").write_text("{")
    assert run(monkeypatch, "index", str(copy.parent)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "copy first_leak photos linear yes linear:" in shown
    assert "half first_leak photos linear no" in shown
    assert "is damaged" in shown


def test_bad_runs_end_in_one_sentence(
    played: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        assert run(monkeypatch, *words) == 2, words
        shown = capsys.readouterr()
        assert not shown.out
        assert shown.err.count("\n") == 1
        return shown.err

    nowhere, good = str(copy / "nowhere"), str(played)
    for words in (("show", nowhere), ("open", nowhere), ("compare", good, nowhere), ("compare", nowhere, good)):
        assert "holds no run" in told(*words)
    assert "There is no run in" in told("index", nowhere)
    assert "did you mean psnr?" in told("compare", good, good, "--figure", "psnrs")
    changed(copy, finished=False)
    assert "is not finished" in told("show", str(copy))
    assert "is not finished" in told("compare", good, str(copy))
    (copy / "report.html").unlink()
    assert "has no report.html" in told("open", str(copy))
    changed(copy, finished=True)
    (copy / "rows.jsonl").write_text('{"attack": NaN}\n')
    assert "rows.jsonl is damaged (line 1" in told("show", str(copy))
    changed(copy, settings=[{"attack": "other.package:Attack"}])  # a file names no code that is imported
    shutil.copy(played / "rows.jsonl", copy)
    assert run(monkeypatch, "show", str(copy)) == 0
    capsys.readouterr()
    (copy / "rows.jsonl").unlink()
    assert "has no rows" in told("show", str(copy))
    for other in (99, 1, "2", None, [2]):
        changed(copy, schema=other)
        for words in (("show", str(copy)), ("open", str(copy)), ("compare", good, str(copy))):
            assert "and this fedtap reads version 2: read it with that fedtap, or play it again" in told(*words)
    for content in ("[]", "{}", '{"name": 3}', "\udcff", '{"name": "first_leak", "versions": 7}'):
        (copy / "run.json").write_bytes(content.encode(errors="surrogateescape"))
        assert "run.json is damaged" in told("show", str(copy))


def saved(rows: list[dict[str, Any]], **about: Any) -> SavedRun:
    whole = [{"attack": "dlg", "round": 1, "seed": 0, "sigma": 0.0, "psnr_blind": 12.0} | row for row in rows]
    return SavedRun(Path("run"), {"name": "noise", "settings": [{"dataset": "photos"}]} | about, whole)


FIGURES = [Column("psnr"), Column("psnr_blind", over="hidden")]


def test_other_victims_are_compared_by_welch_and_other_settings_not_at_all() -> None:
    first = saved([{"client": n, "psnr": 20.0 + n} for n in range(3)])
    others = [{"client": n, "psnr": 30.0 + n} for n in range(4)]
    (found,) = differences(first, saved(others), FIGURES)
    assert (found.paired, found.counts, found.second - found.first) == (False, (3, 4), 10.5)
    blind = [{"client": n, "psnr": 30.0 + n, "psnr_blind": 9.0} for n in range(3)]  # the same names, other images
    assert not differences(first, saved(blind), FIGURES)[0].paired
    elsewhere = saved(others[:3], settings=[{"dataset": "cifar10"}])
    assert not differences(first, elsewhere, FIGURES)[0].paired
    assert differences(first, saved(others[:3]), FIGURES)[0].paired
    swept = saved([{"client": 0, "psnr": 9.0, "sigma": sigma} for sigma in (0.1, 0.2)])
    with pytest.raises(FedtapError, match="No attack and setting is in both"):
        differences(first, swept, FIGURES)
    both = saved([{"client": n, "psnr": 9.0, "sigma": sigma} for sigma in (0.0, 0.2) for n in range(3)])
    (at_zero,) = differences(first, both, FIGURES)
    assert at_zero.label == "dlg, sigma 0"
    with pytest.raises(FedtapError, match="lacks a result"):
        differences(first, saved([{"client": 0, "psnr": None}]), [Column("psnr")])


values = st.lists(st.floats(-50, 50).map(lambda value: round(value, 3)), min_size=2, max_size=8)


@given(values, values)
def test_intervals_are_scipys(first: list[float], second: list[float]) -> None:
    if len({*first}) > 1 or len({*second}) > 1:
        theirs = stats.ttest_ind(second, first, equal_var=False).confidence_interval()
        assert welch_interval(first, second) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    pairs = min(len(first), len(second))
    one, other = first[:pairs], second[:pairs]
    if len({round(b - a, 6) for a, b in zip(one, other, strict=True)}) > 1:
        theirs = stats.ttest_rel(other, one).confidence_interval()
        assert paired_interval(one, other) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert math.isnan(welch_interval(first[:1], second)[0])
    assert math.isnan(paired_interval(first[:1], second[:1])[0])


def test_reading_a_run_imports_no_torch(played: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedtap.simulator.report.saved_run import read_run\n"
        f"assert read_run(Path({str(played)!r})).rows\n"
        "assert not {'torch', 'flwr', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
