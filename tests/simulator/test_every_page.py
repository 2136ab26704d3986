"""The page of every scenario with all its attacks and sweeps, of audits and of results, in Chromium: `pytest -m pages`.

The attacks take a few steps alone, so that what comes back is little, but each page has the columns, charts and
sentences of a whole run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.checkpoints import tasks
from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.gradients import dp
from fedtap.simulator.attack import Attack, Learned, Learner
from tests.scenarios.test_recorded_rows import DATA, RECORDED
from tests.support.answers import check_answers
from tests.support.browser import answer_and_chart_come_first, looked, needs_chromium
from tests.support.diffusion import installed, tiny
from tests.support.played import command, play

pytestmark = [pytest.mark.pages, needs_chromium]

STEPS = {"steps": 3, "epochs": 1, "rounds": 1, "samples": 3, "pairs": 60}
"""Field of an attack -> what it is at most."""

_IMAGES = {"size": 16, "victims": 2, "pairs": 60}

_DOCUMENTS = {"model": "decoder(width=16, layers=1, heads=2)", "tokens": 14, "documents": 24, "corpus": 160}
_DOCUMENTS |= {"candidates": 12, "selected": 20, "epochs": 2, "learning_rate": 5e-3, "retrainings": 0}

_TUNED = {"private": 2, "batch": 2, "local_steps": 2, "learning_rate": 1e-3, "encoder": "pixels"}

_RECORDED = {run["scenario"]: {name: v for name, v in run["options"].items() if name != "attack"} for run in RECORDED}

SMALL: dict[str, Mapping[str, object]] = {
    "attention": {"n": 3, "d": 3, "victims": 3},
    "attention_vit": {"size": 8, "victims": 3},
    "batch_size": {"victims": 2},
    "canary": _RECORDED["canary"],
    "defences": {},
    "dp": {"rounds": 1},
    "drift": _IMAGES | {"local_samples": 100},
    "fedavg_defended": {"rounds": 1},
    "fedprox": {"width": 8, "examples": 3, "features": 4, "victims": 2},
    "finextract": _TUNED,
    "finextract_clients": _TUNED,
    "finextract_defences": _TUNED,
    "finextract_lora": _TUNED,
    "first_leak": {},
    "git": {"size": 16, "pairs": 60},
    "head_start": _IMAGES,
    "local_steps": _IMAGES,
    "noise": _IMAGES | {"model": "lenet(width=3)"},
    "pairs": _RECORDED["pairs"],
    "posterior": _RECORDED["posterior"],
    "posterior_features": {"samples": 500, "pseudo": 20},
    "posterior_shards": _RECORDED["posterior_shards"],
    "repeat": {"size": 16, "victims": 2},
    "secagg": {},
    "select_ag_news": _DOCUMENTS | {"documents": 16},
    "select_clients": _DOCUMENTS,
    "select_dp": _DOCUMENTS,
    "select_topic": _DOCUMENTS,
    "shift": _IMAGES,
    "text_gradients": _RECORDED["text_gradients"],
    "tuning": _IMAGES | {"model": "mlp(width=8, depth=1)", "attack": "lti(width=8),coarse_git"},
    "vulnerability": {"configurations": 4},
    "wrong_architecture": _IMAGES,
}
"""Options with which a scenario takes seconds."""

HEADLINES = {"first_leak": "picture"} | dict.fromkeys(("secagg", "dp", "defences", "vulnerability", "git"), "chart")
"""Scenario -> what stands below the answer in the first pixels of its page."""


def shorter(attack: Any) -> Any:
    """The attack with a few steps; one that has learned stays as it is."""
    names = {} if isinstance(attack, Learned) else {field.name for field in dataclasses.fields(attack) if field.init}
    new = {name: min(getattr(attack, name), most) for name, most in STEPS.items() if name in names}
    return dataclasses.replace(attack, **new) if new else attack


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks take a few steps, and are called as before."""
    call, fit = Attack.__call__, Learner.fit
    monkeypatch.setattr(Attack, "__call__", lambda attack, leak, **more: call(shorter(attack), leak, **more))
    monkeypatch.setattr(Learner, "fit", lambda attack, pairs, seed=0: fit(shorter(attack), pairs, seed))
    monkeypatch.setattr(tasks, "PRETRAINED_ON", 12)
    monkeypatch.setattr(tasks, "TESTED", 30)
    monkeypatch.setattr(dp, "TRIALS", 200)
    for cached in (tasks.topics, tasks.news):
        cached.cache_clear()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_page_of_every_scenario(name: str, tmp_path: Path) -> None:
    options = {option: str(value) for option, value in SMALL[name].items()}
    if name.startswith("finextract"):
        installed()
        options["weights"] = tiny()
    if name in ("text_gradients", "select_ag_news") and not (DATA / "ag_news_test.csv").is_file():
        pytest.skip(f"{DATA / 'ag_news_test.csv'} is absent: set FEDTAP_DATA_ROOT to the folder that holds it")
    play(plan(name, options), tmp_path / "out", data_root=DATA)
    seen = looked(tmp_path / "out/report.html")
    if name in HEADLINES:
        answer_and_chart_come_first(seen, HEADLINES[name])
    assert check_answers(tmp_path / "out") or name == "canary"  # which has a chart and a table alone


def test_the_page_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in {
        "first_leak": ("--victims", "2"),
        "secagg": ("--clients", "1,3", "--victims", "2"),
        "dp": ("--rounds", "1", "--victims", "1"),
        "git": ("--size", "16", "--pairs", "60", "--victims", "1"),
    }.items():
        assert command(monkeypatch, "run", name, *words, "--out", str(tmp_path / "runs" / name)) == 0
    assert command(monkeypatch, "results", "build", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")) == 0
    looked(tmp_path / "page.html")


def test_the_page_of_an_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Path(__file__).parents[1] / "apps/quickstart"
    assert command(monkeypatch, "audit", str(app), "--out", str(tmp_path / "out"), "--minutes", "1.5") == 0
    looked(tmp_path / "out/report.html")


def test_the_page_of_a_promise_that_is_refuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promise = ("--epsilon", "1", "--delta", "1e-5", "--clip", "1", "--seconds", "30", "--out", str(tmp_path / "out"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=":")
    assert command(monkeypatch, "audit-dp", "tests.support.dp_mechanisms:half_sigma", *promise) == 3
    looked(tmp_path / "out/audit_dp.html")
