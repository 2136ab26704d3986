"""A study goes on without a client that fails, and says so in its row; where it needs all, it ends in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtap.scenarios.command.plan import plan
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.scenario import Row
from tests.attackers.test_dager import news  # noqa: F401 - a fixture
from tests.support.played import play

STUDIES: dict[str, dict[str, str]] = {
    "attention": {"n": "3", "d": "4", "heads": "2", "victims": "3", "attack": "attention_newton(steps=3)"},
    "fedprox": {"width": "8", "examples": "3", "features": "4", "victims": "3", "attack": "stationary_mmd(rounds=1)"},
    "select_topic": {
        "model": "decoder(width=16, layers=1, heads=2)", "tokens": "14", "documents": "12", "corpus": "80",
        "candidates": "4", "selected": "10", "epochs": "1", "retrainings": "0", "victims": "3", "attack": "loss_drop",
    },
    "text_gradients": {"dataset": "news", "width": "48", "batch": "2", "tokens": "6", "victims": "3"},
}  # fmt: skip

SOME = (
    "raises", "exits", "returns the order", "sends no arrays", "sends NaN", "sends a pickle", "sends one entry less",
    "leaves out an array", "says it is client 0",
)  # fmt: skip


def rows_of(name: str, options: dict[str, str], fault: str, root: Path) -> list[Row]:
    return play(plan(name, options), root / "out", fault=fault)


@pytest.mark.parametrize(("number", "fault"), enumerate(SOME))
def test_a_study_goes_on_without_a_client_that_fails(number: int, fault: str, news: Path) -> None:  # noqa: F811
    """Each fault in one of the studies, in turn."""
    name = list(STUDIES)[number % len(STUDIES)]
    rows = rows_of(name, STUDIES[name], fault, news)
    assert [row["client"] for row in rows if not row.get("error")] == [0, 2]
    (lost,) = (row for row in rows if row.get("error"))
    assert lost["client"] == 1
    assert "lient 1 failed" in lost["error"]
    assert len(lost["error"]) < 400
    assert "lient 1 failed" in (news / "out/report.html").read_text()


@pytest.mark.parametrize("fault", ["raises", "sends one entry less", "sends NaN", "renames the ArrayRecord"])
def test_a_study_that_needs_all_clients_ends_in_a_sentence(fault: str, tmp_path: Path) -> None:
    with pytest.raises(FedtapError) as caught:
        rows_of("posterior_shards", {"shards": "3", "samples": "20", "pseudo": "4"}, fault, tmp_path)
    assert len(str(caught.value)) < 300
    assert not (tmp_path / "out").exists()
