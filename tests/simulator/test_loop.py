"""The one loop on a scenario of a few lines: a posterior that is asked for, observed, attacked, scored, and shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from fedtap.clients.app import client_app
from fedtap.simulator.attack import Attack, PseudoData
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import KINDS, Leak, PosteriorLeak, Protocol, load
from fedtap.simulator.options import Option
from fedtap.simulator.report.columns import Column, said, summary
from fedtap.simulator.run import run
from fedtap.simulator.scenario import Observed, Scenario, Scored, Session, Trial
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.messages import ask, check_nodes
from fedtap.simulator.wire.records import tensors_of
from tests.support.played import no_attack_runs, play, reconstructions, untimed

DRAWS, FEATURES = 5, 3


def network(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Linear(shape[0], classes, device="meta")


@dataclass(frozen=True)
class Echo(Attack[PseudoData]):
    """Brings back zeros, and what was observed as its objective."""

    leaks = (PosteriorLeak,)
    reconstructs = PseudoData
    needs_weights = False
    features: int = FEATURES

    def begin(self, leak: Leak, seed: int) -> torch.Tensor:
        return torch.zeros(len(leak), 7, self.features)

    def accepts(self, leak: Leak) -> None:
        super().accepts(leak)
        if not bool(leak.observed["draws"].any()):
            raise FedtapError("Draws that are all zero tell nothing: ask another client.")

    def reconstruct(self, leak: Leak, start: torch.Tensor) -> PseudoData:
        ones = torch.ones(start.shape[:2])
        return PseudoData(start, ones, ones, leak.observed["draws"].flatten(1).mean(1))


@dataclass(frozen=True)
class Ask(Scenario):
    reconstructs: ClassVar[str] = "PseudoData"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("client", over="rows"),
        Column("mean", "of all that a client drew"),
        Column("wrong"),
        Column("nothing"),
    )
    size: Annotated[int, Option("nodes", 1)] = 3
    absent: int = -1
    """A client that fails."""
    needs_all: bool = False
    only: int = -1
    """The one client that is attacked; -1: all are."""
    offset: float = 0.0
    """What the truth is moved by, before it is scored."""

    @property
    def nodes(self) -> int:
        return self.size

    @property
    def attacks(self) -> tuple[Attack[Any], ...]:
        return (Echo(),)

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        client = int(context.node_config["partition-id"])
        if client == self.absent:
            raise ValueError("its data are lost")
        draws = torch.full((DRAWS, FEATURES + 1), float(client), dtype=torch.float64)
        content = {"posterior": ArrayRecord({"draws": draws}), "metrics": MetricRecord({"partition": client})}
        return Message(RecordDict(content), reply_to=message)

    def observe(self, session: Session) -> Observed:
        check_nodes(session.grid, self.nodes, self.name)
        failed: dict[int, str] = {}
        asked = ask(session.grid, "train.posterior", RecordDict({}), session.number,
                    failed=None if self.needs_all else failed)  # fmt: skip
        kept = [one for one in asked if self.only in (-1, one.client)]
        draws = [tensors_of(one.answer.array_records["posterior"])["draws"] for one in kept]
        leak = leak_of(torch.stack(draws), [one.client for one in kept])
        return Observed(leak, {(client, 1): why for client, why in failed.items()})

    def score(self, trial: Trial) -> Scored:
        found = trial.reconstruction.objective.tolist()
        rows = [
            {"client": client, "mean": mean, "wrong": mean - client - self.offset}
            for client, mean in zip(trial.leak.clients.tolist(), found, strict=True)
        ]
        return Scored(rows, sections={"A chart": "<svg></svg>"})

    def threat(self, leak: Leak | None) -> Sequence[str]:
        return ("A curious server.",)

    @property
    def question(self) -> str:
        return "Why?"


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


def test_a_scenario_leaves_rows_leak_and_page(tmp_path: Path) -> None:
    settings = (Ask(name="ask", swept=(("size", "3"),)), Ask(name="ask", size=2, swept=(("size", "2"),)))
    rows = play(settings, tmp_path / "out")
    assert [(row["size"], row["client"], row["mean"]) for row in rows] == (
        [(3, 0, 0.0), (3, 1, 1.0), (3, 2, 2.0), (2, 0, 0.0), (2, 1, 1.0)]
    )
    assert all(row["seconds"] > 0 and row["seed"] == 0 for row in rows)
    assert [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()] == rows
    page = (tmp_path / "out/report.html").read_text()
    assert "A chart (size 3)" in page
    assert "A chart (size 2)" in page
    assert "A curious server." in page
    assert "nothing" not in page
    leak = load(tmp_path / "out/leaks/part_0.safetensors", network)
    assert isinstance(leak, PosteriorLeak)
    assert leak.observed["draws"].dtype == torch.float64
    assert (leak.protocol.prior, leak.clients.tolist()) == ("halfcauchy(2.5)", [0, 1, 2])


def test_a_client_that_fails_has_a_row_that_says_so(tmp_path: Path) -> None:
    rows = play([Ask(name="ask", absent=1)], tmp_path / "out")
    assert {row["client"]: row.get("mean") for row in rows} == {0: 0.0, 1: None, 2: 2.0}
    (lost,) = (row for row in rows if row.get("error"))
    assert (lost["client"], lost["attack"]) == (1, Echo().name)
    assert "its data are lost" in lost["error"]


def test_where_all_clients_are_needed_a_failure_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="its data are lost"):
        play([Ask(name="ask", absent=1, needs_all=True)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_federation_of_another_size_is_refused(tmp_path: Path) -> None:
    setting = Ask(name="ask")
    grid = LocalGrid(client_app(lambda config: (setting,)), 2)
    with pytest.raises(FedtapError, match="has 2 nodes, and ask needs 3"):
        run([setting], lambda _: grid, tmp_path / "out", device=torch.device("cpu"), data_root=tmp_path)
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Tolerant(Ask):
    refusal_is_result: ClassVar[bool] = True


def test_a_leak_that_an_attack_refuses_is_a_row_where_that_is_a_result(tmp_path: Path) -> None:
    rows = play([Tolerant(name="ask", only=0)], tmp_path / "result")
    assert [(row["client"], row.get("mean")) for row in rows] == [(0, None)]
    assert "tell nothing" in rows[0]["error"]
    with pytest.raises(FedtapError, match="tell nothing"):
        play([Ask(name="ask", only=0)], tmp_path / "mistake")
    assert not (tmp_path / "mistake").exists()


def test_a_resumed_run_keeps_what_is_finished_and_makes_the_rest(tmp_path: Path) -> None:
    settings = (Ask(name="ask", swept=(("size", "3"),)), Ask(name="ask", size=2, swept=(("size", "2"),)))
    before = play(settings, tmp_path / "out")
    headings = (tmp_path / "out/report.html").read_text().count("<h2>")
    with no_attack_runs(Echo):
        assert play(settings, tmp_path / "out", resume=True) == before
    assert (tmp_path / "out/report.html").read_text().count("<h2>") == headings
    (lost,) = (tmp_path / "out/reconstructions").glob("part_1-*")
    lost.unlink()
    again = play(settings, tmp_path / "out", resume=True)
    assert again[:3] == before[:3]
    assert untimed(again) == untimed(before)
    assert lost.is_file()


def test_a_change_of_the_truth_moves_scores_and_nothing_else(tmp_path: Path) -> None:
    honest, deceived = (play([Ask(name="ask", offset=off)], tmp_path / str(off)) for off in (0.0, 1.0))
    assert [row["wrong"] for row in honest] == [0.0] * 3
    assert [row["wrong"] for row in deceived] == [-1.0] * 3
    ((file, one),) = reconstructions(tmp_path / "0.0").items()
    assert all(torch.equal(tensor, reconstructions(tmp_path / "1.0")[file][name]) for name, tensor in one.items())


def test_an_attack_on_another_kind_of_leak_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Mistaken(Ask):
        reconstructs: ClassVar[str] = "Inputs"

    with pytest.raises(FedtapError, match="brings back PseudoData, and ask is about Inputs"):
        run([Mistaken(name="ask")], lambda _: pytest.fail("it is played"), tmp_path / "out",
            device=torch.device("cpu"), data_root=tmp_path)  # fmt: skip


def test_rows_that_repeat_each_other_are_summed_up_by_setting_and_word() -> None:
    rows = [
        {"nodes": nodes, "client": client, "mean": float(client), "nothing": None}
        for nodes in (3, 5)
        for client in range(5)
    ]

    def summed(rows: list[dict[str, object]]) -> list[dict[str, str]]:
        groups, columns = summary(rows, Ask.columns)
        return [{column.name: column.cell(group) for column in columns} for group in groups]

    assert summed(rows) == [
        {"nodes": "3", "rows": "5", "mean": "2", "wrong": "–", "nothing": "–"},
        {"nodes": "5", "rows": "5", "mean": "2", "wrong": "–", "nothing": "–"},
    ]
    assert summed(rows[:5]) == []
    assert summed([row | {"nodes": number} for number, row in enumerate(rows)]) == []
    assert Column("mean", over="share").cell([row | {"mean": row["client"] > 0} for row in rows]) == "80%"
    assert [said(value) for value in (1.5e-9, 0.0, 12345.678, 2.0, True, None, 7)] == (
        ["1.5e-09", "0", "1.2e+04", "2", "yes", "–", "7"]
    )


def test_an_attack_may_guess_other_things_than_images() -> None:
    leak = leak_of(torch.randn(2, DRAWS, FEATURES + 1, dtype=torch.float64), [0, 1])
    assert Echo()(leak).points.shape == (2, 7, FEATURES)
    with pytest.raises(FedtapError, match=r"is not of this leak \(points is"):
        Echo(features=FEATURES + 1)(leak)


@pytest.mark.parametrize("shape", [(2, DRAWS, FEATURES), (2, DRAWS, FEATURES + 2), (3, DRAWS, FEATURES + 1)])
def test_draws_of_another_model_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FedtapError, match="posterior/draws"):
        leak_of(torch.zeros(shape), [0, 1]).check()
    assert set(KINDS) >= {"gradient", "update", "posterior", "attention", "trained_weights"}
