"""Soteria."""

from __future__ import annotations

import torch

from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.soteria import Soteria, effects
from fedtap.simulator.models.registry import build
from tests.support.defences import batch_of, drawn


def test_soteria_leaves_out_what_tells_most() -> None:
    net, (images, labels) = build("lenet", (3, 8, 8), 10, seed=1), batch_of(2, 3, size=8)
    found = effects(net, images)
    for which in range(2):  # one feature and one image after the other
        wanted = torch.zeros(found.shape[1])
        for image in images[which]:
            x = image[None].clone().requires_grad_()
            hidden = x
            for conv in (net.conv1, net.conv2, net.conv3):
                hidden = torch.sigmoid(conv(hidden))  # type: ignore[operator]
            r = hidden.flatten()
            for feature in range(len(r)):
                (slope,) = torch.autograd.grad(r[feature], x, retain_graph=True)
                wanted[feature] += r[feature].detach().abs() / slope.norm()
        torch.testing.assert_close(found[which], wanted, rtol=1e-3, atol=1e-3)
    sent, plain = Soteria(0.25).stacked(net, images, labels, [drawn()] * 2), gradients(net, images, labels)
    silent = (sent["fc.weight"] == 0).all(1)
    assert (silent.sum(1) == found.shape[1] // 4).all()
    for which in range(2):
        assert found[which][silent[which]].min() >= found[which][~silent[which]].max()
        kept = ~silent[which]
        assert torch.equal(sent["fc.weight"][which][:, kept], plain["fc.weight"][which][:, kept])
    assert torch.equal(sent["conv1.weight"], plain["conv1.weight"])


def test_a_feature_that_is_off_has_no_effect() -> None:
    found = effects(build("convnet", (3, 8, 8), 10, seed=1), batch_of(1, 1, size=8)[0])
    assert found.isfinite().all()
    assert (found == 0).any()
