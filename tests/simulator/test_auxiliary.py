"""Practice sets and trained attacks: what is saved comes back, what is damaged or of another kind is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedtap.attackers import parse
from fedtap.attackers.gradients.coarse_git import CoarseGIT
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.gradients.lti import LTI
from fedtap.attackers.parts import teaching
from fedtap.attackers.parts.priors import PublicImages
from fedtap.attackers.parts.teaching import FlatGradient, check_room, ordered, teach
from fedtap.attackers.wrappers.refine import Refine
from fedtap.attackers.wrappers.saved import Saved
from fedtap.clients.app import client_app
from fedtap.simulator.attack import Learned
from fedtap.simulator.auxiliary import Auxiliary, Provenance, gradients, trainings
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import private_data
from fedtap.simulator.federation.rounds import auxiliary as hear_pairs
from fedtap.simulator.federation.rounds import play as play_rounds
from fedtap.simulator.leaks import Leak
from fedtap.simulator.models.registry import build
from fedtap.simulator.run import run
from fedtap.simulator.wire.grid import LocalGrid
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures
from tests.support.scenes import Scene

LENET = build("lenet", (3, 16, 16), 10, seed=1234)


def heard(model: str = "lenet", batch: int = 1) -> Leak:
    return leak_of(*pictures(3, batch), build(model, (3, 16, 16), 10, seed=1234), model)


def test_a_gradient_of_each_example_is_what_a_loop_computes() -> None:
    for model in ("lenet", "convnet", "vit"):
        network = build(model, (3, 16, 16), 10, seed=3)
        images, labels = pictures(3, 2)
        found = gradients(network, images, labels)
        for pair in range(3):
            loss = F.cross_entropy(network(images[pair]), labels[pair])
            for (name, _), true in zip(
                network.named_parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True
            ):
                torch.testing.assert_close(found[name][pair], true, rtol=1e-3, atol=1e-6)


def test_a_frozen_parameters_gradient_is_zero() -> None:
    network = build("lenet", (3, 16, 16), 10, seed=3)
    network.conv1.requires_grad_(False)  # type: ignore[union-attr]
    found = gradients(network, *pictures(2, 1))
    assert not found["conv1.weight"].any()
    assert found["conv2.weight"].any()


def test_a_auxiliary_is_read_in_the_order_it_was_heard(tmp_path: Path) -> None:
    made = auxiliary_for(heard(), tmp_path, pairs=40)
    again = Auxiliary.saved(made.folder, build)
    assert again is not None
    assert again.about == made.about
    images, labels = pictures(40, 1, seed=100)
    for auxiliary, count in ((again, 40), (again.first(20), 20), (again.first(90), 40)):
        chunks = list(auxiliary)
        assert len(auxiliary) == count
        assert torch.equal(torch.cat([pairs.images for pairs in chunks]), images[:count])
        assert torch.equal(torch.cat([pairs.labels for pairs in chunks]), labels[:count])
        true = gradients(LENET, images[:count], labels[:count])["fc.weight"]
        torch.testing.assert_close(torch.cat([pairs.leak.observed["fc.weight"] for pairs in chunks]), true)


def test_a_auxiliary_that_is_not_whole_is_none_or_refused(tmp_path: Path) -> None:
    made = auxiliary_for(heard(), tmp_path)
    assert Auxiliary.saved(tmp_path, build) is None
    chunk = sorted(made.folder.glob("pairs_*"))[1]
    content = chunk.read_bytes()
    chunk.write_bytes(content[: len(content) // 2])
    with pytest.raises(FedtapError, match="the auxiliary pairs are not whole"):
        list(made)
    (made.folder / "auxiliary.json").write_text('{"format": 1}')
    with pytest.raises(FedtapError, match="does not describe auxiliary pairs"):
        Auxiliary.saved(made.folder, build)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(0, 5))
def test_hashing_is_linear_and_keeps_lengths_on_average(most: int, seed: int) -> None:
    network = nn.Linear(6, 5)
    draw = torch.Generator().manual_seed(seed)
    gradient = {name: torch.randn(200, *p.shape, generator=draw) for name, p in network.named_parameters()}
    flat = FlatGradient(network, most)
    hashed = flat(gradient)
    assert hashed.shape == (200, min(most, 35))
    doubled = flat({name: 2 * tensor for name, tensor in reversed(gradient.items())})  # whatever the order
    torch.testing.assert_close(doubled, 2 * hashed)
    power = sum(tensor.square().sum() for tensor in gradient.values())
    assert 0.5 < float(hashed.square().sum() / power) < 2.0


def test_a_batchs_images_are_taught_in_the_order_of_the_guess() -> None:
    truth = torch.rand(4, 3, 7)
    for order in ([0, 1, 2], [2, 0, 1]):
        assert torch.equal(ordered(truth, truth[:, order] + 0.01), truth[:, order])


def learned(tmp_path: Path, leak: Leak | None = None) -> Learned:
    return LTI(width=8, epochs=1).fit(auxiliary_for(leak or heard(), tmp_path))


def test_a_trained_attack_comes_back_from_its_files(tmp_path: Path) -> None:
    made = learned(tmp_path)
    made.save(tmp_path / "lti.safetensors")
    saved = Saved(str(tmp_path / "lti.safetensors"))
    assert saved.name == made.name == "lti"
    assert not saved.needs_auxiliary
    leak = dataclasses.replace(heard(), weights=None, buffers={})
    assert torch.equal(saved(leak).images, made(leak).images)
    refined = Refine(saved, IDLG(steps=2))
    assert refined(heard()).images.shape == (3, 1, 3, 16, 16)


def test_auxiliary_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.optim.Optimizer] = []
    monkeypatch.setattr(
        "fedtap.attackers.gradients.lti.teach", lambda *with_, **how: used.append(with_[3]) or teach(*with_, **how)
    )
    auxiliary = auxiliary_for(heard(), tmp_path, pairs=800)
    images, _ = pictures(3, 1)
    lti = LTI(width=100, epochs=20, rate=1e-3, batch=32).fit(auxiliary)
    assert used[0].param_groups[0]["lr"] == pytest.approx(1e-4)  # it ends at a tenth of its rate
    error = float((lti(heard()).images - images).square().mean())
    grey = float((images - images.mean()).square().mean())
    assert error < 0.96 * grey
    stranger = leak_of(*pictures(3, 1, seed=9), LENET, "lenet")
    assert float((lti(stranger).images - images).square().mean()) > 1.02 * error
    assert abs(float(lti(heard()).objective[0]) / error - 1) < 1  # its own estimate, on held-out pairs


def test_what_does_not_fit_into_memory_is_refused_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    monkeypatch.setattr(teaching, "MEMORY", tmp_path / "meminfo")
    check_room(100, 5000)
    with pytest.raises(FedtapError, match=r"200 pairs of 5,000 numbers.*at most --pairs"):
        check_room(200, 5000)
    with pytest.raises(FedtapError, match=r"images of 1,000 numbers takes 0\.0 GB.*smaller images, --size"):
        PublicImages(1000)
    with pytest.raises(FedtapError, match=r"use at most --pairs"):
        CoarseGIT(epochs=0).fit(auxiliary_for(heard(), tmp_path, 80))


def test_wrappers_pass_their_auxiliary_on(tmp_path: Path) -> None:
    wrapped = Refine(LTI(width=8, epochs=1), IDLG(steps=2))
    assert wrapped.needs_auxiliary
    with pytest.raises(FedtapError, match="is not trained"):
        wrapped(heard())
    ready = wrapped.fit(auxiliary_for(heard(), tmp_path))
    assert not ready.needs_auxiliary
    assert len(ready.learned()) == 1
    assert ready(heard()).objective.isfinite().all()


def test_what_it_has_not_practised_on_is_refused(tmp_path: Path) -> None:
    made = learned(tmp_path)
    for leak, said in ((heard(batch=2), "batch 1.*this leak is of.*batch 2"), (heard("mlp"), "pairs of lenet.*of mlp")):
        with pytest.raises(FedtapError, match=said):
            made(leak)
    defended = dataclasses.replace(heard(), protocol=dataclasses.replace(heard().protocol, defence="noise(0.1)"))
    with pytest.warns(UserWarning, match="was trained under defence none and this leak's is noise"):
        made(defended)
    with pytest.raises(FedtapError, match="at least 2 auxiliary pairs"):
        LTI(width=8).fit(auxiliary_for(heard(), tmp_path).first(1))


def test_a_damaged_attacker_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lti.safetensors"
    learned(tmp_path).save(path)
    description = path.with_suffix(".json").read_text()

    def refused(said: str, name: str = str(path)) -> None:
        with pytest.raises(FedtapError, match=said):
            Saved(name)(heard())

    refused("is not there", str(tmp_path / "other.safetensors"))
    refused("is not there", str(tmp_path))
    for broken in ("{", "{}", description.replace('"format": 2', '"format": 9'), description.replace("lti(", "dlg(")):
        path.with_suffix(".json").write_text(broken)
        refused("describes no trained attack")
    path.with_suffix(".json").write_text(description)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    refused("cut short or replaced")
    path.write_bytes(content)
    changed = json.loads(description) | {"attack": "lti(width=9, epochs=1)"}
    path.with_suffix(".json").write_text(json.dumps(changed))
    refused("does not hold what lti learns")


def test_written_is_read_back() -> None:
    for text in ("lti(width=5)", "refine(start=lti, finish=idlg(steps=3))", "restarts(attack=idlg, times=2)"):
        (attack,) = parse(text)
        assert attack.written() == text
        assert parse(attack.written()) == (attack,)


BASE = Scene(attack="lti(width=8,epochs=1)", size=16, victims=2, pairs=20, model="mlp", threat_model="eavesdropper")


def play(out: Path, **change: object) -> list[dict[str, object]]:
    part = dataclasses.replace(BASE, **change)  # type: ignore[arg-type]

    def grid(part: Scene) -> LocalGrid:
        return LocalGrid(client_app(lambda config: (part,)), part.victims + 1)

    return run([part], grid, out, device=torch.device("cpu"), data_root=Path("data"), overwrite=True)


def test_a_run_practises_once_and_keeps_what_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.simulator.federation.rounds.DRIFT_STEPS", 20)
    shared = str(tmp_path / "pairs")
    rows = play(tmp_path / "one", auxiliary=shared)
    assert [row["pairs"] for row in rows] == [20, 20]
    assert all(float(row["fit_seconds"]) > 0 for row in rows)  # type: ignore[arg-type]
    trained = str(tmp_path / "one/trained_attacks/part_0-0-lti.safetensors")
    again = play(tmp_path / "two", attack="", trained_attack=trained)
    assert [row["mse"] for row in again] == [row["mse"] for row in rows]

    made = sorted((tmp_path / "pairs").iterdir())
    assert [row["pairs"] for row in play(tmp_path / "three", auxiliary=shared, pairs=15)] == [15, 15]
    assert sorted((tmp_path / "pairs").iterdir()) == made, "the first of those that are there will do"
    for change in (
        {"weights_seed": 5},
        {"defence": "noise(0.1)"},
        {"model": "lenet"},
        {"auxiliary_trainings": 2},
        {"auxiliary_labels": "own"},
    ):
        play(tmp_path / "four", auxiliary=shared, **change)
        assert len(sorted((tmp_path / "pairs").iterdir())) == len(made) + 1, change
        made = sorted((tmp_path / "pairs").iterdir())
    defended = [play(tmp_path / "five", auxiliary=shared, defence="noise(0.1)", seed=seed)[0]["mse"] for seed in (0, 1)]
    assert defended[1] == play(tmp_path / "six", defence="noise(0.1)", seed=1)[0]["mse"] != defended[0]
    for change, said in (
        ({"pairs": 4000}, "are more than the"),
        ({"auxiliary_trainings": 21}, "21 trainings are more"),
    ):
        with pytest.raises(FedtapError, match=said):
            play(tmp_path / "seven", **change)


def test_a_damaged_auxiliary_ends_the_run_and_pairs_that_teach_nothing_do_not(tmp_path: Path) -> None:
    rows = play(tmp_path / "one", attack="identified(idlg(steps=2)),lti(width=8,epochs=1)", model="lenet")
    assert [row["error"] is None for row in rows] == [False, False, True, True]
    assert "auxiliary pairs" in str(rows[0]["error"])
    (chunk,) = (tmp_path / "one/auxiliary").rglob("pairs_00000.safetensors")
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(FedtapError, match="the auxiliary pairs are not whole"):
        play(tmp_path / "one", attack="lti(width=8,epochs=2)", model="lenet")


def test_each_learner_is_saved_under_a_name_of_its_own(tmp_path: Path) -> None:
    one, two = "lti(width=8,epochs=1)", "lti(width=8,epochs=2)"
    play(tmp_path, attack=f"{one},{two},refine({one},{two})", threat_model="curious_server")
    names = sorted(path.name for path in (tmp_path / "trained_attacks").glob("*.safetensors"))
    assert names == [f"part_0-{n}-lti.safetensors" for n in ("0", "1", "2-1", "2")]


def test_pairs_are_met_along_as_many_trainings_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.simulator.federation.rounds.DRIFT_STEPS", 30)
    images = torch.full((1, 3, 16, 16), 0.5)
    found = []
    for auxiliary_trainings in (0, 3):
        part = dataclasses.replace(BASE, auxiliary_trainings=auxiliary_trainings)
        private = private_data(part, Path("data"), 2)
        grid = LocalGrid(client_app(lambda config, part=part: (part,)), 3)  # type: ignore[misc]
        heard = play_rounds(part, grid, private)
        same = images.expand(7, 1, 3, 16, 16)
        chunks = list(hear_pairs(grid, part, private, heard, same, torch.zeros(7, 1, dtype=torch.long)))
        found.append([len(torch.unique((p.leak.observed["5.bias"] * 1e5).round(), dim=0)) for p in chunks])
    assert found[0] == [1]
    assert [len(part) for part in trainings(7, 3)] == [3, 2, 2]
    assert len(found[1]) == 3, "one message a training"
    assert sum(found[1]) > 3, "and several weights along it"


@pytest.mark.parametrize(
    "change", [{}, {"auxiliary_source": "server"}, {"defence": "clip(1e6)"}, {"auxiliary_trainings": 2}]
)
def test_pairs_are_rounded_as_victims_are(change: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.simulator.federation.rounds.DRIFT_STEPS", 3)
    part = dataclasses.replace(BASE, threat_model="curious_server", model="lenet", **change)  # type: ignore[arg-type]
    private = private_data(part, Path("data"), 2)
    grid = LocalGrid(client_app(lambda config: (part,)), 3)
    heard = play_rounds(part, grid, private)
    (images, _), _ = (private.behind(*name) for name in private.names())
    labels = torch.zeros(4, 1, dtype=torch.long)
    (pairs, *_) = hear_pairs(grid, part, private, heard, images.expand(4, 1, *images.shape[1:]), labels)
    for leak in (*heard.leaks.values(), pairs.leak):
        assert leak.resolution == pytest.approx(6.5e-9 / part.learning_rate)
        for name, before in (leak.weights or {}).items():
            # What crossed the wire is a float32 weight: before - rate * gradient is one, to the gradient's own digits.
            change = part.learning_rate * leak.observed[name].double()
            after = before.double() - change
            off_grid = (after - after.float().double()).abs()
            assert (off_grid <= 2**-23 * change.abs() + 1e-12).all(), name


@pytest.mark.parametrize("source", ["server", "compromised_client"])
def test_frozen_batchnorm_is_the_victims_and_the_pairs(source: str) -> None:
    """Under `batchnorm=eval` an image's gradient does not depend on its batch, and running statistics stay."""
    part = dataclasses.replace(
        BASE, model="resnet20", batchnorm="eval", batch=2, auxiliary_source=source, threat_model="curious_server"
    )
    private = private_data(part, Path("data"), 2)
    grid = LocalGrid(client_app(lambda config: (part,)), 3)
    heard = play_rounds(part, grid, private)
    net = build("resnet20", private.dataset.shape, len(private.dataset.classes), seed=part.weights_seed).eval()
    images, labels = private.behind(*private.names()[0])
    wanted = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
    (pairs,) = hear_pairs(grid, part, private, heard, images[None], labels[None])
    leaks = [heard.leaks[private.names()[0]], pairs.leak]
    for leak in leaks:
        assert leak.protocol.batchnorm == "eval"
        for (name, _), gradient in zip(net.named_parameters(), wanted, strict=True):
            assert torch.allclose(leak.observed[name][0], gradient, atol=1e-5 * float(gradient.norm()) + 1e-6), name
        for name, tensor in leak.buffers.items():
            assert torch.equal(tensor, net.get_buffer(name)), name


def test_random_labels_are_of_all_classes_whatever_the_images_are(tmp_path: Path) -> None:
    found = {}
    for labels in ("own", "random"):
        play(tmp_path / labels, auxiliary_labels=labels, auxiliary_classes="low", pairs=60)
        (folder,) = (tmp_path / labels / "auxiliary").iterdir()
        auxiliary = Auxiliary.saved(folder, build)
        assert auxiliary is not None
        assert ("with random labels" in str(auxiliary.about)) == (labels == "random")
        (pairs,) = auxiliary
        net = build("mlp", (3, 16, 16), int(auxiliary.about.protocol.classes), seed=1234)
        true = gradients(net, pairs.images, pairs.labels)
        torch.testing.assert_close(pairs.leak.observed["5.bias"], true["5.bias"], rtol=1e-3, atol=1e-6)
        found[labels] = set(pairs.labels.flatten().tolist())
    half = auxiliary.about.protocol.classes // 2
    assert max(found["own"]) < half
    assert found["random"] == set(range(2 * half))


def test_random_labels_are_one_draw_for_every_number_of_pairs_and_seed(tmp_path: Path) -> None:
    found = []
    for name, change in (("few", {"pairs": 15}), ("many", {"pairs": 20}), ("seed", {"pairs": 20, "seed": 3})):
        play(tmp_path / name, auxiliary=str(tmp_path / "pairs" / name), **change)
        (folder,) = (tmp_path / "pairs" / name).iterdir()
        found.append((folder.name, torch.cat([pairs.labels for pairs in Auxiliary.saved(folder, build) or ()])))
    assert len({folder for folder, _ in found}) == 1, "so that one folder serves all"
    assert torch.equal(found[0][1], found[1][1][:15])
    assert torch.equal(found[1][1], found[2][1])


def test_about_says_what_it_is() -> None:
    about = Provenance(heard().protocol, "photos", 1200)
    assert "1,200 pairs of lenet on 3x16x16 images of photos in 10 classes, batch 1" in str(about)
    assert Provenance.of(json.loads(json.dumps(dataclasses.asdict(about)))) == about
