"""Holds a student's defence against fedtap's contract, on the student's own computer."""

from __future__ import annotations

import inspect
import math

import torch

from fedtap.scenarios.course.exercise import student_draw
from fedtap.simulator.defences.defence import Exchange, UpdateDefence
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Tensors

_STACK = 3


def broken_rules(defence: UpdateDefence) -> list[str]:
    """What of the contract of a defence of updates this one breaks, a sentence each; empty where it keeps all of it.

    The project's own tests, `tests/simulator/defences`, ask more; these are the questions that a lesson has time for.
    """
    kind = type(defence)
    if not isinstance(defence, UpdateDefence):
        return [f"{kind.__name__} is no UpdateDefence, so nothing asks it to defend: subclass that."]
    said = []
    try:
        defence.arguments()
    except FedtapError as error:
        said.append(str(error))
    if not getattr(getattr(kind, "__dataclass_params__", None), "frozen", False):
        said.append("It can be changed after it was announced: write @dataclass(frozen=True, repr=False) above it.")
    if "http" not in (inspect.getdoc(kind) or ""):
        said.append("Its docstring names no source: say whose idea it is, with the paper's address.")
    gradient = _gradient()
    before = {name: tensor.clone() for name, tensor in gradient.items()}
    try:
        sent = defence.stacked(gradient, [student_draw("", "conformance", number) for number in range(_STACK)])
    except Exception as error:  # a student's code may raise anything
        return [*said, f"It fails on a stack of gradients ({type(error).__name__}: {error})."]
    if any((gradient[name] != before[name]).any() for name in before):
        said.append("It changes the gradient that it is handed: work on a copy.")
    if {name: part.shape for name, part in sent.items()} != {name: part.shape for name, part in gradient.items()}:
        return [*said, "What it sends has other names or shapes than the gradient: keep both."]
    if not all(bool(part.isfinite().all()) for part in sent.values()):
        said.append("It sends NaN or infinity.")
    again = defence.stacked(gradient, [student_draw("", "conformance", number) for number in range(_STACK)])
    if any((again[name] != sent[name]).any() for name in sent):
        said.append("With the same draws it sends something else: take all that is random from `draws`.")
    alone = defence({name: tensor[1] for name, tensor in gradient.items()}, student_draw("", "conformance", 1))
    if any(not torch.allclose(alone[name], sent[name][1], atol=1e-6) for name in sent):
        said.append("One exchange depends on its neighbours in the stack: treat each row by itself.")
    for row in range(_STACK):
        norm, after = _norm(gradient, row), _norm(sent, row)
        if not after <= defence.bound(norm) * (1 + 1e-5):
            most = f"{defence.bound(norm):.3g} at most"
            said.append(f"It says that a gradient of norm {norm:.3g} is sent with {most}, and sends {after:.3g}.")
            break
    if defence.error(1) is None and defence.release(1.0, "replace", 1, 1) is not None:
        said.append("It claims the privacy of noise, and says that it adds no error.")
    replay = defence.replay(Exchange())
    if replay is not None and replay.exact and defence.error(1) is None:
        replayed = replay.does(gradient, sent)
        if any(not torch.allclose(replayed[name], sent[name], atol=1e-5) for name in sent):
            said.append("Its replay is called exact, and gives something else than what was sent.")
    return said


def _gradient() -> dict[str, torch.Tensor]:
    draw = student_draw("", "conformance")
    return {"weight": torch.randn(_STACK, 4, 6, generator=draw), "bias": torch.randn(_STACK, 6, generator=draw)}


def _norm(tensors: Tensors, row: int) -> float:
    return math.sqrt(sum(float(part[row].square().sum()) for part in tensors.values()))
