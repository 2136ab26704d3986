"""Defences one after the other: stacks, and the noise that is announced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtap.simulator.defences.chained import Chain, parse, sigma
from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.defence import Update
from fedtap.simulator.defences.laplace import Laplace
from fedtap.simulator.defences.local_dp import LocalDP
from fedtap.simulator.defences.noise import Noise
from fedtap.simulator.defences.prune import Prune
from fedtap.simulator.defences.quantise import Quantise
from fedtap.simulator.defences.sign import Sign
from fedtap.simulator.leaks import Protocol
from tests.support.defences import drawn, update

UPDATES: tuple[Update, ...] = (
    Clip(1.5),
    Noise(0.3),
    Laplace(0.2),
    Prune(0.4),
    Sign(),
    Quantise(3),
    LocalDP(1.0, 2.0, 8.0, 1e-5),
    Chain((Clip(1.0), Noise(0.1), Quantise(2), Laplace(0.1), Prune(0.5))),
)


@pytest.mark.parametrize("defence", UPDATES, ids=repr)
@settings(deadline=None, max_examples=10)
@given(exchanges=st.integers(1, 5), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-6, 0.1, 10.0]))
def test_a_stack_is_defended_as_each_alone(defence: Update, exchanges: int, seed: int, scale: float) -> None:
    gradients = {name: scale * tensor for name, tensor in update(exchanges, seed=seed).items()}
    before = {name: tensor.clone() for name, tensor in gradients.items()}
    found = defence.stacked(gradients, [drawn(seed, which) for which in range(exchanges)])
    for which in range(exchanges):
        alone = defence({name: tensor[which] for name, tensor in gradients.items()}, drawn(seed, which))
        assert alone.keys() == found.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name][which], tensor)
            assert tensor.dtype == gradients[name].dtype
    assert all(torch.equal(before[name], gradients[name]) for name in before), "it was changed in place"


def announcing(defence: str, batch: int = 1) -> float:
    return sigma(Protocol("lenet", (3, 16, 16), 10, batch, defence=defence))


def test_attackers_read_the_noise_off_what_is_announced() -> None:
    assert announcing("none") == announcing("clip(1.0)") == announcing("somebody's own") == 0
    assert announcing("noise(0.25)") == announcing("clip(1.0)+noise(0.25)+quantise(4)") == 0.25
    assert announcing("noise(0.3)+noise(0.4)") == pytest.approx(0.5)
    assert announcing("dp_sgd(2.0, 0.5)+clip(3)", batch=4) == 0.25
    for text in ("laplace(0.3)", "local_dp(1000000.0, 0.3, 2.0, 0.05)"):
        (part,) = parse(text).update.parts
        noise = part({"a": torch.zeros(100000)}, drawn())["a"]
        assert announcing(text) == pytest.approx(float(noise.std()), rel=0.02)
