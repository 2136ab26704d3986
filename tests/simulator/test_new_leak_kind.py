"""A new kind of leak is four files (tests/support/moments), and gets from the one loop what every other kind gets."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtap.attackers import ATTACKS, loaded, parse, suited
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import KINDS, Leak, load
from fedtap.simulator.models.attention import architecture
from fedtap.simulator.models.registry import OWN_MODELS
from tests.scenarios.test_cli import rows, run
from tests.support.moments.leak import MomentsLeak
from tests.support.moments.pair_of_moments import PairOfMoments

FOLDER = "tests.support.moments"
QUESTION, ATTACK = f"{FOLDER}.moments:Moments", f"{FOLDER}.pair_of_moments:PairOfMoments"


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_MODELS, "")


def test_it_has_rows_a_page_and_attacks_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--records", "2,3", "--attack", f"{ATTACK},{ATTACK}(scale=0.5)", "--out", str(tmp_path))
    assert run(monkeypatch, "run", QUESTION, *words) == 0
    found = {(row["records"], row["attack"], row["client"]): row for row in rows(tmp_path)}
    assert len(found) == 2 * 2 * 3
    for client in range(3):
        two, half, three = found[2, ATTACK, client], found[2, f"{ATTACK}(scale=0.5)", client], found[3, ATTACK, client]
        assert float(two["rmse"]) < 1e-12 < 0.05 < float(half["rmse"]) < float(half["blind"])  # type: ignore[arg-type]
        assert float(three["rmse"]) > 0.05  # type: ignore[arg-type]
    page = (tmp_path / "report.html").read_text()
    assert "Do a mean and a covariance hide the records behind them?" in page
    assert "mean and covariance, and knows the number of records" in page
    assert "in the order that fits them best" in page


def test_it_resumes_and_tells_of_a_lost_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("run", QUESTION, "--lost", "1", "--out", str(tmp_path))
    assert run(monkeypatch, *words) == 0
    found = rows(tmp_path)
    assert [(row["client"], "its disk is gone" in str(row.get("error"))) for row in found] == (
        [(1, True), (0, False), (2, False)]
    )
    (kept,) = (tmp_path / "reconstructions").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(PairOfMoments, "reconstruct", lambda *_: pytest.fail("an attack is made again"))
        assert run(patch, *words, "--resume") == 0
    assert rows(tmp_path) == found
    kept.unlink()
    assert run(monkeypatch, *words, "--resume") == 0
    assert [row | {"seconds": 0} for row in rows(tmp_path)] == [row | {"seconds": 0} for row in found]


def test_an_attack_on_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "run", QUESTION, "--attack", "linear", "--out", str(tmp_path / "out")) == 2
    assert "linear brings back Reconstruction" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_its_saved_leaks_are_attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "run", QUESTION, "--out", str(tmp_path / "out")) == 0
    leak = tmp_path / "out/leaks/part_0.safetensors"
    assert run(monkeypatch, "attack", str(leak), "--attack", ATTACK, "--out", str(tmp_path / "named")) == 0
    found = load(leak, architecture)
    assert isinstance(found, MomentsLeak)
    assert found.observed["mean"].dtype == torch.float64
    with pytest.raises(FedtapError, match="No attack is tried on its own on a MomentsLeak"):
        suited(found)

    about = tmp_path / "moments-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: moments\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[fedtap.attacks]\npair_of_moments = {ATTACK}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(vars(ATTACKS), "entries", raising=False)
    try:
        assert suited(found) == "pair_of_moments"
        assert run(monkeypatch, "attack", str(leak), "--out", str(tmp_path / "unnamed")) == 0
    finally:
        vars(ATTACKS).pop("entries")
    for folder in ("named", "unnamed"):
        assert [row["attack"] for row in rows(tmp_path / folder)] == ["pair_of_moments"] * 3


def test_a_kind_that_nothing_here_reads_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "run", QUESTION, "--out", str(tmp_path / "out")) == 0
    monkeypatch.delitem(KINDS, "moments")
    with pytest.raises(FedtapError, match="a leak of the kind 'moments', and none of the attacks here is on those"):
        load(tmp_path / "out/leaks/part_0.safetensors", architecture)
    about = tmp_path / "out/leaks/part_0.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"kind": ["gradient"]}))
    with pytest.raises(FedtapError, match="of the kind"):
        load(about.with_suffix(".safetensors"), architecture)


@pytest.mark.parametrize("kind", ["gradient", "moments", "weights", "buffers", "two words", ""])
def test_the_name_of_a_kind_is_one_word_that_is_not_taken(kind: str) -> None:
    before = dict(KINDS)
    with pytest.raises(FedtapError, match=f"calls its kind of leak .?{kind}"):
        type("Other", (Leak,), {"kind": kind})
    assert before == KINDS


@pytest.mark.parametrize(
    ("kind", "attack"),
    [("posterior", "posterior_mmd"), ("attention", "attention_newton"), ("trained_weights", "stationary_mmd")],
)
def test_each_kind_has_one_attack_that_is_tried_on_its_own(kind: str, attack: str) -> None:
    leak = KINDS[kind].__new__(KINDS[kind])
    assert [name for name, one in loaded().items() if one.suits(leak)] == [attack]
    assert parse(attack)


def test_gradients_of_texts_have_an_attack_of_their_own() -> None:
    from fedtap.simulator.models.language import build_language

    gpt = build_language("gpt(width=8, heads=2)", 4, 12)
    for network, attack in ((gpt, "dager"), (nn.Identity(), "idlg")):
        for kind in ("gradient", "update"):
            leak = KINDS[kind].__new__(KINDS[kind])
            object.__setattr__(leak, "network", network)
            assert [name for name, one in loaded().items() if one.suits(leak)] == [attack]
