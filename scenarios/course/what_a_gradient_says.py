"""Unit 1: a gradient is not anonymous.

A linear layer's gradients of weight and bias give its input by a division (Phong et al. 2018,
https://eprint.iacr.org/2017/715); those of a network give its picture by matching (Zhu, Liu and Han 2019,
https://arxiv.org/abs/1906.08935) and its label by a sign (Zhao, Mopuri and Bilen 2020,
https://arxiv.org/abs/2001.02610).
"""

from __future__ import annotations

import math
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
    flat_decibels,
    graded_with,
    number_or_nan,
    numbers_in,
    share_near,
    student_draw,
)
from fedtap.scenarios.course.pictures import PICTURE, client_gradient, course_model, private_leak, private_picture

_PIXELS, _CLIENTS, _LABELS = 6, 4, 10
_RATE = 0.1
"""Learning rate of the client that sends weights."""
_ENOUGH, _ABOVE_FLAT = 25.0, 3.0
"""Decibels for the whole score; and above the best picture of one colour, for half of it."""


def _layer(student: str) -> tuple[Tensor, dict[str, Any]]:
    """Pixels, and the gradients of a linear layer that saw them; one unit is dead."""
    draw = student_draw(student, 1, "pixels")
    pixels = torch.randint(1, 11, (_PIXELS,), generator=draw) / 10
    steps = torch.tensor([-2.0, 0.5, 0.25, 0.0])[torch.randperm(4, generator=draw)]
    return pixels, {"weight_gradient": torch.outer(steps, pixels), "bias_gradient": steps}


def _pixels(answer: Any, student: str) -> Graded:
    share = share_near(numbers_in(answer, _PIXELS), _layer(student)[0], 1e-3)
    return graded_with(
        share,
        "All pixels are right: the gradient held them.",
        f"{share:.0%} of the pixels are right: write down ∂L/∂W and ∂L/∂b of z = W x + b for one unit by the chain "
        "rule, compare the two, and beware of a unit that learned nothing.",
    )


@lru_cache(maxsize=4)
def _matched(student: str) -> tuple[Tensor, dict[str, Any]]:
    images, labels = private_picture(student, 1)
    model = course_model("lenet(width=8)", student, 1)
    return images[0], {"model": model, "leak": private_leak(model, images, labels)}


def _dlg(answer: Any, student: str) -> Graded:
    truth, _ = _matched(student)
    found = decibels(numbers_in(answer, *truth.shape), truth)
    if found > _ENOUGH:
        return Graded(1.0, f"{found:.1f} dB: the photograph came back.")
    if found > flat_decibels(truth) + _ABOVE_FLAT:
        return Graded(
            0.5, f"{found:.1f} dB: the picture begins to show; let the matching run longer, and look at its loss."
        )
    return Graded(
        0.0,
        f"{found:.1f} dB is hardly more than one colour: does the matching loss fall, are the gradients in the same "
        "order, and are pixels in [0, 1]?",
    )


def _answers_of_clients(student: str) -> tuple[list[int], dict[str, Any]]:
    """Labels; and what four clients sent of the last layer's bias, of which the last one sends weights."""
    draw = student_draw(student, 1, "labels")
    labels = torch.randint(_LABELS, (_CLIENTS,), generator=draw)
    softmax = torch.randn(_CLIENTS, _LABELS, generator=draw).softmax(1)
    gradients = softmax - torch.nn.functional.one_hot(labels, _LABELS)  # ∂L/∂b = softmax(z) - y
    before = torch.randn(_LABELS, generator=draw)
    sent = {"bias_gradients": gradients[:-1], "before": before, "after": before - _RATE * gradients[-1]}
    return labels.tolist(), sent


def _labels(answer: Any, student: str) -> Graded:
    truth, _ = _answers_of_clients(student)
    if not isinstance(answer, list) or len(answer) != _CLIENTS:
        raise WrongFormError(f"A list of {_CLIENTS} labels is asked for")
    share = sum(type(one) in (int, float) and one == true for one, true in zip(answer, truth, strict=True)) / _CLIENTS
    return graded_with(
        share,
        "All labels are right.",
        f"{share:.0%} of the labels are right: which sign has softmax(z) - y at the class that is there, which at the "
        "others, and does every client send a gradient? Classes count from 0.",
    )


@lru_cache(maxsize=4)
def _rounded(student: str) -> tuple[float, dict[str, Any]]:
    """PSNR of `linear` on gradients in bfloat16, and the picture and the model, which are the student's own."""
    images, labels = private_picture(student, 1, "own")
    model = course_model("mlp(width=64)", student, 1, "own")
    sent = {name: part.bfloat16().float() for name, part in client_gradient(model, images, labels).items()}
    found = fedtap.attack(fedtap.leak(model, sent, shape=tuple(images.shape[1:])), "linear")
    return decibels(found.images[0, 0], images[0]), {"model": model, "images": images, "labels": labels}


def _predict(answer: Any, student: str) -> Graded:
    said = fields_in(answer, "predicted", "measured")
    score, hints = 0.0, []
    if math.isnan(number_or_nan(said["predicted"])):
        hints.append("Write down what you expect before you run: a prediction is never marked wrong.")
    else:
        score += 0.25
    if said["measured"] is None:
        hints.append("Then run it, and write down the PSNR.")
    elif abs(number_or_nan(said["measured"]) - _rounded(student)[0]) <= 1:
        score += 0.75
    else:
        hints.append("The PSNR is another one: round every gradient to bfloat16, leave the picture as it is.")
    return Graded(score, " ".join(hints) or "Compare the two: what does rounding hide?")


UNIT = Unit(
    1,
    "What a gradient says",
    "A gradient is not anonymous: it holds the picture and the label that it was computed from.",
    (
        Exercise(
            "pixels", 15, f"a list of {_PIXELS} numbers, the layer's input", lambda student: _layer(student)[1], _pixels
        ),
        Exercise(
            "dlg",
            35,
            f"the picture as nested lists, 3 × {PICTURE} × {PICTURE} (images[0].tolist()), with pixels in [0, 1]",
            lambda student: _matched(student)[1],
            _dlg,
        ),
        Exercise(
            "labels",
            10,
            f"a list of {_CLIENTS} whole numbers: the labels of the three clients that send gradients, then that of "
            "the one that sends weights",
            lambda student: _answers_of_clients(student)[1],
            _labels,
        ),
        Exercise(
            "predict",
            20,
            'an object {"predicted": dB, "measured": dB}, PSNR of the attack linear on the gradient in bfloat16',
            lambda student: _rounded(student)[1],
            _predict,
        ),
    ),
)
