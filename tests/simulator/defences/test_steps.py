"""Defences of a local step: a stack of clients' steps, and what Soteria and DP-SGD do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.defence import StepDefence
from fedtap.simulator.defences.dp_sgd import DPSGD
from fedtap.simulator.defences.soteria import Soteria
from fedtap.simulator.models.registry import build
from tests.support.defences import batch_of, drawn, flat


@pytest.mark.parametrize(
    ("model", "step"),
    [
        *((model, DPSGD(0.7, 0.0)) for model in ("mlp", "lenet", "convnet", "vit")),
        *((model, Soteria(0.3)) for model in ("mlp", "lenet")),
    ],
)
def test_steps_in_a_stack_are_those_of_a_client(model: str, step: StepDefence) -> None:
    """For DP-SGD, Opacus is the oracle: it knows no stacks."""
    net, (images, labels) = build(model, (3, 16, 16), 10, seed=1), batch_of(3, 2)
    found = step.stacked(net, images, labels, [drawn()] * 3)
    for which in range(3):
        net.zero_grad()
        loss = step.backward(net, images[which], labels[which], drawn())
        assert loss.item() == pytest.approx(F.cross_entropy(net(images[which]), labels[which]).item(), rel=1e-5)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name][which], parameter.grad, rtol=1e-3, atol=1e-6)
            assert not {"grad_sample", "summed_grad"} & vars(parameter).keys(), "Opacus has left something behind"


def test_dp_sgd_clips_each_example_and_adds_the_noise_it_says() -> None:
    net, (images, labels) = build("lenet", (3, 16, 16), 10, seed=1), batch_of(2, 4)
    plain, loud = DPSGD(0.1, 0.0), DPSGD(0.1, 6.0)
    found = plain.stacked(net, images, labels, [drawn()] * 2)
    alone = gradients(net, images[0][:, None], labels[0][:, None])
    clipped = [flat(Clip(0.1)({name: tensor[one] for name, tensor in alone.items()}, drawn())) for one in range(4)]
    torch.testing.assert_close(flat({name: tensor[0] for name, tensor in found.items()}), sum(clipped) / 4)
    noisy = loud.stacked(net, images, labels, [drawn(1), drawn(2)])
    net.zero_grad()
    loud.backward(net, images[0], labels[0], drawn(4))
    opacus = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    for sent in (opacus, *({name: tensor[which] for name, tensor in noisy.items()} for which in range(2))):
        noise = flat(sent) - sum(clipped) / 4
        assert float(noise.std()) == pytest.approx(6.0 * 0.1 / 4, rel=0.1)
    assert not torch.isclose(noisy["fc.weight"][0], noisy["fc.weight"][1]).all()
