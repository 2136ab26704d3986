"""Defences: what they do to a gradient, and that clients, compromised or not, send what they leave."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clients.defences import Noise, parse
from simulator.errors import FedtapError
from simulator.federation import play, practice
from simulator.leaks import stack
from tests.test_federation import BASE, federation


@pytest.mark.parametrize(
    "text", ["", "noise", "noise()", "noise(-1)", "noise(1, 2)", "noise(x)", "noise(1e999)", "dp(1)"]
)
def test_what_is_no_defence_is_refused(text: str) -> None:
    with pytest.raises(FedtapError, match="write none or noise"):
        parse(text)


def test_noise_has_the_spread_it_says() -> None:
    gradient = {"b": torch.ones(3, 5000), "a": torch.zeros(5000)}
    noise = parse("noise(0.3)")
    assert noise == Noise(0.3)
    assert parse("none") is None
    one, two = ((noise or Noise(0))(gradient, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for name, tensor in gradient.items():
        assert abs(float((one[name] - tensor).std()) - 0.3) < 0.02
        assert not torch.isclose(one[name], two[name]).all()


@pytest.mark.parametrize("model", ["lenet", "resnet20"])
def test_clients_send_the_defended_gradient(model: str) -> None:
    plain = dataclasses.replace(BASE, model=model)
    defended = dataclasses.replace(plain, defence="noise(0.5)")
    leaks, fed = [], []
    for scenario in (plain, defended):
        grid, private = federation(scenario)
        heard = play(scenario, grid, private)
        leaks.append(stack([heard.leaks[name] for name in private.names()]))
        images, labels = private.world.public.batch(torch.arange(3))
        (pairs,) = practice(grid, scenario, private, heard, images[:, None], labels[:, None])
        fed.append(pairs.leak)
    assert leaks[1].protocol.defence == fed[1].protocol.defence == "noise(0.5)"
    for without, within in (leaks, fed):
        difference = torch.cat(
            [(within.observed[name] - without.observed[name]).flatten(1) for name in without.observed], dim=1
        )
        assert torch.allclose(difference.std(1), torch.tensor(0.5), rtol=0.05)
        assert not torch.isclose(difference[0], difference[1]).all()
    for name, buffer in leaks[0].buffers.items():  # what is no parameter is left as it is
        torch.testing.assert_close(leaks[1].buffers[name], buffer)
