"""Trials with canaries: honest runs keep under the bound and come close, broken mechanisms are caught."""

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

from fedtap.attackers.gradients.known_image import KnownImage
from fedtap.clients.app import client_app
from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.gradients.canary import EXCESS, SHAPE, Canary, expected
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import GradientLeak, Protocol
from fedtap.simulator.models.registry import build
from fedtap.simulator.run import device_named
from fedtap.simulator.run import run as play
from fedtap.simulator.scenario import Row, Session
from fedtap.simulator.scores import limits
from fedtap.simulator.wire.grid import LocalGrid
from tests.scenarios.test_cli import run

EPSILONS = (0.5, 1, 2, 4, 8)


def canaries(**options: str) -> tuple[Canary, ...]:
    settings = plan("canary", {"exchanges": "0", **options})
    assert all(isinstance(setting, Canary) for setting in settings)
    return settings  # type: ignore[return-value]


def grid(setting: Canary) -> LocalGrid:
    return LocalGrid(client_app(lambda config: (setting,)), setting.nodes)


def observed(setting: Canary) -> GradientLeak:
    """What a server observes of all trials."""
    session = Session(grid(setting), 0, Path(), device_named("cpu"), Path(), (setting,))
    return setting.observe(session).leak  # type: ignore[return-value]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """Every setting as it is, and those of two canaries under each broken mechanism: 5,000 trials, a fixed seed."""
    every = {"none": canaries()}
    every |= {name: canaries(broken_mechanism=name, canaries="2") for name in ("half_noise", "no_clip")}
    out = tmp_path_factory.mktemp("canaries")
    return {
        name: play(some, grid, out / name, device=device_named("cpu"), data_root=Path())  # type: ignore[arg-type]
        for name, some in every.items()
    }


def test_no_success_passes_its_bound(rows: dict[str, list[Row]]) -> None:
    honest = rows["none"]
    canaries()[0].verdict(honest)
    for row in honest:  # and at a hundred times the doubt
        low, _ = limits(round(row["success"] * row["trials"]), row["trials"], 0.01 / len(honest))
        assert low <= row["bound"]
    assert {(row["canaries"], row["epsilon"]) for row in honest} == {
        (k, epsilon) for k in (2, 10) for epsilon in EPSILONS
    }
    assert all(row["trials"] >= 5000 and row["success_low"] <= row["success"] <= row["success_high"] for row in honest)


def test_the_best_attacker_comes_as_close_as_it_can(rows: dict[str, list[Row]]) -> None:
    for row in rows["none"]:
        if row["canaries"] == 2:
            assert row["success"] >= 0.95 * row["bound"]
            assert row["expected"] == pytest.approx(row["bound"])
        spread = math.sqrt(row["expected"] * (1 - row["expected"]) / row["trials"])
        assert abs(row["success"] - row["expected"]) < 4 * spread
        assert 1 / row["canaries"] < row["expected"] <= row["bound"] + 1e-9 <= row["bound_renyi"] + 2e-9


@pytest.mark.parametrize("broken", ["half_noise", "no_clip"])
def test_a_broken_mechanism_is_caught_at_every_epsilon(broken: str, rows: dict[str, list[Row]]) -> None:
    for row in rows[broken]:
        with pytest.raises(FedtapError, match=r"theory allows .* is not what is announced"):
            canaries()[0].verdict([row])


def test_a_row_says_what_it_is_about(rows: dict[str, list[Row]]) -> None:
    said = {"protects": "client", "adjacency": "add/remove", "sensitivity": 1.0, "delta": 1e-5, "accuracy": None}
    for row in rows["none"]:
        assert said.items() <= row.items()
        assert row["defence"] == f"clip(1.0)+noise({row['sigma']!r})"
    assert all("clip" not in row["defence"] for row in rows["no_clip"])


@pytest.mark.parametrize("broken", ["none", "half_noise", "no_clip"])
def test_defences_called_alone_are_those_of_the_federation(broken: str) -> None:
    (setting,) = canaries(canaries="3", epsilon="2", trials="6", broken_mechanism=broken)
    alone = observed(setting).observed["1.weight"]
    for exchanges in (6, 4):
        by_message = observed(dataclasses.replace(setting, exchanges=exchanges)).observed["1.weight"]
        torch.testing.assert_close(by_message, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [2, 3, 10])
def test_canaries_are_corners_of_a_simplex_and_far_beyond_the_clip(many: int) -> None:
    (setting,) = canaries(canaries=str(many), epsilon="1")
    images, labels = torch.ones(many, 1, *SHAPE), torch.arange(many)[:, None]
    found = gradients(build("softmax", SHAPE, many, seed=0), images, labels)
    flat = torch.cat([gradient.flatten(1) for gradient in found.values()], dim=1)
    corners = setting.length**2 * (torch.eye(many) * many - 1) / (many - 1)  # two of them: opposite
    torch.testing.assert_close(flat @ flat.T, corners, rtol=1e-4, atol=1e-2)
    assert setting.length >= EXCESS * setting.clip


def test_expected_success_of_two_is_phi_of_clip_over_sigma() -> None:
    (setting,) = canaries(canaries="2", epsilon="3", clip="0.5")
    assert expected(setting) == pytest.approx(norm.cdf(0.5 / setting.mechanism.sigma), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(2, 5), st.floats(0.1, 5))
def test_the_attacker_takes_the_likeliest(seed: int, many: int, sigma: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape, defence = (1, 2, 2), f"clip(0.5)+noise({sigma!r})"
    network = build("softmax", shape, many, seed=0)
    candidates = gradients(network, torch.ones(many, 1, *shape), torch.arange(many)[:, None])["1.weight"].flatten(1)
    candidates = candidates * (0.5 / candidates.norm(dim=1, keepdim=True)).clamp_max(1)
    observed = 3 * torch.randn(7, many, 4, generator=draw)
    names = torch.arange(7)
    leak = GradientLeak(
        observed={"1.weight": observed},
        protocol=Protocol(model="softmax", shape=shape, classes=many, batch=1, defence=defence),
        network=build("softmax", shape, many),
        weights={name: weight.detach() for name, weight in network.named_parameters()},
        buffers={},
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
    )
    flat = observed.flatten(1).double().numpy()
    spread = sigma**2 * np.eye(flat.shape[1])
    logs = [multivariate_normal.logpdf(flat, mean, spread) for mean in candidates.double().numpy()]
    assert KnownImage()(leak).labels[:, 0].tolist() == np.argmax(logs, axis=0).tolist()


def test_other_clients_messages_tell_nothing() -> None:
    (setting,) = canaries(canaries="2", epsilon="8")
    other = KnownImage()(observed(dataclasses.replace(setting, seed=1))).labels[:, 0]
    assert abs(float((other == setting.truth).float().mean()) - 0.5) < 0.03


def test_a_run_leaves_rows_and_a_page_and_ends_in_an_error_where_the_mechanism_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("run", "canary", "--trials", "1000", "--exchanges", "3", "--epsilon", "1,4", "--out", str(tmp_path / "out"))
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
    assert run(monkeypatch, *few, "--broken-mechanism", "no_clip") == 2
    assert "would replace" in capsys.readouterr().err
    assert run(monkeypatch, *few, "--broken-mechanism", "no_clip", "--overwrite") == 2
    assert "theory allows" in capsys.readouterr().err
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clip", "1.2"], "not 10 times longer than the clip"),
        (["--epsilon", "0"], "out of range"),
        (["--delta", "1"], "out of range"),
        (["--canaries", "1"], "out of range"),
        (["--broken-mechanism", "noise"], "no broken-mechanism named"),
    ],
)
def test_what_cannot_be_played_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "run", "canary", *words) == 2
    assert said in capsys.readouterr().err
