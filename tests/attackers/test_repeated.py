"""A captured step gives what the step gives, asks the device nothing, and is left where it cannot be captured.

On a CPU a tape of operations stands in for a CUDA graph; where there is a GPU, the graph itself is compared.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtap.attackers.gradients import gradinversion, inverting_gradients, lbfgs
from fedtap.attackers.gradients.coarse_git import CoarseGIT
from fedtap.attackers.gradients.dlg import DLG
from fedtap.attackers.gradients.gradinversion import GradInversion
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.gradients.inverting_gradients import InvertingGradients
from fedtap.attackers.gradients.lti import LTI
from fedtap.attackers.parts import gradients, teaching
from fedtap.attackers.parts.repeated import _WARM_UP, Capture, Repeated, capture_on
from fedtap.simulator.attack import Attack, Learner, _learned
from fedtap.simulator.models.registry import build
from tests.attackers.test_gradients import leak_of, pictures
from tests.support.attack_leaks import auxiliary_for
from tests.support.tape import WaitsError, tape

_CAPTURABLE = "_get_capturable_supported_devices"

ATTACKS: list[Attack[Any]] = [
    IDLG(steps=40, history=6),
    DLG(steps=40, history=6),
    InvertingGradients(steps=24),
    InvertingGradients(steps=24, adaptive=True),
    GradInversion(steps=24, seeds=2),
]


@pytest.fixture
def on_tape(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Every attack's step is captured on a tape; the list has those that were."""
    captured: list[Callable[[], None]] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        replay = tape(step)
        captured.append(replay)
        return replay

    def on_any(device: torch.device) -> Capture:
        return capture

    for module in (lbfgs, inverting_gradients, gradinversion):
        monkeypatch.setattr(module, "capture_on", on_any)
    monkeypatch.setattr(gradients, "CALLS_BEFORE_TRACING", 1)
    monkeypatch.setattr(gradients, "_in_a_row", lambda elements: elements)  # as on a GPU
    # torch's capturable Adam asks for a GPU, and computes the same elsewhere
    monkeypatch.setattr(sys.modules[torch.optim.Adam.__module__], _CAPTURABLE, lambda *_, **__: ["cpu"])
    return captured


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.written())
def test_a_captured_attack_gives_what_the_attack_gives(attack: Attack[Any], on_tape: list[Any]) -> None:
    images, labels = pictures(3, 1)
    leak = leak_of(images.double(), labels, build("lenet", (3, 16, 16), 10, seed=5).double(), "lenet")
    start = images.flip(0).repeat_interleave(attack.starts, dim=0).double()
    with pytest.MonkeyPatch.context() as patch:
        for module in (lbfgs, inverting_gradients, gradinversion):
            patch.setattr(module, "capture_on", capture_on)
        plain = attack(leak, start=start)
    assert not on_tape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = attack(leak, start=start)
    assert on_tape
    # capturable Adam counts its steps in float32, by which 1 - 0.999^t is off by 1e-5
    torch.testing.assert_close(captured.images, plain.images, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(captured.objective, plain.objective, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.written())
def test_a_graph_gives_what_its_kernels_give(attack: Attack[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(3, 1)
    leak = leak_of(images.double(), labels, build("lenet", (3, 16, 16), 10, seed=5).double(), "lenet").to("cuda")
    start = images.flip(0).repeat_interleave(attack.starts, dim=0).double().cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = attack(leak, start=start)
    for module in (lbfgs, inverting_gradients, gradinversion):
        monkeypatch.setattr(module, "capture_on", lambda device: None)
    launched = attack(leak, start=start)
    torch.testing.assert_close(captured.images, launched.images, rtol=1e-3, atol=1e-4)


def test_a_step_that_asks_is_called_each_time_and_that_is_said_once() -> None:
    count, total = torch.zeros(()), []

    def asks() -> None:
        count.add_(1)
        total.append(float(count))

    step = Repeated(asks, tape)
    for _ in range(_WARM_UP):
        step()
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph .*waits for the device"):
        step()
    step()
    assert total[-1] == float(count)


def test_a_tape_replays_on_the_same_tensors() -> None:
    x, calls = torch.ones(3), []

    def step() -> None:
        calls.append(None)
        x.copy_(torch.where(x > 4, x, 2 * x)[:, None].expand(3, 2).sum(1) / 2)

    repeated = Repeated(step, tape)
    for _ in range(_WARM_UP + 4):
        repeated()
    assert len(calls) == _WARM_UP + 1
    assert torch.equal(x, torch.full((3,), 8.0))


@pytest.mark.parametrize("waits", [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.sum().item()])
def test_the_tape_refuses_what_a_graph_cannot_hold(waits: Callable[[Tensor], object]) -> None:
    with pytest.raises(WaitsError):
        tape(lambda: print(waits(torch.ones(2))))


SMALL, PUBLISHED = (
    CoarseGIT(width=4, hidden=4, hints=4, epochs=3, batch=16),
    CoarseGIT(published=True, units=64, epochs=2, batch=16),
)


@pytest.mark.parametrize(
    ("attack", "model"),
    [(SMALL, "lenet"), (PUBLISHED, "lenet"), (PUBLISHED, "resnet20"), (LTI(width=64, epochs=6), "lenet")],
    ids=lambda given: given if isinstance(given, str) else given.written(),
)
def test_a_captured_learner_learns_what_the_learner_learns(
    attack: Learner, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = pictures(3, 1)
    leak = leak_of(images, labels, build(model, (3, 16, 16), 10, seed=5), model)
    auxiliary = auxiliary_for(leak, tmp_path, 60)
    plain = _learned.__wrapped__(attack, auxiliary, 3)
    captured: list[Callable[[], None]] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        captured.append(tape(step))
        return captured[-1]

    monkeypatch.setattr(teaching, "capture_on", lambda device: capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = _learned.__wrapped__(attack, auxiliary, 3)
    assert captured
    torch.testing.assert_close(again(leak).images, plain(leak).images, rtol=1e-3, atol=1e-4)
    moved = [
        float((one - two).abs().max())
        for one, two in zip(plain.inverter.parameters(), again.inverter.parameters(), strict=True)
    ]
    assert max(moved) < 1e-4


def test_products_are_coarse_while_an_inverter_learns_and_no_longer() -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = allowed()
    with teaching.coarse_products():
        assert allowed() == (True, True)
    assert allowed() == before


def test_each_minibatch_has_the_gradient_of_its_own_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "capture_on", lambda device: tape)
    seen = torch.randn(40, 3)
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    differentiate = teaching.Differentiated(
        [used, unused], lambda some: (seen[some] @ used).square().sum(), 8, used.device, whole=True
    )
    for some in torch.randperm(40).repeat(2)[:75].split(8):  # the last has three
        differentiate(some)
        torch.testing.assert_close(used.grad, 2 * (seen[some] @ used.detach()) @ seen[some])
        assert unused.grad is not None
        assert not unused.grad.any()
