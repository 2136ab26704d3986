"""A study's frame, on a study of a few lines: a posterior that is asked for, overheard, saved, and shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedtap.clients.app import client_app
from fedtap.simulator.attack import Attack, PseudoData
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import KINDS, Leak, PosteriorLeak, Protocol, load
from fedtap.simulator.report.study_report import said, summary
from fedtap.simulator.study import Outcome, Study, ask, run_studies
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import tensors_of
from tests.support.scenes import Scene

DRAWS, FEATURES = 5, 3
CPU = torch.device("cpu")


def network(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Linear(shape[0], classes, device="meta")


@dataclass(frozen=True)
class Ask(Study):
    columns: ClassVar[tuple[str, ...]] = ("client", "mean", "nothing")
    legend: ClassVar[str] = "mean: of all that a client drew"
    threat: ClassVar[str] = "A curious server."
    nodes: int = 3
    broken: bool = False

    @property
    def clients(self) -> int:
        return self.nodes

    def answer(self, order: Message, client: int, data_root: Path) -> Message:
        if self.broken and client == 1:
            raise ValueError("its data are lost")
        draws = torch.full((DRAWS, FEATURES + 1), float(client), dtype=torch.float64)
        content = {"posterior": ArrayRecord({"draws": draws}), "metrics": MetricRecord({"partition": client})}
        return Message(RecordDict(content), reply_to=order)

    def play(self, grid: Grid, part: int, device: torch.device, data_root: Path) -> Outcome:
        heard = ask(grid, "train.posterior", RecordDict({}), part)
        observed = [tensors_of(one.answer.array_records["posterior"])["draws"] for one in heard]
        leak = leak_of(torch.stack(observed), [one.client for one in heard])
        rows = [{"client": one.client, "mean": float(draws.mean())} for one, draws in zip(heard, observed, strict=True)]
        return Outcome(rows, leak, {"A chart": "<svg></svg>"})


def leak_of(draws: torch.Tensor, clients: list[int]) -> PosteriorLeak:
    names = torch.tensor(clients)
    return PosteriorLeak(
        observed={"draws": draws},
        protocol=Protocol(model="linear", shape=(FEATURES,), classes=1, batch=1, prior="halfcauchy(2.5)"),
        network=network("linear", (FEATURES,), 1),
        weights=None,
        buffers={},
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
    )


def grid_of(*studies: Study) -> Callable[[Study], LocalGrid]:
    return lambda study: LocalGrid(client_app(lambda config: studies), study.clients)


def test_a_study_leaves_rows_leak_and_page(tmp_path: Path) -> None:
    parts = (Ask(name="ask", question="Why?", swept=(("nodes", "3"),)), Ask(name="ask", question="Why?", nodes=2))
    rows = run_studies(parts, grid_of(*parts), tmp_path / "out", device=CPU, data_root=tmp_path)
    assert [(row["client"], row["mean"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 2.0), (0, 0.0), (1, 1.0)]
    assert [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()] == rows
    page = (tmp_path / "out/report.html").read_text()
    assert "A chart (nodes 3)" in page
    assert "A curious server." in page
    assert "nothing" not in page
    leak = load(tmp_path / "out/leaks/part_0.safetensors", network)
    assert isinstance(leak, PosteriorLeak)
    assert leak.observed["draws"].dtype == torch.float64
    assert (leak.protocol.prior, leak.clients.tolist()) == ("halfcauchy(2.5)", [0, 1, 2])


def test_a_client_that_fails_ends_it_in_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    study = Ask(name="ask", broken=True)
    with pytest.raises(FedtapError, match="its data are lost"):
        run_studies([study], grid_of(study), tmp_path / "out", device=CPU, data_root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_federation_of_another_size_is_refused(tmp_path: Path) -> None:
    study = Ask(name="ask")
    grid = LocalGrid(client_app(lambda config: (study,)), 2)
    with pytest.raises(FedtapError, match="has 2 nodes, and ask needs 3"):
        run_studies([study], lambda part: grid, tmp_path / "out", device=CPU, data_root=tmp_path)


def test_rows_that_repeat_each_other_are_summed_up_by_setting_and_word() -> None:
    study = Ask(name="ask", swept=(("nodes", "3"),))
    rows = [
        {"nodes": nodes, "client": client, "mean": float(client), "nothing": None}
        for nodes in (3, 5)
        for client in range(5)
    ]
    assert summary(study, rows) == [
        {"nodes": 3, "rows": 5, "mean": 2.0},
        {"nodes": 5, "rows": 5, "mean": 2.0},
    ]
    assert summary(study, rows[:5]) == []
    assert summary(study, [row | {"nodes": number} for number, row in enumerate(rows)]) == []
    named = [row | {"mean": row["client"] > 0} for row in rows]
    assert [row["mean"] for row in summary(study, named)] == ["80%", "80%"]
    assert [said(value) for value in (1.5e-9, 0.0, 12345.678, 2.0, True, None, 7)] == (
        ["1.5e-09", "0", "1.2e+04", "2", "yes", "–", "7"]
    )


@dataclass(frozen=True)
class Echo(Attack[PseudoData]):
    leaks = (PosteriorLeak,)
    guesses = PseudoData
    needs_weights = False
    features: int = FEATURES

    def begin(self, leak: Leak, seed: int) -> torch.Tensor:
        return torch.zeros(len(leak), 7, self.features)

    def reconstruct(self, leak: Leak, start: torch.Tensor) -> PseudoData:
        ones = torch.ones(start.shape[:2])
        return PseudoData(start, ones, ones, torch.zeros(len(leak)))


def test_an_attack_may_guess_other_things_than_images() -> None:
    leak = leak_of(torch.randn(2, DRAWS, FEATURES + 1, dtype=torch.float64), [0, 1])
    assert Echo()(leak).points.shape == (2, 7, FEATURES)
    with pytest.raises(AssertionError, match="points"):
        Echo(features=FEATURES + 1)(leak)


def test_a_scenario_about_images_refuses_an_attack_that_brings_back_none() -> None:
    with pytest.raises(FedtapError, match="brings back no images"):
        Scene(attack=Echo().written())  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, DRAWS, FEATURES), (2, DRAWS, FEATURES + 2), (3, DRAWS, FEATURES + 1)])
def test_draws_of_another_model_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FedtapError, match="posterior/draws"):
        leak_of(torch.zeros(shape), [0, 1]).check()
    assert set(KINDS) == {"gradient", "update", "posterior", "attention", "stationary"}
