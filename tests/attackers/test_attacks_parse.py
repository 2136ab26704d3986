"""What `--attack` may say, and the sentence for what it may not."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtap.attackers import ATTACKS, parse
from fedtap.attackers.gradients.dlg import DLG
from fedtap.attackers.gradients.idlg import IDLG
from fedtap.attackers.gradients.inverting_gradients import InvertingGradients
from fedtap.attackers.gradients.linear import Linear
from fedtap.attackers.wrappers.refine import Refine
from fedtap.attackers.wrappers.restarts import Restarts
from fedtap.simulator.errors import FedtapError


def test_names_calls_and_wrappers() -> None:
    assert parse("idlg") == (IDLG(),)
    assert parse("idlg,idlg(steps=3),restarts(idlg,2)") == (IDLG(), IDLG(steps=3), Restarts(IDLG(), 2))
    assert parse("idlg,dlg(steps=300), restarts(dlg,8),refine(linear,idlg)") == (
        IDLG(),
        DLG(steps=300),
        Restarts(DLG(), 8),
        Refine(Linear(), IDLG()),
    )
    assert parse("restarts(dlg(20), times=2, enough=1e-3)") == (Restarts(DLG(20), 2, 1e-3),)
    assert parse("inverting_gradients(100, smoothness=0.1, compiled=True)") == (
        InvertingGradients(100, smoothness=0.1, compiled=True),
    )


@given(steps=st.integers(1, 10**6), history=st.integers(1, 10**4))
def test_a_call_says_what_its_repr_says(steps: int, history: int) -> None:
    assert parse(f"idlg(steps={steps},history={history})") == (IDLG(steps=steps, history=history),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("idgl", "did you mean idlg"),
        ("", "names no attack|cannot be read"),
        (",", "cannot be read"),
        ("idlg(", "cannot be read"),
        ("idlg(step=3)", "did you mean steps"),
        ("idlg(steps=0)", "steps of IDLG is 0"),
        ("idlg(steps=1.5)", "whole number"),
        ("idlg(steps=True)", "whole number"),
        ("idlg(steps='many')", "whole number"),
        ("inverting_gradients(smoothness=-1)", "number from 0"),
        ("inverting_gradients(smoothness=1e999)", "number from 0"),
        ("idlg(compiled=1)", "True or False"),
        ("idlg(1,2,True,False,5)", "5 values for 4 fields"),
        ("idlg(5, steps=6)", "given twice"),
        ("restarts", "needs its field attack"),
        ("restarts(8)", "is not an attack"),
        ("restarts(dlg, times=0)", "times of Restarts is 0"),
        ("idlg(steps=len)", "not a constant"),
        ("__import__('os').system('true')", "is not an attack"),
        ("idlg(steps=__import__('os').getpid())", "not a constant"),
        ("idlg(*[1])", "not a constant"),
        ("linear,linear", "linear twice"),
        ("idlg,dlg,idlg(steps=2400)", r"idlg\(steps=2400\) twice"),
        ("restarts(dlg,2),idlg,restarts(dlg(),times=2)", "twice"),
        ("idlg(**{'steps': 1})", "field of idlg"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        parse(text)


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(FedtapError):
        assert all(type(attack) in ATTACKS.values() for attack in parse(text))


def test_types_are_checked_without_postponed_annotations() -> None:
    """Annotations are then types and not strings: a file of a user's own may lack the __future__ import."""
    source = """
from dataclasses import dataclass
from typing import Any
from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import Attack

@dataclass(frozen=True)
class Eager(Attack):
    attack: Attack[Any]
    steps: int = 1
    rate: float = 0.5
    fast: bool = False
    text: str = ""

    def __post_init__(self) -> None:
        check_fields(self, steps=1)

    def reconstruct(self, leak, start):
        raise NotImplementedError
"""
    space: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, "eager.py", "exec", dont_inherit=True), space)
    eager = space["Eager"]
    assert eager(IDLG(), steps=2).steps == 2
    wrong: tuple[dict[str, Any], ...] = (
        {"attack": 3},
        {"steps": 0},
        {"steps": 1.5},
        {"steps": True},
        {"rate": -1.0},
        {"rate": float("nan")},
        {"fast": 1},
        {"text": 3},
    )
    for values in wrong:
        with pytest.raises(FedtapError, match=f"{next(iter(values))} of Eager"):
            eager(**{"attack": IDLG()} | values)
