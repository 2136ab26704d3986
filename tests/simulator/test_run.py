"""A run from end to end: the truth meets the guess in the scores alone, and each row stands on its own."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from fedtap.attackers import parse
from fedtap.attackers.gradients.lti import LTI
from fedtap.clients.app import client_app
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import private_data
from fedtap.simulator.federation.settings import ImageObserved
from fedtap.simulator.models.registry import build
from fedtap.simulator.run import device_named, run
from fedtap.simulator.saved_leak import attack_saved
from fedtap.simulator.scores import blind, mse, psnr
from fedtap.simulator.wire.grid import LocalGrid
from tests.support.attack_leaks import leak_of, pictures
from tests.support.scenes import Scene

PANEL = "linear,idlg(steps=20),restarts(dlg(steps=10),2),inverting_gradients(steps=10),gradinversion(steps=10,seeds=2)"
BASE = Scene(attack=PANEL, name="test", model="mlp", victims=3, batch=2, size=16)


def play(scenario: Scene, out: Path, app: ClientApp | None = None) -> list[dict[str, Any]]:
    logging.getLogger("flwr").setLevel(logging.ERROR)

    def grid(part: Scene) -> LocalGrid:
        return LocalGrid(app or client_app(lambda config: (scenario,)), (part.clients or part.victims) + 1)

    return run([scenario], grid, out, device=device_named("cpu"), data_root=Path("data"))


def reconstructions(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted((out / "reconstructions").iterdir())}


def test_no_attack_is_helped_by_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffle the truth that the scorer sees: the scores change, and not one bit of the reconstructions."""
    honest = play(BASE, tmp_path / "honest")
    true = ImageObserved.truths.func  # what only the scorer asks for: clients train as before

    def shuffled(observed: ImageObserved) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = true(observed)
        return found[1:] + found[:1]

    monkeypatch.setattr(ImageObserved, "truths", property(shuffled))
    deceived = play(BASE, tmp_path / "deceived")
    one, other = reconstructions(tmp_path / "honest"), reconstructions(tmp_path / "deceived")
    assert one.keys() == other.keys()
    assert len(one) == len(BASE.attacks)
    for name, tensors in one.items():
        assert all(torch.equal(tensor, other[name][key]) for key, tensor in tensors.items())
    assert [row["psnr"] for row in honest] != [row["psnr"] for row in deceived]
    assert [row["objective"] for row in honest] == [row["objective"] for row in deceived]


def test_the_blind_guess_is_made_of_public_images_alone(tmp_path: Path) -> None:
    scenario = dataclasses.replace(BASE, attack="grey")
    rows = play(scenario, tmp_path)
    private = private_data(scenario, Path("data"), BASE.victims)
    public = blind(private.dataset.auxiliary.batch(slice(None))[0])
    assert len(rows) == BASE.victims
    for row in rows:
        truth, _ = private.behind(row["client"], row["round"])
        assert row["psnr_blind"] == pytest.approx(float(psnr(mse(public.expand_as(truth), truth)).mean()), abs=1e-4)


def test_a_clients_rows_are_the_same_alone_and_among_many(tmp_path: Path) -> None:
    many = play(dataclasses.replace(BASE, clients=4, victims=4), tmp_path / "many")
    alone = play(dataclasses.replace(BASE, clients=4, victims=1), tmp_path / "alone")
    first = [row for row in many if row["client"] == 0]
    assert len(first) == len(alone) == len(BASE.attacks)
    for row, other in zip(first, alone, strict=True):
        assert row["attack"] == other["attack"]
        assert row["psnr"] == pytest.approx(other["psnr"], abs=0.5)
        assert row["label_correct"] == other["label_correct"]


def test_a_mistake_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")

    def grid(part: Scene) -> LocalGrid:
        raise AssertionError("an hour is spent")

    with pytest.raises(FedtapError, match="no fedtap run left"):
        run([BASE], grid, tmp_path, device=device_named("cpu"), data_root=Path("data"))
    leak = leak_of(*pictures(1, 1), build("mlp", (3, 16, 16), 10, seed=0), "mlp")
    with pytest.raises(FedtapError, match="no fedtap run left"):
        attack_saved({"leak": leak}, lambda _: [LTI()], tmp_path, device=device_named("cpu"), seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    loss = dataclasses.replace(BASE, accuracy_loss=0.05, rounds=1, defence="noise(0.1)")
    with pytest.raises(FedtapError, match="add none"):
        run([BASE, loss], grid, tmp_path / "new", device=device_named("cpu"), data_root=Path("data"))


def test_what_is_finished_is_on_the_page_before_the_rest_is_played(
    tmp_path: Path,
) -> None:
    first = dataclasses.replace(BASE, attack="linear")
    settings = [first, dataclasses.replace(first, seed=1)]

    def grid(setting: Scene) -> LocalGrid:
        if setting.seed:
            raise KeyboardInterrupt
        return LocalGrid(client_app(lambda config: tuple(settings)), 4)

    with pytest.raises(KeyboardInterrupt):
        run(settings, grid, tmp_path, device=device_named("cpu"), data_root=Path("data"))
    page = (tmp_path / "report.html").read_text()
    assert "This run is not finished" in page
    assert "linear" in page


def test_the_seconds_of_an_attack_are_shared_by_its_victims(tmp_path: Path) -> None:
    leak = leak_of(*pictures(3, 1), build("mlp", (3, 16, 16), 10, seed=0), "mlp")
    began = time.perf_counter()
    rows = attack_saved({"leak": leak}, lambda _: parse("linear"), tmp_path, device=device_named("cpu"), seed=0)
    assert 0 < sum(row["seconds"] for row in rows) < time.perf_counter() - began


def test_a_run_repeats_itself_to_the_bit(tmp_path: Path) -> None:
    one, other = play(BASE, tmp_path / "one"), play(BASE, tmp_path / "other")
    for row, again in zip(one, other, strict=True):
        assert {**row, "seconds": 0} == {**again, "seconds": 0}
    for name, tensors in reconstructions(tmp_path / "one").items():
        assert all(
            torch.equal(tensor, reconstructions(tmp_path / "other")[name][key]) for key, tensor in tensors.items()
        )


def test_a_failed_client_has_a_row_that_says_so(tmp_path: Path) -> None:
    scenario = dataclasses.replace(BASE, attack="linear")
    app, sound = ClientApp(), client_app(lambda config: (scenario,))

    @app.train()
    def train(order: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("out of battery")
        return sound(order, context)

    rows = play(scenario, tmp_path, app)
    assert {row["client"]: row["error"] is None for row in rows} == {0: True, 1: False, 2: True}
    (failed,) = [row for row in rows if row["client"] == 1]
    assert "out of battery" in failed["error"]
    assert failed["psnr"] is None
    assert "out of battery" in (tmp_path / "report.html").read_text()


def test_batchnorm_is_explained(tmp_path: Path) -> None:
    play(dataclasses.replace(BASE, model="resnet20", attack="idlg(steps=1)", victims=1), tmp_path)
    assert "BatchNorm in training mode" in (tmp_path / "report.html").read_text()


def test_frozen_batchnorm_of_a_sum_is_one_gradient(tmp_path: Path) -> None:
    """Where each client normalises by the running statistics, a mean of gradients is that of all images together."""
    frozen = dataclasses.replace(BASE, model="resnet20", batchnorm="eval", attack="idlg(steps=1)", victims=1)
    (row,) = play(dataclasses.replace(frozen, threat_model="secure_aggregation", clients=2), tmp_path)
    assert row["error"] is None
    assert "BatchNorm in training mode" not in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cpu_and_cuda_agree(tmp_path: Path) -> None:
    leaks = play(dataclasses.replace(BASE, attack="linear,idlg(steps=20)"), tmp_path / "cpu")
    scenario = dataclasses.replace(BASE, attack="linear,idlg(steps=20)")

    def grid(part: Scene) -> LocalGrid:
        return LocalGrid(client_app(lambda config: (scenario,)), part.victims + 1)

    rows = run([scenario], grid, tmp_path / "cuda", device=device_named("cuda"), data_root=Path("data"))
    for row, other in zip(leaks, rows, strict=True):
        # from 90 dB the error is float32's
        assert min(row["psnr"], 90) == pytest.approx(min(other["psnr"], 90), abs=0.5)
