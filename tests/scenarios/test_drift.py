"""Drift: a victim that trained by itself shares the gradient of where it is; practice may be older than the leak."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.wrappers.identified import Identified
from fedtap.clients.compromised import stops_along
from fedtap.clients.training import UNSHARED_BATCH, UNSHARED_RATE, sgd
from fedtap.simulator.attack import generator
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import PrivateData
from fedtap.simulator.federation.rounds import auxiliary, play
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.records import tensors_of
from tests.scenarios.test_cli import run
from tests.simulator.test_federation import BASE, federation
from tests.support.attack_leaks import auxiliary_for, leak_of, pictures


def test_a_victim_shares_the_gradient_of_where_it_drifted_to() -> None:
    scenario = dataclasses.replace(BASE, local_samples=50, local_epochs=2)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    net = build(scenario.model, private.dataset.shape, len(private.dataset.classes), seed=scenario.weights_seed)
    start = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    images, labels = private.dataset.train.batch(slice(50))
    draw, sgd = generator(scenario.seed, "unshared"), torch.optim.SGD(net.parameters(), UNSHARED_RATE)
    for _ in range(2):
        for some in torch.randperm(50, generator=draw).split(UNSHARED_BATCH):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(net(images[some]), labels[some]).backward()
            sgd.step()
    client, rnd = private.names()[1]
    x, y = private(client, rnd)
    true = gradients(net, x[None], y[None])
    leak = heard.leaks[client, rnd]
    for name, tensor in net.named_parameters():
        torch.testing.assert_close(leak.observed[name], true[name], rtol=1e-3, atol=2e-6)
        assert torch.equal((leak.weights or {})[name], start[name]), "the server knows what it sent, and no more"
        assert not torch.equal(tensor, start[name])
    apart = torch.cat([(p.detach() - start[name]).flatten() for name, p in net.named_parameters()]).norm()
    drift_norm = apart / torch.cat([tensor.flatten() for tensor in start.values()]).norm()
    assert heard.drift_norm[client, rnd] == pytest.approx(float(drift_norm), rel=1e-3)


def test_victims_may_have_drifts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = dataclasses.replace(BASE, local_samples=40, local_trainings=2)
    grid, private = federation(scenario)
    assert [private.drift(victim) for victim in range(scenario.victims)] == sorted(
        private.drift(victim) for victim in range(scenario.victims)
    )
    assert {private.drift(victim) for victim in range(scenario.victims)} == {0, 1}
    one, other = (private.unshared(drift)[0] for drift in (0, 1))
    assert one.shape == other.shape
    assert not torch.equal(one, other)
    assert torch.equal(other, private.unshared(1)[0])
    trained: list[int] = []
    unshared = PrivateData.unshared
    monkeypatch.setattr(PrivateData, "unshared", lambda self, drift=0: trained.append(drift) or unshared(self, drift))
    norms = play(scenario, grid, private).drift_norm
    assert len(set(norms.values())) == 2
    assert sorted(trained) == [0, 1], "each training is done once, in whatever order clients reply"
    same = dataclasses.replace(scenario, local_trainings=1)
    grid, private = federation(same)
    alone = play(same, grid, private).drift_norm
    assert len(set(alone.values())) == 1
    assert set(alone.values()) < set(norms.values()), "the first drift is what it was"
    with pytest.raises(FedtapError, match="lower --local-trainings"):
        federation(dataclasses.replace(scenario, local_trainings=scenario.victims + 1))


def test_no_drift_is_no_change() -> None:
    grid, private = federation(BASE)
    heard = play(BASE, grid, private)
    assert set(heard.drift_norm.values()) == {0.0}


def test_auxiliary_may_be_older_than_the_leak() -> None:
    scenario = dataclasses.replace(BASE, rounds=2)
    images, labels = federation(scenario)[1].dataset.auxiliary.batch(torch.arange(2))
    found = {}
    for when in ("start", "now"):
        part = dataclasses.replace(scenario, auxiliary_at=when)
        grid, private = federation(part)
        heard = play(part, grid, private)
        (pairs,) = auxiliary(grid, part, private, heard, images[:, None], labels[:, None])
        net = build(part.model, private.dataset.shape, len(private.dataset.classes), seed=part.weights_seed)
        if when == "now":
            net.load_state_dict(tensors_of(heard.arrays), strict=False)
        true = gradients(copy.deepcopy(net), images[:, None], labels[:, None])
        for name in true:
            torch.testing.assert_close(pairs.leak.observed[name], true[name], rtol=1e-3, atol=1e-6)
        found[when] = pairs.leak.observed
    assert not torch.allclose(*(torch.cat([t.flatten() for t in part.values()]) for part in found.values()))


def test_more_images_than_there_are_are_refused() -> None:
    with pytest.raises(FedtapError, match="cannot train on 100000 images"):
        federation(dataclasses.replace(BASE, local_samples=100_000))


def test_examples_are_answered_on_the_way() -> None:
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randint(256, (40, 3, 16, 16), generator=draw, dtype=torch.uint8), torch.arange(40) % 4
    examples = {"images": torch.rand(5, 1, 3, 16, 16, generator=draw), "labels": torch.zeros(5, 1, dtype=torch.long)}
    due = torch.tensor([0, 1, 1, 7, 9])
    net = build("lenet", (3, 16, 16), 4, seed=1)
    trained = copy.deepcopy(net)
    parts = [
        gradients(trained, examples["images"][some], examples["labels"][some])
        for some in stops_along(trained, {"images": images, "labels": labels, "steps": due})
    ]
    assert [len(part["fc.bias"]) for part in parts] == [1, 2, 1, 1]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for number, steps in enumerate(due.tolist()):  # each anew from the beginning
        there = copy.deepcopy(net)
        sgd(there, images.float() / 255, labels, steps, UNSHARED_BATCH, UNSHARED_RATE)
        true = gradients(there, examples["images"][number, None], examples["labels"][number, None])
        for name in true:
            torch.testing.assert_close(found[name][number], true[name][0], rtol=1e-4, atol=1e-7)


def test_pairs_of_drifted_weights_look_like_a_drifted_victims_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.simulator.federation.rounds.DRIFT_STEPS", 20)
    scenario = dataclasses.replace(BASE, auxiliary_trainings=2, local_samples=50)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    images, labels = private.dataset.auxiliary.batch(torch.arange(6))
    orders: list[Message] = []
    feed = grid.send_and_receive
    monkeypatch.setattr(grid, "send_and_receive", lambda sent, **how: orders.extend(sent) or feed(sent, **how))
    pairs = list(auxiliary(grid, scenario, private, heard, images[:, None], labels[:, None]))
    assert [len(some) for some in pairs] == [3, 3]
    one, other = (tensors_of(order.content.array_records["drift"]) for order in orders)
    assert len(one["images"]) == len(one["labels"]) == math.ceil(len(private.dataset.auxiliary) / 3)
    assert not torch.equal(one["images"], other["images"])
    assert len(one["steps"]) == 3
    assert bool((one["steps"].diff() >= 0).all())
    sent = tensors_of(heard.arrays)
    for leak in (*(some.leak for some in pairs), *heard.leaks.values()):
        for name, weight in (leak.weights or {}).items():
            assert torch.equal(weight, sent[name]), "of both the server knows the weights that it sent, and no others"


def test_weights_are_not_read_from_pairs_of_many(tmp_path: Path) -> None:
    leak = leak_of(*pictures(2, 1), build("lenet", (3, 16, 16), 10, seed=1), "lenet")
    auxiliary_at = auxiliary_for(leak, tmp_path, 8)
    stops_along = dataclasses.replace(
        auxiliary_at, about=dataclasses.replace(auxiliary_at.about, auxiliary_trainings=4)
    )
    with pytest.raises(FedtapError, match=r"one set of weights.*along 4 trainings: leave out --auxiliary-trainings"):
        Identified(IDLG(steps=1)).fit(stops_along)


def test_who_reads_one_set_of_weights_refuses_many_before_it_practises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "git",
        "--threat-model",
        "eavesdropper",
        "--auxiliary-trainings",
        "5",
        "--attack",
        "refine(identified(exact_git),idlg)",
    ]
    assert run(monkeypatch, *words, "--out", str(tmp_path / "out")) == 2
    assert "one set of weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
