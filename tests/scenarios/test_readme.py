"""The documentation's example of a scenario of a user's own package."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fedtap.scenarios.command.main import main

PAGE = (Path(__file__).parents[2] / "docs/adding.md").read_text()


def test_the_documented_scenario_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.partition("\n## A scenario\n")[2]
    file, code = re.search(r"`my_package/(\w+)\.py`", section), re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert file
    assert code
    (tmp_path / "my_package").mkdir()
    (tmp_path / f"my_package/{file[1]}.py").write_text(code[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    small = ["--width", "3", "--victims", "1", "--size", "8", "--attack", "idlg(steps=2)"]
    monkeypatch.setattr(sys, "argv", ["fedtap", "run", "my_package.my_scenario:MyScenario", *small, "--out", "out"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [(row["attack"], row["model"]) for row in rows] == [("idlg", "lenet(width=3)")]
