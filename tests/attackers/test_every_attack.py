"""What holds for every attack on every kind of leak: the registry finds the attacks, support/leak_kinds has leaks.

A new attack is covered by its file alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from functools import cache

import pytest
import torch

from fedtap.attackers import parse
from fedtap.simulator.attack import Attack
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import KINDS, Leak
from tests.attackers.test_attacks import CANDIDATES, EVERY, quick, ready
from tests.support.leak_kinds import MAKERS, Maker, OtherLeak, example

CASES = [(name, kind.kind) for name in EVERY for kind in CANDIDATES[name].leaks]
"""Each attack on each kind of leak that it says it is on."""


@cache
def maker_for(name: str, kind: str) -> Maker | None:
    """Of the first example of this kind that the attack accepts; None where it accepts none."""
    assert kind in MAKERS, f"tests/support/leak_kinds.py has no example of the {kind} leak"
    for maker in MAKERS[kind]:
        with contextlib.suppress(FedtapError):
            quick(name).accepts(example(maker, 0).leak)
            return maker
    return None


def leak_for(name: str, kind: str, seed: int = 0) -> Leak:
    if (maker := maker_for(name, kind)) is None:
        others = [other for attack, other in CASES if attack == name and other != kind and maker_for(name, other)]
        assert others, f"tests/support/leak_kinds.py has no leak that {name} accepts"
        pytest.skip(f"{name} accepts a {others[0]} here, and no {kind}")  # a wrapper says what some attacks accept
    return example(maker, seed).leak


def test_there_is_an_example_of_every_kind() -> None:
    assert {kind for kind, leak in KINDS.items() if leak.__module__.startswith("fedtap.")} == MAKERS.keys()


@pytest.mark.parametrize("name", EVERY)
def test_an_attack_is_a_frozen_value_that_cites_its_paper(name: str) -> None:
    attack = quick(name)
    assert attack == quick(name)
    assert type(attack).__module__.rpartition(".")[2] == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.surprise = 1  # type: ignore[attr-defined]
    said = sys.modules[type(attack).__module__].__doc__ or ""
    assert re.search(r"https://\S+", said) or re.search("(wrapper|baseline) without a paper", said)
    assert said.splitlines()[0].endswith(".")
    assert type(attack).__doc__


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_attack_repeats_itself_to_the_bit_and_leaves_the_leak_as_it_was(name: str, kind: str) -> None:
    leak = leak_for(name, kind)
    groups = (leak.observed, leak.weights or {}, leak.buffers)
    before = [{key: tensor.clone() for key, tensor in group.items()} for group in groups]
    one, two = (ready(quick(name), leak, anew=anew)(leak, seed=3) for anew in (False, True))
    assert one.tensors().keys() == two.tensors().keys() >= {"objective", *one.shapes(leak)}
    for field, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[field]), field
        assert len(tensor) == len(leak), field
    assert one.objective.isfinite().all()
    for group, kept in zip(groups, before, strict=True):
        assert all(torch.equal(tensor, kept[key]) for key, tensor in group.items())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_attack_refuses_another_kind_of_leak_and_nan(name: str, kind: str) -> None:
    leak = leak_for(name, kind)
    attack: Attack = ready(quick(name), leak)
    with pytest.raises(FedtapError, match="works on a"):
        attack(OtherLeak(**{field.name: getattr(leak, field.name) for field in dataclasses.fields(leak)}))
    key = next(iter(leak.observed))
    broken = leak.observed[key].clone()
    broken[1, 0] = torch.nan
    with pytest.raises(FedtapError, match="NaN"):
        attack(dataclasses.replace(leak, observed={**leak.observed, key: broken}))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_another_victims_leak_teaches_nothing(name: str, kind: str) -> None:
    other = leak_for(name, kind, seed=7)
    found = ready(quick(name), other)(other)
    maker = maker_for(name, kind)
    assert maker
    here = example(maker, 0)
    assert here.error(found) > 0.9 * here.blind


@pytest.mark.parametrize("maker", [maker for makers in MAKERS.values() for maker in makers])
def test_what_comes_back_is_seen(maker: Maker) -> None:
    """Without this the test above would pass by a measure that sees nothing."""
    here = example(maker, 0)
    if here.solved_by:
        (attack,) = parse(here.solved_by)
        assert here.error(ready(attack, here.leak)(here.leak)) < 0.3 * here.blind
    else:
        assert any(example(other, 0).solved_by for other in MAKERS[here.leak.kind])
