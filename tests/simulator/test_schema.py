"""The published form of rows.jsonl and run.json: real runs keep it, and what breaks it is found."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fedtap
from fedtap.scenarios.command.main import main
from fedtap.simulator.report.saved_run import read_run, schema
from fedtap.simulator.scores import LEVELS

TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def kept(document: Mapping[str, Any], form: Mapping[str, Any]) -> bool:
    """Whether a document is of this form: by jsonschema, or where that is not installed by the types of its values."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        for name, value in document.items():
            allowed = form["properties"].get(name, form["additionalProperties"] or {"type": []}).get("type", [*TYPES])
            names = [allowed] if isinstance(allowed, str) else allowed
            if not any(
                isinstance(value, TYPES[one]) and (one == "boolean") == isinstance(value, bool) for one in names
            ):
                return False
        return all(name in document for name in form.get("required", ()))
    Draft202012Validator.check_schema(form)
    return bool(Draft202012Validator(form).is_valid(document))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that swept two values, given as a sequence."""
    out = tmp_path_factory.mktemp("swept") / "out"
    options = {"victims": 1, "attack": "linear", "model": "mlp"}
    rows = fedtap.run("noise", sigma=[0, 1e-2], out=out, device="cpu", as_frame=False, **options)
    assert [(row["sigma"], row["attack"]) for row in rows] == [(0.0, "linear"), (0.01, "linear")]
    assert all(type(row) is dict for row in rows)
    return out


def test_a_runs_rows_and_run_json_keep_the_form(swept: Path) -> None:
    run = read_run(swept)
    assert len(run.rows) == 2
    assert all(kept(row, schema("row")) for row in run.rows)
    assert kept(run.about, schema("run"))


def test_an_attack_on_a_saved_leak_keeps_the_form(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["attack", str(swept / "leaks/part_0.safetensors"), "--attack", "linear", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fedtap", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    run = read_run(tmp_path / "out")
    assert run.rows
    assert all(kept(row, schema("row")) for row in run.rows)
    assert kept(run.about, schema("run"))


@pytest.mark.parametrize("broken", [{"psnr": "40 dB"}, {"client": None}, {"unit": 3}, {"levels": "nothing"}])
def test_a_row_of_another_form_is_found(broken: dict[str, Any], swept: Path) -> None:
    row = read_run(swept).rows[0]
    assert not kept(row | broken, schema("row"))
    assert not kept({name: value for name, value in read_run(swept).about.items() if name != "seed"}, schema("run"))


def test_the_form_says_what_every_column_is() -> None:
    for form in (schema("row"), schema("run")):
        assert all(rule["description"] for rule in form["properties"].values())
    assert schema("row")["properties"]["levels"]["items"]["enum"] == list(LEVELS)


def test_any_sequence_is_swept() -> None:
    from fedtap.scenarios.command.options import options_text

    assert options_text({"sigma": (0, 0.5)}) == options_text({"sigma": [0, 0.5]}) == "--sigma=0,0.5"
    assert options_text({"seed": range(3)}) == "--seed=0,1,2"
    assert options_text({"attack": "idlg"}) == "--attack=idlg"


def test_the_forms_are_part_of_the_package() -> None:
    import tomllib

    told = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert told["tool"]["setuptools"]["package-data"]["fedtap.simulator.report"] == ["*.schema.json"]
    assert json.loads(json.dumps(schema("run"))) == schema("run")
