"""A bench times two things in turns; a comparison of two benches tells a change from the turns' scatter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtap.clients.cost import TURNS
from fedtap.scenarios.bench.ratios import Ratio, WorkCost, bench_changes, in_turns, read_bench, write_bench
from fedtap.scenarios.bench.suite import plot_costs
from fedtap.scenarios.command.main import main
from fedtap.simulator.errors import FedtapError

COST = WorkCost("work", "victims", "cpu", (1, 10), (0.1, 0.9))


def bench(path: Path, *found: Ratio) -> Path:
    write_bench(path, found, [COST])
    return path


def scattered(centre: float, seed: int, what: str = "a / b", is_cost: bool = False) -> Ratio:
    turns = centre * np.random.default_rng(seed).lognormal(sigma=0.05, size=TURNS)
    return Ratio(what, "cpu", tuple(map(float, turns)), 1e-3, is_cost=is_cost)


def test_the_ratio_is_that_of_the_work() -> None:
    def slow() -> int:
        return sum(range(400_000))

    def fast() -> int:
        return sum(range(40_000))

    found = in_turns("ten times", slow, fast, group="others")
    assert 5 < found.median < 20
    assert len(found.turns) == TURNS
    assert in_turns("half", slow, fast, group="others", scale=0.5).median < 0.75 * found.median


def test_a_bench_is_read_as_it_was_written(tmp_path: Path) -> None:
    one, other = scattered(3.0, 0), scattered(1.1, 1, "c / d", is_cost=True)
    assert read_bench(bench(tmp_path / "b.json", one, other)) == {("a / b", "cpu"): one, ("c / d", "cpu"): other}


@pytest.mark.parametrize(
    ("is_cost", "after", "told"), [(False, 2.0, "WORSE"), (False, 4.5, "better"), (True, 4.5, "WORSE")]
)
def test_a_change_is_told(tmp_path: Path, is_cost: bool, after: float, told: str) -> None:
    before = bench(tmp_path / "a.json", scattered(3.0, 0, is_cost=is_cost))
    lines, worse = bench_changes(before, bench(tmp_path / "b.json", scattered(after, 1, is_cost=is_cost)))
    assert [line.split()[0] for line in lines] == [told]
    assert worse == (told == "WORSE")


def test_scatter_is_noise(tmp_path: Path) -> None:
    before = bench(tmp_path / "a.json", *(scattered(3.0, seed, f"{seed}") for seed in range(200)))
    after = bench(tmp_path / "b.json", *(scattered(3.0, 1000 + seed, f"{seed}") for seed in range(200)))
    lines, _ = bench_changes(before, after)
    assert sum(not line.split()[0].startswith("noise") for line in lines) <= 2


def test_the_command_exits_with_1_where_something_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = bench(tmp_path / "a.json", scattered(3.0, 0)), bench(tmp_path / "b.json", scattered(1.0, 1))
    for files, code in (((before, before), 0), ((before, after), 1), ((after, before), 0)):
        monkeypatch.setattr(sys, "argv", ["fedtap", "bench", "compare", *map(str, files)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
    assert "WORSE" in capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(
    damage=st.sampled_from(["format", "ratios", "turns", "what", "is_cost"]),
    value=st.sampled_from([None, -1, 0, [], {}, "x", [0.0], ["a"]]),
)
def test_a_strangers_bench_is_read_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, damage: str, value: object
) -> None:
    path = bench(tmp_path_factory.mktemp("bench") / "b.json", scattered(3.0, 0))
    document = json.loads(path.read_text())
    where = document if damage in ("format", "ratios") else document["ratios"][0]
    where[damage] = value
    path.write_text(json.dumps(document))
    if damage in ("format", "turns") or (damage == "ratios" and value not in ([], {})):
        with pytest.raises(FedtapError, match="is no bench"):
            read_bench(path)
    else:
        assert all(0 < turn < float("inf") for ratio in read_bench(path).values() for turn in ratio.turns)


def test_benches_with_nothing_in_common_are_not_bench_changes(tmp_path: Path) -> None:
    one, other = bench(tmp_path / "a.json", scattered(3.0, 0)), bench(tmp_path / "b.json", scattered(3.0, 0, "else"))
    with pytest.raises(FedtapError, match="no ratio in common"):
        bench_changes(one, other)


def test_cost_is_drawn_against_work(tmp_path: Path) -> None:
    plot_costs([COST, WorkCost("pairs", "pairs", "cpu", (1, 2), (1.0, 2.0))], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.lstrip().startswith("<?xml")
