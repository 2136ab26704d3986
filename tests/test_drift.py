"""Drift: a victim that trained by itself shares the gradient of where it is; practice may be older than the leak."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from clients.training import UNSHARED_BATCH, UNSHARED_RATE
from simulator.attack import generator
from simulator.errors import FedtapError
from simulator.federation import play, practice
from simulator.models import build
from simulator.practice import gradients
from simulator.records import tensors_of
from tests.test_federation import BASE, federation


def test_a_victim_shares_the_gradient_of_where_it_drifted_to() -> None:
    scenario = dataclasses.replace(BASE, local_samples=50, local_epochs=2)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    net = build(scenario.model, private.world.shape, len(private.world.classes), seed=scenario.weights_seed)
    start = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    images, labels = private.world.train.batch(slice(50))
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
    moved = apart / torch.cat([tensor.flatten() for tensor in start.values()]).norm()
    assert heard.moved[client, rnd] == pytest.approx(float(moved), rel=1e-3)


def test_no_drift_is_no_change() -> None:
    grid, private = federation(BASE)
    heard = play(BASE, grid, private)
    assert set(heard.moved.values()) == {0.0}


def test_practice_may_be_older_than_the_leak() -> None:
    scenario = dataclasses.replace(BASE, rounds=2)
    images, labels = federation(scenario)[1].world.public.batch(torch.arange(2))
    found = {}
    for when in ("start", "now"):
        part = dataclasses.replace(scenario, practised=when)
        grid, private = federation(part)
        heard = play(part, grid, private)
        (pairs,) = practice(grid, part, private, heard, images[:, None], labels[:, None])
        net = build(part.model, private.world.shape, len(private.world.classes), seed=part.weights_seed)
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
