"""Defences in a federation: clients, compromised or not, send what they leave, and unfit models are refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fedtap.simulator.defences.chained import parse
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.rounds import auxiliary, play
from fedtap.simulator.leaks import stack
from fedtap.simulator.models.registry import build
from tests.simulator.test_federation import BASE, federation
from tests.support.defences import drawn


def gradients_of(defence: str, model: str = "lenet") -> list[dict[str, Tensor]]:
    """What the server observes of the victims, and of the compromised client that is fed the same images as them."""
    scenario = dataclasses.replace(BASE, model=model, defence=defence)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    leak = stack([heard.leaks[name] for name in private.names()])
    images, labels = (torch.stack(side) for side in zip(*(private(*name) for name in private.names()), strict=True))
    (pairs,) = auxiliary(grid, scenario, private, heard, images, labels)
    assert leak.protocol.defence == pairs.leak.protocol.defence == defence
    return [dict(leak.observed), dict(pairs.leak.observed)]


@pytest.mark.parametrize(
    "defence", ["clip(0.5)", "prune(0.9)", "sign()", "clip(0.5)+prune(0.9)", "soteria(0.5)", "dp_sgd(0.5, 0.0)"]
)
def test_the_compromised_client_defends_as_a_victim_does(defence: str) -> None:
    (plain, _), (victim, fed) = gradients_of("none"), gradients_of(defence)
    made = parse(defence.replace("dp_sgd(0.5, 0.0)", "clip(0.5)"))  # with one image a batch they are the same
    sent = made.update.stacked(plain, [drawn()] * 3)
    if made.step:
        sent |= {"fc.weight": torch.where(victim["fc.weight"] == 0, 0.0, plain["fc.weight"])}
        silent = (victim["fc.weight"] == 0).all(1)
        assert (silent.float().mean(1) == 0.5).all()
        assert torch.equal(silent, (fed["fc.weight"] == 0).all(1))
    for name, wanted in sent.items():
        # what travels as weights is known to float32's rounding of them, and at a threshold that may tip an entry
        for found in (victim, fed):
            assert torch.isclose(found[name], wanted, rtol=1e-3, atol=5e-6).float().mean() > 0.99, name
    assert not torch.isclose(victim["fc.weight"], plain["fc.weight"], rtol=1e-2, atol=1e-5).all()


@pytest.mark.parametrize(
    ("model", "defence"),
    [("lenet", "noise(0.5)"), ("resnet20", "noise(0.5)"), ("lenet", "local_dp(9999.0, 0.25, 2.0, 0.000419)")],
)
def test_clients_send_the_defended_gradient(model: str, defence: str) -> None:
    plain = dataclasses.replace(BASE, model=model)
    defended = dataclasses.replace(plain, defence=defence)
    leaks, fed = [], []
    for scenario in (plain, defended):
        grid, private = federation(scenario)
        heard = play(scenario, grid, private)
        leaks.append(stack([heard.leaks[name] for name in private.names()]))
        images, labels = private.dataset.auxiliary.batch(torch.arange(3))
        (pairs,) = auxiliary(grid, scenario, private, heard, images[:, None], labels[:, None])
        fed.append(pairs.leak)
    assert leaks[1].protocol.defence == fed[1].protocol.defence == defence
    for without, within in (leaks, fed):
        difference = torch.cat(
            [(within.observed[name] - without.observed[name]).flatten(1) for name in without.observed], dim=1
        )
        assert torch.allclose(difference.std(1), torch.tensor(0.5), rtol=0.05)
        assert not torch.isclose(difference[0], difference[1]).all()
    for name, buffer in leaks[0].buffers.items():  # what is no parameter is left as it is
        torch.testing.assert_close(leaks[1].buffers[name], buffer)


@pytest.mark.parametrize(
    ("model", "defence", "said"),
    [
        (
            "tests.simulator.defences.test_federated:convolutional",
            "precode(8)",
            "stands before the linear layer that yields the logits, and there is none",
        ),
        ("resnet20", "dp_sgd(1.0, 1.0)", "BatchNorm mixes the examples.*ModuleValidator.fix"),
        ("resnet20", "central_dp(1, 1)", "also sends bn1.running_mean.*ModuleValidator.fix"),
        ("resnet20", "local_dp(1, 1, 1, 0.1)", "also sends bn1.running_mean.*ModuleValidator.fix"),
        ("tests.simulator.defences.test_federated:recurrent", "dp_sgd(1.0, 1.0)", "LSTM"),
        ("tests.simulator.defences.test_federated:convolutional", "soteria(0.1)", "with a weight of its own does"),
    ],
)
def test_a_model_that_a_defence_does_not_suit_is_refused_before_a_round(model: str, defence: str, said: str) -> None:
    scenario = dataclasses.replace(BASE, model=model, defence=defence)
    grid, private = federation(scenario)
    with pytest.raises(FedtapError, match=said):
        play(scenario, grid, private)


class Last(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


def recurrent(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LSTM(math.prod(shape), classes), Last())


def convolutional(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(shape[0], classes, shape[1:]), nn.Flatten())


def fixed(shape: tuple[int, int, int], classes: int) -> nn.Module:
    from opacus.validators import ModuleValidator

    return ModuleValidator.fix(build("resnet20", shape, classes, seed=0))


def test_opacus_fixer_makes_a_model_that_dp_sgd_takes() -> None:
    scenario = dataclasses.replace(
        BASE, model="tests.simulator.defences.test_federated:fixed", defence="dp_sgd(1.0, 0.0)", batch=2, local_steps=2
    )
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    assert set(heard.leaks) == set(private.names())
    for leak in heard.leaks.values():
        length = sum(float(tensor.square().sum()) for tensor in leak.observed.values()) ** 0.5
        assert 0 < length <= 2 * 1.001 * scenario.learning_rate
