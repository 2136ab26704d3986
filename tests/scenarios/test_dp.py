"""Privacy and its price: what the rows of dp say, repetitions that wear noise out, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torch import nn

from fedtap.clients.app import client_app
from fedtap.scenarios.command.plan import plan
from fedtap.scenarios.gradients.canary import Canary
from fedtap.simulator.defences.accountant import Gaussian
from fedtap.simulator.defences.notation import averaged, described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.guarantees import promised, success_of
from fedtap.simulator.federation.private_data import private_data
from fedtap.simulator.federation.rounds import play
from fedtap.simulator.leaks import mean
from fedtap.simulator.report.charts import COLORS, _apart
from fedtap.simulator.report.columns import summary, table
from fedtap.simulator.report.defences import price
from fedtap.simulator.report.images import image_columns
from fedtap.simulator.run import run as run_parts
from fedtap.simulator.scores import limits
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import tensors_of
from tests.scenarios.test_cli import run
from tests.support.scenes import Scene

SMALL = {"model": "mlp", "size": "16", "attack": "linear", "victims": "2", "clients": "2"}
SMALL |= {"rounds": "1", "training_batch": "4"}


ATTACKS = "inverting_gradients(steps=2),inverting_gradients(steps=2,adaptive=True)"


def part(**knobs: str) -> Scene:
    return plan("dp", {**SMALL, **knobs})[0]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small run of dp leaves."""
    folder = tmp_path_factory.mktemp("dp")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "dp", *words, "--epsilon", "1,inf", "--out", str(folder)) == 0
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_the_rows_say_what_was_promised_what_was_got_and_what_it_cost(left: Path) -> None:
    images, games = ([row for row in rows(left) if ("canaries" in row) == game] for game in (False, True))
    columns = "epsilon delta success success_low success_high bound accuracy"
    assert all({*columns.split(), "protects", "adjacency", "sensitivity"} <= row.keys() for row in (*images, *games))
    assert {row["not_covered"] for row in (*images, *games)} == {"number of examples, partition"}
    page = (left / "report.html").read_text()
    assert "ε speaks of the update alone. Beside it travels in the clear: number of examples, partition." in page
    assert "a real client&#x27;s noise must come from its operating system" in page.replace("A real", "a real")
    assert [row["epsilon"] for row in images] == [1.0, 1.0, None, None]
    assert [row["success"] for row in images] == [0, 0, 1, 1]  # an MLP's first layer is read off, unless there is noise
    assert all(row["bound"] is None and row["accuracy"] > 0 and row["delta"] == 1e-5 for row in images)
    assert all("∞" in row["epsilon_note"] for row in images[2:])
    (game,) = games
    assert (game["epsilon"], game["accuracy"]) == (1.0, None)
    assert game["bound"] == pytest.approx(Gaussian(images[0]["sigma"], 1, "client", "add/remove").bound(0.5))
    assert game["success_low"] <= game["bound"]


@given(won=st.integers(0, 9), lost=st.integers(0, 9), failed=st.integers(0, 2), asked=st.sampled_from((0.0, 20.0)))
def test_success_is_the_share_of_images_that_came_back(won: int, lost: int, failed: int, asked: float) -> None:
    """A recognisable image is one, or if the user names a PSNR an image from so many decibels on."""
    back = {"levels": ["nothing" if asked else "recognisable"], "psnr_images": [20.0]}
    gone = {"levels": ["recognisable" if asked else "nothing"], "psnr_images": [19.99]}
    rows = [back] * won + [gone] * lost + [{"levels": None, "psnr_images": None}] * failed
    found = success_of([row | {"success_db": asked} for row in rows])
    if not won + lost:
        assert not found
        return
    low, high = limits(won, won + lost, 0.025)
    assert found == {"success": won / (won + lost), "success_low": low, "success_high": high}


@settings(deadline=None, max_examples=30)
@given(epsilon=st.floats(0.1, 1e4), clip=st.floats(0.01, 100), mechanism=st.sampled_from(("update", "dp_sgd")))
def test_the_noise_is_that_of_the_epsilon_asked_for(epsilon: float, clip: float, mechanism: str) -> None:
    words = {"epsilon": str(epsilon), "clip": str(clip), "mechanism": mechanism, "local_steps": "3", "rounds": "4"}
    found = promised(part(**words))
    assert found["epsilon"] == pytest.approx(epsilon, rel=1e-4)
    assert found["protects"] == ("client" if mechanism == "update" else "example")
    assert found["adjacency"] == ("add/remove" if mechanism == "update" else "replace")
    assert found["sensitivity"] == pytest.approx(clip if mechanism == "update" else 2 * clip)
    assert found["releases"] == 5
    assert found["epsilon_all"] > epsilon


def test_a_client_answers_in_every_attacked_round() -> None:
    few, many = (promised(part(epsilon="1", rounds="4", victims=victims)) for victims in ("2", "5"))
    assert (few["releases"], many["releases"]) == (5, 7)
    assert many["epsilon"] == few["epsilon"]
    assert many["epsilon_all"] > few["epsilon_all"]


def test_a_grid_with_fewer_clients_than_victims_has_more_rounds(tmp_path: Path) -> None:
    loose = plan("dp", SMALL | {"clients": "0", "victims": "5", "epsilon": "1", "attack": "grey"})[0]
    grid = LocalGrid(client_app(lambda config: (loose,)), 3)  # two honest clients
    found = run_parts((loose,), lambda part: grid, tmp_path / "out", device=torch.device("cpu"), data_root=tmp_path)
    assert {row["round"] for row in found} == {2, 3, 4}
    assert {row["releases"] for row in found} == {4}
    assert found[0]["epsilon_all"] == promised(part(epsilon="1", victims="5"))["epsilon_all"]


@pytest.mark.parametrize("mechanism", ["dp_sgd", "local_dp"])
def test_noise_inside_the_client_is_played_by_opacus_and_by_flower(mechanism: str, tmp_path: Path) -> None:
    parts = plan(
        "dp", SMALL | {"mechanism": mechanism, "epsilon": "10", "local_steps": "2", "batch": "2", "attack": ATTACKS}
    )
    grid = LocalGrid(client_app(lambda config: parts), 3)
    found = run_parts(parts, lambda part: grid, tmp_path / "out", device=torch.device("cpu"), data_root=tmp_path)
    assert [row["adaptive"] for row in found] == [False, False, True, True]
    assert all(row["error"] is None and row["epsilon"] == pytest.approx(10, rel=0.1) for row in found)
    assert found[0]["protects"] == ("example" if mechanism == "dp_sgd" else "client")


@pytest.mark.parametrize("name", ["dp", "fedavg_defended"])
def test_who_knows_of_the_noise_attacks_beside_who_does_not(name: str) -> None:
    assert [attack.adapts for attack in plan(name, {})[0].attacks] == [False, True]


def test_flowers_mod_is_told_an_epsilon_of_its_own() -> None:
    found = promised(part(mechanism="local_dp", epsilon="10"))
    assert found["epsilon"] == pytest.approx(10.4, abs=0.05)


def test_repetitions_compose() -> None:
    once, often = (promised(plan("repeat", {"repeats": many})[0]) for many in ("1", "9"))
    expected = Gaussian(0.002 / 3, 10.0, "client", "add/remove").guarantee(1e-5).epsilon
    assert often["epsilon"] == pytest.approx(expected, rel=1e-6)
    assert once["epsilon"] < often["epsilon"]


def test_sigma_takes_the_place_of_epsilon() -> None:
    parts = plan("dp", {"sigma": "0.1,0.2"})
    assert [made.defence for made in parts] == ["clip(1.0)+noise(0.1)", "clip(1.0)+noise(0.2)"]
    assert [made.swept for made in parts] == [(("sigma", "0.1"),), (("sigma", "0.2"),)]
    canaries = [made for made in plan("dp", {"epsilon": "1,2,inf"}) if isinstance(made, Canary)]
    assert [canary.epsilon for canary in canaries] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("dp", {"epsilon": "0"}, "ε of 0"),
        ("dp", {"epsilon": "-1"}, "ε of -1"),
        ("dp", {"epsilon": "0", "mechanism": "local_dp"}, "ε of 0"),
        ("dp", {"epsilon": "nan"}, "ε"),
        ("dp", {"delta": "1"}, "δ is a probability"),
        ("dp", {"delta": "0"}, "δ is a probability"),
        ("dp", {"clip": "0"}, "--clip"),
        ("dp", {"sigma": "-1"}, "--sigma"),
        ("dp", {"sigma": "1", "mechanism": "local_dp"}, "give --epsilon"),
        ("dp", {"epsilon": "inf", "mechanism": "local_dp"}, "ε of inf"),
        ("dp", {"defence": "sign()"}, "--mechanism"),
        ("dp", {"mechanism": "dpsgd"}, "did you mean dp_sgd?"),
        ("dp", {"model": "resnet20", "mechanism": "dp_sgd"}, "GroupNorm"),
        ("repeat", {"delta": "2"}, "δ is a probability"),
        ("repeat", {"repeats": "0"}, "--repeats"),
        ("repeat", {"defence": "laplace(1)"}, "Laplace"),
        ("fedavg_defended", {"delta": "0"}, "δ is a probability"),
        ("first_leak", {"training_batch": "4"}, "add --rounds"),
    ],
)
def test_a_mistake_gets_one_sentence(
    name: str,
    knobs: Mapping[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for knob, value in knobs.items() for word in (f"--{knob.replace('_', '-')}", value)]
    assert run(monkeypatch, name, *words, "--out", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def normed(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.BatchNorm1d(8), nn.Linear(8, classes))


def test_what_no_epsilon_covers_stands_in_the_row(tmp_path: Path) -> None:
    made = plan(
        "repeat",
        {"model": "tests.scenarios.test_dp:normed", "size": "16", "batch": "2", "victims": "1", "repeats": "1"},
    )
    parts = [dataclasses.replace(made[0], attack="grey", local_samples=samples) for samples in (0, 8)]
    found = run_parts(
        parts,
        lambda part: LocalGrid(client_app(lambda config: parts), 2),
        tmp_path / "out",
        device=torch.device("cpu"),
        data_root=tmp_path,
    )
    said = "number of examples, partition"
    statistics = ", BatchNorm's statistics"
    assert [row["not_covered"] for row in found] == [said + statistics, f"{said}, drift norm{statistics}"]


@pytest.mark.parametrize("defence", ["none", "clip(1.0)+noise(0.1)"])
@pytest.mark.parametrize("samples", [0, 8])
def test_beside_the_update_travels_what_the_server_needs(samples: int, defence: str) -> None:
    made = Scene(model="mlp", size=16, victims=1, clients=2, defence=defence, local_samples=samples)
    app, seen = client_app(lambda config: (made,)), list[dict[str, Any]]()

    class Seen(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            answers = list(super().send_and_receive(messages, timeout=timeout))
            seen.extend(dict(answer.content.metric_records["metrics"]) for answer in answers)
            return answers

    play(made, Seen(app, 3), private_data(made, Path("data"), 2))
    assert len(seen) == 3
    for metrics in seen:
        drift = metrics.pop("drift_norm", None)
        assert (drift is not None) == bool(samples)
        assert (drift or 0) > 0 if samples and metrics["partition"] == 0 else not drift
        assert metrics == {"num-examples": 1, "partition": metrics["partition"]}


def heard(**knobs: Any) -> Any:
    made = Scene(attack="", name="repeat", model="mlp", size=16, victims=3, clients=2, **knobs)
    private = private_data(made, Path("data"), 2)
    return play(made, LocalGrid(client_app(lambda config: (made,)), 3), private), private


def test_what_is_repeated_is_averaged_at_the_same_weights() -> None:
    (plain, names), (loud, private) = heard(), heard(defence="noise(0.1)", repeats=4)
    assert list(loud.leaks) == private.names() == [(0, 1), (1, 1), (0, 5)]
    for (client, rnd), victim in zip(private.names(), names.names(), strict=True):
        assert all(private.victim(client, rnd + number) == private.victim(client, rnd) for number in range(4))
        assert torch.equal(private(client, rnd)[0], names(*victim)[0])
    first = loud.leaks[0, 1]
    assert first.protocol.defence == "noise(0.05)"
    apart = torch.cat([(first.observed[name] - plain.leaks[0, 1].observed[name]).flatten() for name in first.observed])
    assert float(apart.std()) == pytest.approx(0.1 / math.sqrt(4), rel=0.02)
    start = tensors_of(loud.start)
    assert all(torch.equal(start[name], weights) for name, weights in loud.leaks[0, 5].weights.items())


def test_training_goes_on_before_the_repetitions() -> None:
    found, private = heard(rounds=2, repeats=2, training_batch=4)
    start, sent = tensors_of(found.start), found.leaks[0, 3].weights
    assert all(not torch.equal(start[name], sent[name]) for name in sent)
    assert len(private(0, 1)[1]) == len(private(0, 2)[1]) == 4
    assert len(private(0, 3)[1]) == 1


def test_answers_at_other_weights_have_no_mean() -> None:
    found, _ = heard()
    with pytest.raises(FedtapError, match="different weights"):
        mean([found.leaks[0, 1], found.leaks[0, 2]], "none")


def test_only_gaussian_noise_that_comes_last_wears_off_by_a_root() -> None:
    assert averaged("clip(1.0)+noise(0.5)", 25) == "clip(1.0)+noise(0.1)"
    for text in ("none", "noise(0.5)+sign()", "laplace(0.5)", "quantise(4)"):
        assert described(averaged(text, 25)) == described(text)


def test_defences_act_in_training_rounds_too() -> None:
    quiet, loud = (heard(rounds=1, defence=text)[0].arrays for text in ("none", "noise(5.0)"))
    assert not any(
        torch.equal(a, b) for a, b in zip(tensors_of(quiet).values(), tensors_of(loud).values(), strict=True)
    )


def test_the_table_holds_every_attack_and_every_game(left: Path) -> None:
    console = Console(width=80, record=True)
    console.print(table(rows(left), image_columns(rows(left))))
    shown = console.export_text()
    assert shown.count("linear") == 2
    assert "∞" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert price([{"attack": "dlg"}]) == {}


def test_defences_of_the_same_epsilon_are_told_apart(left: Path) -> None:
    unprotected = [row for row in rows(left) if row["epsilon"] is None]
    pruned = [row | {"defence": "prune(0.9)"} for row in unprotected]
    both = [*unprotected, *pruned]
    groups, shown = summary(both, image_columns(both))
    assert [len(group) for group in groups] == [2, 2]
    assert "prune(0.9)" in [column.cell(groups[1]) for column in shown]
    console = Console(width=100, record=True)
    console.print(table(both, image_columns(both)))
    assert "prune(0.9)" in console.export_text()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=18).map(sorted))
def test_names_beside_points_that_touch_stand_apart(heights: list[float]) -> None:
    places = _apart(heights, 0.05)
    assert all(after - before >= 0.05 - 1e-9 for before, after in itertools.pairwise(places))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    if all(after - before >= 0.05 for before, after in itertools.pairwise(heights)):
        assert places == pytest.approx(heights)


def test_the_page_looks_right_in_a_browser(left: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium on this machine to open the page in")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400"]
    page = (left / "report.html").as_uri()
    shown = subprocess.run([*words, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "Privacy and its price" in shown
    assert "ε = ∞" in shown
    assert len(re.findall("<svg role=.img.", shown)) >= 2
    subprocess.run(
        [*words, f"--screenshot={tmp_path / 'page.png'}", page], capture_output=True, timeout=120, check=True
    )
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"), dtype=int)
    assert pixels.shape == (2400, 1200, 3)
    first = np.array([int(COLORS[0][at : at + 2], 16) for at in (1, 3, 5)])
    assert (abs(pixels - first).sum(2) < 12).sum() > 50  # the charts are drawn
    inner = escape((left / "report.html").read_text())  # a window is 500 px wide at least, a frame may be a telephone's
    measure = "document.title = this.contentDocument.documentElement.scrollWidth - this.clientWidth"
    frame = f"<iframe width=390 height=800 style='border: 0' srcdoc='{inner}' onload='{measure}'></iframe>"
    (tmp_path / "narrow.html").write_text(f"<!doctype html><meta charset=utf-8><title></title>{frame}")
    narrow = [*words, "--dump-dom", (tmp_path / "narrow.html").as_uri()]
    shown = subprocess.run(narrow, capture_output=True, text=True, timeout=120, check=True).stdout
    (over,) = re.findall("<title>(.*?)</title>", shown)[:1]
    assert int(over) <= 0, "on a telephone the page itself does not scroll sideways"
