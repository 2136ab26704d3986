"""Unit 4: a defence is judged by the attack that is built against it.

Signs in the place of a gradient: Bernstein et al. 2018, https://arxiv.org/abs/1802.04434. The defence that students
add is sparse ternary compression: Sattler et al. 2019, https://arxiv.org/abs/1903.02891.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import fedtap
from fedtap.scenarios.course.exercise import (
    Exercise,
    Graded,
    Unit,
    WrongFormError,
    decibels,
    fields_in,
    number_or_nan,
    numbers_in,
    one_of,
    same_word,
    student_draw,
)
from fedtap.scenarios.course.pictures import PICTURE, course_model, private_leak, private_picture
from fedtap.simulator.leaks import GradientLeak

_PLAIN = "idlg(steps=40)"
"""The attack that does not know of the defence; it gets no better with more steps."""
_BETTER = 0.1
"""Decibels over the plain attack that are no matter of rounding."""
_LIKENESS = 0.5
"""Correlation with the truth from which a picture shows what is on it, and is no constant colour."""
_SHAPES = {"weight": (4, 6), "bias": (6,)}


@lru_cache(maxsize=4)
def _signed(student: str) -> tuple[Tensor, GradientLeak]:
    images, labels = private_picture(student, 4)
    model = course_model("lenet(width=16)", student, 4)
    return images[0], private_leak(model, images, labels, "sign()")


@lru_cache(maxsize=4)
def _plain_decibels(student: str) -> float:
    truth, leak = _signed(student)
    return decibels(fedtap.attack(leak, _PLAIN).images[0, 0], truth)


def _correlation(answer: Tensor, truth: Tensor) -> float:
    """Of the pixels' distances from their channel's mean; 0 for one colour."""
    one, other = (part.double() - part.double().mean((1, 2), keepdim=True) for part in (answer, truth))
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-9))


def _break_sign(answer: Any, student: str) -> Graded:
    truth, _ = _signed(student)
    found = numbers_in(answer, *truth.shape)
    seen, plain, alike = decibels(found, truth), _plain_decibels(student), _correlation(found.clamp(0, 1), truth)
    said = f"{seen:.1f} dB and a correlation of {alike:.2f}, where the plain attack has {plain:.1f} dB"
    if seen <= plain + _BETTER:
        return Graded(0.0, f"{said}: let your picture's own gradient go through the defence before you compare.")
    if alike < _LIKENESS:
        return Graded(0.25, f"{said}: that is better, but shows too little of the picture; sign() has no slope.")
    return Graded(1.0, f"{said}: the defence is broken by whoever knows it.")


def _stack(student: str) -> Mapping[str, Any]:
    """A gradient of two tensors, and how many entries of each are kept."""
    draw = student_draw(student, 4, "defence")
    gradient = {name: torch.randn(*sides, generator=draw).mul(100).round() / 100 for name, sides in _SHAPES.items()}
    return {"gradient": gradient, "k": one_of(draw, (2, 3, 4)), "norm": float(one_of(draw, (0.5, 2.0, 3.0)))}


def _ternary(tensor: Tensor, k: int) -> Tensor:
    """sign · mean size of the k largest entries, 0 elsewhere."""
    rows = tensor.flatten()
    kept = rows.abs().topk(k).indices
    sent = torch.zeros_like(rows)
    sent[kept] = rows[kept].sign() * rows[kept].abs().mean()
    return sent.view_as(tensor)


def _defence(answer: Any, student: str) -> Graded:
    said, told = fields_in(answer, "sent", "bound", "epsilon"), _stack(student)
    sent = fields_in(said["sent"] if isinstance(said["sent"], dict) else {}, *_SHAPES)
    score, hints = 0.0, []
    for name, sides in _SHAPES.items():
        wanted = _ternary(told["gradient"][name].double(), told["k"])
        try:
            found = numbers_in(sent[name], *sides)
        except WrongFormError as error:
            hints.append(f"{error} for {name}.")
            continue
        if bool(((found - wanted).abs() <= 1e-3).all()):
            score += 0.3
        else:
            right = bool(((found != 0) == (wanted != 0)).all())
            hints.append(f"What is sent of {name} keeps {'the right' if right else 'other'} entries, at other values.")
    if abs(number_or_nan(said["bound"]) - told["norm"]) <= 1e-6:
        score += 0.2
    else:
        hints.append("How long can what is sent be, if the gradient has that norm? Compare the norm before and after.")
    if same_word(said["epsilon"], "inf", "infinite", "infinity", "∞") or said["epsilon"] == math.inf:
        score += 0.2
    else:
        hints.append("Which ε does a mechanism have that draws nothing at random?")
    return Graded(score, " ".join(hints) or "All that the contract asks is answered.")


UNIT = Unit(
    4,
    "Defences and adaptive attackers",
    "A defence is judged by the attack that is built against it, and not by one that does not know it.",
    (
        Exercise(
            "break_sign",
            40,
            f"the picture as nested lists, 3 × {PICTURE} × {PICTURE}, with pixels in [0, 1]",
            lambda student: {"leak": _signed(student)[1], "plain": _PLAIN},
            _break_sign,
        ),
        Exercise(
            "defence",
            40,
            'an object {"sent": {"weight": 4 × 6 numbers, "bias": 6 numbers}, "bound": largest norm of what is sent '
            'of a gradient that has the given norm, "epsilon": a number or "infinite"}',
            _stack,
            _defence,
        ),
    ),
)
