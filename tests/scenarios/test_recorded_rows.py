"""Rows that fedtap 0.1 left, of runs whose figures do not depend on the machine: they are the same now, to 1e-5.

Clients that take one step are computed together since, in which the last digits of float32 differ.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedtap.scenarios.command.plan import plan
from tests.support.played import play

RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "recorded/rows.json").read_text())


DATA = Path(os.environ.get("FEDTAP_DATA_ROOT", "data"))


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: run["scenario"])
def test_figures_are_those_that_were_recorded(run: dict[str, Any], tmp_path: Path) -> None:
    if run["scenario"] == "text_gradients" and not (DATA / "ag_news_test.csv").is_file():
        pytest.skip(f"{DATA / 'ag_news_test.csv'} is absent: set FEDTAP_DATA_ROOT to the folder that holds it")
    rows = play(plan(run["scenario"], run["options"]), tmp_path / "out", data_root=DATA)
    assert len(rows) == len(run["rows"])
    for row, recorded in zip(rows, run["rows"], strict=True):
        for name, value in recorded.items():
            expected = pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float | list) else value
            assert row[name] == expected, name
