"""The same scenario through a real `flwr run` on Flower's simulation engine: the same rows as in process."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.cli.build import build_fab_from_disk
from PIL import Image
from safetensors.torch import load_file

from fedtap.scenarios.deploy import flower
from fedtap.simulator.errors import FedtapError
from tests.scenarios.test_cli import run


def test_flwr_run_leaves_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaks to 1e-6, scores to 0.5 dB: what DESIGN.md allows between engines. The images are named from here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"my photos/{number}.png")
    knobs = {"dataset": "my photos", "attack": "linear,idlg(steps=2)", "model": "mlp", "victims": "2", "seed": "7"}
    absolute = {**knobs, "dataset": str(tmp_path / "my photos")}
    words = [word for knob, value in absolute.items() for word in (f"--{knob}", value)]
    assert run(monkeypatch, "run", "first_leak", *words, "--out", str(tmp_path / "local")) == 0
    flower("first_leak", knobs, tmp_path / "flower", tmp_path, nodes=3, engine="simulation")

    here, there = (load_file(tmp_path / engine / "leaks/part_0.safetensors") for engine in ("local", "flower"))
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=1e-6)
    for row, other in zip(*(rows(tmp_path / engine) for engine in ("local", "flower")), strict=True):
        assert row.keys() == other.keys()
        same = (
            "scenario",
            "attack",
            "model",
            "dataset",
            "client",
            "round",
            "seed",
            "label_correct",
            "recovered",
            "error",
        )
        assert [row[name] for name in same] == [other[name] for name in same]
        assert row["psnr"] == pytest.approx(other["psnr"], abs=0.5)
        assert row["lpips"] == pytest.approx(other["lpips"], abs=0.01)
        assert row["lpips"] is not None


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_the_app_bundle_holds_no_code() -> None:
    bundle = build_fab_from_disk(Path(__file__).parents[2])
    assert len(bundle) < 100_000
    names = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    assert not [name for name in names if name.endswith(".py")], "the bundle's code would hide the installed package"


@pytest.mark.slow
def test_a_mistake_inside_flwr_is_one_sentence_and_an_old_run_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ServerApp fails (too many victims for the dataset); `flwr run` itself says that all is well."""
    out = tmp_path / "out"
    words = ["run", "first_leak", "--victims", "1", "--attack", "linear", "--model", "mlp", "--out", str(out)]
    assert run(monkeypatch, *words) == 0
    with pytest.raises(FedtapError, match=r"did not finish the scenario: .*target data of photos holds"):
        flower("first_leak", {"victims": "9999", "model": "mlp"}, out, tmp_path, 2, "simulation", overwrite=True)
