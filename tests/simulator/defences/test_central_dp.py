"""Flower's strategy wrapper as a defence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedtap.simulator.federation.rounds import play
from fedtap.simulator.wire.records import tensors_of
from tests.simulator.test_federation import BASE, federation
from tests.support.defences import flat


def test_central_dp_is_flowers_wrapper_and_the_server_hears_what_it_hides() -> None:
    heard = {}
    for defence in ("none", "central_dp(0.5, 0.0)", "central_dp(0.5, 8.0)"):
        scenario = dataclasses.replace(BASE, defence=defence, rounds=1)
        grid, private = federation(scenario)
        heard[defence] = play(scenario, grid, private)
        again = play(scenario, federation(scenario)[0], private)
        for name in ("fc.weight", "conv1.bias"):
            assert np.array_equal(again.arrays[name].numpy(), heard[defence].arrays[name].numpy())
    plain, clipped, noisy = ({n: t.double() for n, t in tensors_of(one.arrays).items()} for one in heard.values())
    start = {name: tensor.double() for name, tensor in tensors_of(heard["none"].start).items()}
    drift_norm = flat({name: clipped[name] - start[name] for name in start})
    further = flat({name: plain[name] - start[name] for name in start})
    rate = BASE.learning_rate
    assert 0.4 * 0.5 * rate < float(drift_norm.norm()) <= 0.5 * rate * 1.001 < float(further.norm())
    noise = flat({name: noisy[name] - clipped[name] for name in start})
    assert float(noise.std()) == pytest.approx(8.0 * 0.5 * rate / 4, rel=0.05)
    (victim, *_), (defended, *_) = (list(heard[which].leaks.values()) for which in ("none", "central_dp(0.5, 8.0)"))
    assert float(defended.observed["fc.weight"].norm()) > 0.2 * float(victim.observed["fc.weight"].norm())
