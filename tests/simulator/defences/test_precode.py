"""PRECODE."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from fedtap.attackers.gradients.exact_git import ExactGIT
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.layers import inserted, training_loss
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.rounds import auxiliary, play
from fedtap.simulator.leaks import load, stack
from fedtap.simulator.models.registry import build
from tests.simulator.test_federation import BASE, federation
from tests.support.defences import batch_of


def test_precode_is_a_bottleneck_from_which_clients_draw() -> None:
    net, plain = build("lenet+precode(6)", (3, 16, 16), 10, seed=1), build("lenet", (3, 16, 16), 10, seed=1)
    assert torch.equal(net.fc[1].weight, plain.fc.weight)  # type: ignore[index,union-attr,arg-type]
    (bottleneck,), (images, labels) = inserted(net), batch_of(1, 4)
    assert torch.equal(net(images[0]), net(images[0])), "others than clients take its mean"
    held: list[Tensor] = []
    bottleneck.encoder.register_forward_hook(lambda layer, fed, out: held.append(out))
    loss = training_loss(net, images[0], labels[0])
    mean, spread = held[0][:, :6], F.softplus(held[0][:, 6:] - 5)
    apart = kl_divergence(Normal(mean, spread), Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(loss, F.cross_entropy(net(images[0]), labels[0]) + 1e-3 * apart)
    found = gradients(net, images, labels)
    net.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name][0], parameter.grad, rtol=1e-3, atol=1e-6)
    bottleneck.draws = True
    again = torch.stack([net(images[0]) for _ in range(50)])
    assert (again.std(0) > 0).all()
    drawn_twice = gradients(net, images.repeat(2, 1, 1, 1, 1), labels.repeat(2, 1))
    assert not torch.isclose(drawn_twice["fc.1.weight"][0], drawn_twice["fc.1.weight"][1]).all()


@pytest.mark.parametrize("defence", ["precode(8)", "precode(8)+dp_sgd(1.0, 0.0)", "precode(8)+soteria(0.5)+clip(1.0)"])
def test_an_attacker_is_told_of_the_bottleneck_and_not_of_the_draw(defence: str, tmp_path: Path) -> None:
    scenario = dataclasses.replace(BASE, defence=defence)
    grid, private = federation(scenario)
    heard = play(scenario, grid, private)
    leak = stack([heard.leaks[name] for name in private.names()])
    assert leak.protocol.model == "lenet+precode(8)"
    images, labels = (torch.stack(side) for side in zip(*(private(*name) for name in private.names()), strict=True))
    (pairs,) = auxiliary(grid, scenario, private, heard, images, labels)
    assert "fc.0.encoder.weight" in pairs.leak.observed
    leak.save(tmp_path / "leak.safetensors")
    again = load(tmp_path / "leak.safetensors", build)
    assert IDLG(steps=2)(again).images.isfinite().all()
    with pytest.raises(FedtapError, match="where undoing it would begin"):
        ExactGIT().accepts(again)
    if defence == "precode(8)":
        mean = build("lenet+precode(8)", (3, 16, 16), len(private.dataset.classes), seed=scenario.weights_seed)
        guessed = gradients(mean, images, labels)["fc.1.weight"]
        assert not torch.isclose(leak.observed["fc.1.weight"], guessed, rtol=1e-3, atol=1e-5).all()
        torch.testing.assert_close(leak.observed["fc.1.weight"], guessed, rtol=0.5, atol=0.05)
