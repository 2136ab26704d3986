"""Scenarios about trained models: what is refused before any work, resumed runs, and the choices of their options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedtap.attackers.posteriors.fisher import ESTIMATORS
from fedtap.attackers.posteriors.posterior_mmd import OPTIMISERS
from fedtap.clients.bayesian import SAMPLERS
from fedtap.clients.stationary import PRECISIONS, TRAININGS
from fedtap.scenarios import SCENARIOS
from fedtap.scenarios.checkpoints.stationary import Case
from fedtap.scenarios.command.plan import plan
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.registry import ACTIVATIONS
from fedtap.simulator.options import options_of
from tests.support.played import check_resumed, check_truth, play

SMALL = {"width": "24", "examples": "3", "features": "4", "victims": "2"}
QUICK = "stationary_mmd(restarts=5,rounds=2,steps=20)"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": "4096", "depth": "8"}, "fill gigabytes"),
        ({"attack": "stationary_mmd(surplus=1e9)"}, "fill gigabytes"),
        ({"regulariser": "weight_decay(1e-300)"}, "lost in the losses' rounding"),
        ({"regulariser": "max_margin"}, "write weight_decay"),
        ({"attack": "idlg"}, "--attack idlg is none on a trained model's weights: write stationary_mmd"),
    ],
)
def test_it_is_refused_before_any_work(options: dict[str, str], said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        plan("fedprox", options)


@pytest.mark.filterwarnings("ignore:.*no stationary point")
def test_a_run_is_resumed_after_its_first_setting(tmp_path: Path) -> None:
    few = {"width": "8,9", "training": "adam", "attack": "stationary_mmd(restarts=2,rounds=1,steps=2)"}
    check_resumed(plan("fedprox", SMALL | few), tmp_path)


def test_other_private_rows_move_the_scores_and_no_reconstruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strangers(case: Case, seed: int, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        return case.table(seed, case.examples, "strangers", client)

    settings = plan("fedprox", SMALL | {"victims": "1", "attack": QUICK})
    honest, deceived = check_truth(settings, tmp_path, monkeypatch, Case, "private", strangers)
    for one, other in zip(honest, deceived, strict=True):
        assert (one["recovered"], other["recovered"]) == (1, 0)
        for name in ("residual", "left", "unexplainable", "layer_rank"):
            assert one[name] == other[name]


def test_two_attacks_are_told_apart_by_how_they_are_written(tmp_path: Path) -> None:
    both = "stationary_mmd(restarts=2,rounds=1,steps=3),stationary_mmd(restarts=2,rounds=1,steps=2)"
    rows = play(plan("fedprox", SMALL | {"attack": both}), tmp_path / "out")
    assert [(row["attack"].count("steps=3"), row["client"]) for row in rows] == [(1, 0), (1, 1), (0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("scenario", "option", "choices"),
    [
        ("fedprox", "activation", tuple(ACTIVATIONS)),
        ("fedprox", "training", TRAININGS),
        ("fedprox", "precision", PRECISIONS),
        ("posterior", "sampler", SAMPLERS),
        ("posterior", "estimator", ESTIMATORS),
        ("posterior", "optimiser", OPTIMISERS),
        ("posterior_shards", "sampler", SAMPLERS),
    ],
)
def test_an_option_has_the_choices_of_what_it_names(scenario: str, option: str, choices: tuple[str, ...]) -> None:
    assert options_of(SCENARIOS[scenario])[option].choices == choices


def test_options_are_read_without_torch_flwr_and_numpy() -> None:
    names = ["posterior", "posterior_shards", "posterior_features", "fedprox", "vulnerability"]
    code = (
        "import sys\n"
        "for name in ('torch', 'flwr', 'numpy'): sys.modules[name] = None\n"
        "from fedtap.scenarios import SCENARIOS\n"
        "from fedtap.simulator.options import options_of\n"
        f"print(*('attack' in options_of(SCENARIOS[name]) for name in {names}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * len(names)
