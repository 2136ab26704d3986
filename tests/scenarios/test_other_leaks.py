"""Studies from the command line: what they refuse before any work, and what is made of the leaks that they leave."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtap.scenarios.command.main import main
from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.deploy import check_node_count
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.wire.messages import client_failed


def fedtap(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Raises SystemExit where it is refused."""
    monkeypatch.setattr(sys, "argv", ["fedtap", *map(str, words)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which main replaces
    try:
        main()
    except SystemExit as done:
        if done.code:
            raise


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("attention --n 256 --d 256 --heads 64", "fill gigabytes"),
        ("attention --vocabulary 1000000 --d 256", "fill gigabytes"),
        ("attention --gamma 0.5 --attack attention_newton(gamma=0.1)", "say the same twice"),
        ("attention --attack attention_newton(restarts=5)", "add --start-near-truth 0"),
        ("text_gradients --width 4092", "lower --victims or --width"),
    ],
)
def test_a_study_refuses_before_any_work(words: str, sentence: str) -> None:
    name, *rest = words.split()
    with pytest.raises(FedtapError, match=sentence):
        plan(name, dict(zip([word.removeprefix("--") for word in rest[::2]], rest[1::2], strict=True)))


def test_a_scenario_about_images_refuses_an_attack_that_brings_back_none() -> None:
    settings = plan("first_leak", {"attack": "posterior_mmd"})
    with pytest.raises(FedtapError, match="brings back PseudoData, and first_leak is about Reconstruction"):
        settings[0].check(settings)


def test_a_client_that_refuses_is_quoted_once() -> None:
    sentence = "The inputs are dependent (beta[3] adds nothing): leave one out."
    assert str(client_failed(f"FedtapError: {sentence} (line 78 of exact)")) == sentence
    assert "KeyError: 'a'" in str(client_failed("KeyError: 'a' (line 3 of f)"))


PLAYED = {
    "posterior": ("--samples", 500, "--pseudo", 20),
    "fedprox": (
        "--width",
        8,
        "--victims",
        1,
        "--examples",
        2,
        "--attack",
        "stationary_mmd(rounds=1,restarts=2,steps=5)",
    ),
    "attention": ("--victims", 2, "--heads", 2, "--n", 3, "--d", 4, "--around", "bert", "--vocabulary", 9),
    "attention_vit": ("--victims", 1, "--size", 16, "--cut", "sum", "--attack", "attention_newton(steps=1)"),
}


@pytest.mark.parametrize(
    ("name", "attack", "column"),
    [
        ("posterior", "posterior_mmd", "sum_w"),
        ("fedprox", "stationary_mmd", "sum_w"),
        ("attention", "attention_newton", "converged"),
        ("attention_vit", "attention_newton", "converged"),
    ],
)
def test_a_saved_leak_is_attacked_by_its_own_attack(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    attack: str,
    column: str,
) -> None:
    fedtap(monkeypatch, name, *PLAYED[name], "--out", tmp_path / "run")
    capsys.readouterr()
    leak = tmp_path / "run/leaks/part_0.safetensors"
    fedtap(monkeypatch, "attack", leak, "--out", tmp_path / "attack")
    rows = [json.loads(line) for line in (tmp_path / "attack/rows.jsonl").read_text().splitlines()]
    assert {row["attack"] for row in rows} == {attack}
    assert all(row[column] is not None for row in rows)
    said = capsys.readouterr().out
    assert column.replace("_", " ") in said
    assert "PSNR" not in said
    guess = load_file(tmp_path / f"attack/reconstructions/0-{attack}.safetensors")
    assert all(torch.isfinite(tensor.double()).all() for tensor in guess.values())


def test_a_saved_leak_of_no_known_half_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fedtap(monkeypatch, "attention", "--victims", 1, "--n", 3, "--d", 4, "--out", tmp_path / "run")
    about = tmp_path / "run/leaks/part_0.json"
    about.write_text(about.read_text().replace("'nothing'", "'else'"))
    with pytest.raises(SystemExit, match="2"):
        fedtap(monkeypatch, "attack", about.with_suffix(".safetensors"), "--out", tmp_path / "attack")
    assert "no half of a model named" in capsys.readouterr().err


def test_a_study_is_deployed_on_as_many_nodes_as_it_has_clients() -> None:
    (study,) = plan("posterior_shards", {"shards": "3"})
    check_node_count(study, 3)
    with pytest.raises(FedtapError, match="--nodes 3"):
        check_node_count(study, 4)
    with pytest.raises(FedtapError, match="--nodes 5"):
        check_node_count(plan("first_leak", {"clients": "4"})[0], 4)
