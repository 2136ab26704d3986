"""What a defence costs a client: a ratio to none, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtap.clients.cost import exchange, overhead, times_as_long
from fedtap.simulator.federation.private_data import private_data
from tests.support.scenes import Scene


def measured(defence: str, **knobs: object) -> float | None:
    part = Scene(model="mlp", defence=defence, victims=1, clients=2, **knobs)  # type: ignore[arg-type]
    return overhead(part, private_data(part, Path("data"), 2))


@pytest.mark.parametrize("defence", ["none", "central_dp(1.0, 0.1)"])
def test_what_costs_a_client_nothing_has_no_ratio(defence: str) -> None:
    assert measured(defence) is None


def test_the_ratio_is_that_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def work(takes: float) -> None:
        clock[0] += takes

    monkeypatch.setattr("fedtap.clients.cost.time.process_time", lambda: clock[0])
    assert times_as_long(lambda: work(0.5), lambda: work(0.125)) == pytest.approx(4)
    assert times_as_long(lambda: work(1e-3), lambda: work(4e-3)) == pytest.approx(0.25)


def test_measuring_draws_nothing_and_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    assert measured("precode(8)", batch=2, local_steps=2)
    assert torch.equal(before, torch.get_rng_state())


def test_an_exchange_is_an_honest_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local steps, each on its own images, and one defended update."""
    seen: list[int] = []
    monkeypatch.setattr("fedtap.clients.cost.sgd", lambda net, images, labels, *how: seen.extend(how[:2]))
    monkeypatch.setattr(
        "fedtap.clients.cost.defended", lambda defence, before, after, rate, draw: seen.append(0) or after
    )
    exchange("mlp", "clip(1.0)", (3, 8, 8), 4, torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.long), steps=3)()
    assert seen == [3, 2, 0]
