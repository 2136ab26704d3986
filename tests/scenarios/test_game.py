"""The game of the bound: honest runs keep under it and come close, sabotaged ones are caught."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from fedtap.attackers.parts.likelihood import most_likely
from fedtap.scenarios.app import main
from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.gradients.game import EXCESS, SABOTAGES, Game, check, defended, exchanged, expected, played
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.report.folder import Row
from fedtap.simulator.scores import limits
from tests.scenarios.test_cli import run

EPSILONS = (0.5, 1, 2, 4, 8)


def games(**knobs: str) -> tuple[Game, ...]:
    parts = plan("canary", {"exchanges": "0", **knobs})
    assert all(isinstance(part, Game) for part in parts)
    return parts  # type: ignore[return-value]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    """Every game of the scenario as it is, and those of two canaries under each sabotage: 5,000 a row, a fixed seed."""
    parts = {"none": games()} | {name: games(sabotage=name, canaries="2") for name in ("half_noise", "no_clip")}
    return {name: [played(game, len(some)) for game in some] for name, some in parts.items()}


def test_no_success_passes_its_bound(rows: dict[str, list[Row]]) -> None:
    honest = rows["none"]
    check(honest)
    for row in honest:  # and at a hundred times the doubt
        low, _ = limits(round(row["success"] * row["games"]), row["games"], 0.01 / len(honest))
        assert low <= row["bound"]
    assert {(row["canaries"], row["epsilon"]) for row in honest} == {
        (k, epsilon) for k in (2, 10) for epsilon in EPSILONS
    }
    assert all(row["games"] >= 5000 and row["success_low"] <= row["success"] <= row["success_high"] for row in honest)


def test_the_best_attacker_comes_as_close_as_it_can(rows: dict[str, list[Row]]) -> None:
    for row in rows["none"]:
        if row["canaries"] == 2:
            assert row["success"] >= 0.95 * row["bound"]
            assert row["expected"] == pytest.approx(row["bound"])
        spread = math.sqrt(row["expected"] * (1 - row["expected"]) / row["games"])
        assert abs(row["success"] - row["expected"]) < 4 * spread
        assert 1 / row["canaries"] < row["expected"] <= row["bound"] + 1e-9 <= row["bound_renyi"] + 2e-9


@pytest.mark.parametrize("sabotage", ["half_noise", "no_clip"])
def test_sabotage_is_caught_at_every_epsilon(sabotage: str, rows: dict[str, list[Row]]) -> None:
    for row in rows[sabotage]:
        with pytest.raises(FedtapError, match=r"theory allows .* is not what is announced"):
            check([row])


def test_a_row_says_what_it_is_about(rows: dict[str, list[Row]]) -> None:
    said = {"protects": "client", "adjacency": "add/remove", "sensitivity": 1.0, "delta": 1e-5, "accuracy": None}
    for row in rows["none"]:
        assert said.items() <= row.items()
        assert row["defence"] == f"clip(1.0)+noise({row['sigma']!r})"
    assert all("clip" not in row["defence"] for row in rows["no_clip"])


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_games_alone_are_those_of_the_federation(sabotage: str) -> None:
    (game,) = games(canaries="3", epsilon="2", games="6", sabotage=sabotage)
    by_message = exchanged(dataclasses.replace(game, exchanges=6))
    torch.testing.assert_close(by_message, defended(game), rtol=1e-5, atol=1e-5)
    mixed = dataclasses.replace(game, exchanges=4)
    torch.testing.assert_close(torch.cat([exchanged(mixed), defended(mixed)]), by_message, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [2, 3, 10])
def test_canaries_are_corners_of_a_simplex_and_far_beyond_the_clip(many: int) -> None:
    (game,) = games(canaries=str(many), epsilon="1")
    flat = torch.cat([gradient.flatten(1) for gradient in game.gradients.values()], dim=1)
    corners = game.length**2 * (torch.eye(many) * many - 1) / (many - 1)  # two of them: opposite
    torch.testing.assert_close(flat @ flat.T, corners, rtol=1e-4, atol=1e-2)
    assert game.length >= EXCESS * game.clip


def test_expected_success_of_two_is_phi_of_clip_over_sigma() -> None:
    (game,) = games(canaries="2", epsilon="3", clip="0.5")
    assert expected(game) == pytest.approx(norm.cdf(0.5 / game.mechanism.sigma), abs=1e-9)


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(2, 5), st.floats(0.1, 5))
def test_the_attacker_takes_the_likeliest(seed: int, many: int, sigma: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    candidates, heard = torch.randn(many, 3, generator=draw), 3 * torch.randn(7, 3, generator=draw)
    logs = [multivariate_normal.logpdf(heard.numpy(), mean, sigma**2 * np.eye(3)) for mean in candidates.numpy()]
    assert most_likely(heard, candidates).tolist() == np.argmax(logs, axis=0).tolist()


def test_other_clients_messages_tell_nothing(rows: dict[str, list[Row]]) -> None:
    (game,) = games(canaries="2", epsilon="8")
    stranger = dataclasses.replace(game, seed=1)
    guess = most_likely(defended(stranger), defended(dataclasses.replace(game, victims=2)))
    assert abs(float((guess == game.truth).float().mean()) - 0.5) < 0.03


def test_a_run_leaves_rows_and_a_page_and_ends_in_an_error_where_it_is_sabotaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("run", "canary", "--games", "1000", "--exchanges", "3", "--epsilon", "1,4", "--out", str(tmp_path / "out"))
    assert run(monkeypatch, *few) == 0
    left = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [(row["canaries"], row["epsilon"], row["exchanges"]) for row in left] == [
        (2, 1, 3), (2, 4, 3), (10, 1, 3), (10, 4, 3)
    ]  # fmt: skip
    page = (tmp_path / "out/report.html").read_text()
    assert "success against ε" in page
    assert "add/remove" in page
    assert json.loads((tmp_path / "out/run.json").read_text())["finished"]
    capsys.readouterr()
    assert run(monkeypatch, *few, "--sabotage", "no_clip") == 2
    assert "would replace" in capsys.readouterr().err
    assert run(monkeypatch, *few, "--sabotage", "no_clip", "--overwrite") == 2
    assert "theory allows" in capsys.readouterr().err
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clip", "1.2"], "not 10 times longer than the clip"),
        (["--epsilon", "0"], "out of range"),
        (["--delta", "1"], "out of range"),
        (["--canaries", "1"], "out of range"),
        (["--sabotage", "noise"], "no sabotage named"),
        (["--resume"], "leave out --resume"),
    ],
)
def test_what_cannot_be_played_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "run", "canary", *words) == 2
    assert said in capsys.readouterr().err


def test_flower_s_engines_are_told_where_to_play_it() -> None:
    from flwr.app import Context, RecordDict

    context = Context(1, 1, {}, RecordDict(), {"scenario": "canary"})
    with pytest.raises(FedtapError, match="fedtap run canary"):
        main(None, context)
