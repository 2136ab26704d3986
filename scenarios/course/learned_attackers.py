"""Unit 5: attackers that are trained first, and threat models: who knows what.

A map from gradients to pictures is learned from pairs of the attacker's own (Wu et al. 2023,
https://arxiv.org/abs/2210.10880), by somebody who sees replies and knows no weights (https://arxiv.org/abs/2505.20026).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedtap
from fedtap.attackers.baselines.ridge import Ridge
from fedtap.scenarios.course.exercise import Exercise, Graded, Unit, WrongFormError, numbers_in, student_draw
from fedtap.scenarios.course.pictures import course_model, course_photos
from fedtap.simulator.auxiliary import Auxiliary, Pairs, Provenance, gradients
from fedtap.simulator.leaks import GradientLeak
from fedtap.simulator.wire.threat_models import eavesdropper

_PAIRS, _HELD_OUT, _SIDE = 160, 16, 8
_NOISE = 0.02
"""Standard deviation of the clients' noise, in the gradient's units."""
_CHOICES = 4

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "An eavesdropper on a client's uplink reads every reply. What does it not know under fedtap's threat model?": (
        "the architecture of the model",
        "the weights that the server sent",
        "the gradients that the client sent",
        "how many local steps were prescribed",
    ),
    "Secure aggregation works as announced, and nobody colludes. What does the server see of a round?": (
        "each client's update, without its name",
        "nothing until the last round",
        "the sum of the clients' updates",
        "each client's update with noise",
    ),
    "Where may a learned attacker take its auxiliary pairs from?": (
        "from a client that it owns, or pictures of its own at the weights that it knows",
        "from the victims' pictures that the scorer holds",
        "from the test images, chosen by the best PSNR",
        "from the victims' gradients and their true pictures",
    ),
    "The victims have trained on since the pairs were made. What happens to an attacker that was trained on them?": (
        "it gets better, since trained weights leak more",
        "it stays as good, since pictures stay the same",
        "it cannot be run at all",
        "it gets worse as the weights drift away from those of the pairs",
    ),
    "How are the settings of a learned attacker to be chosen?": (
        "by the best mean score over the victims",
        "on public pictures that were held out from its training",
        "by looking at the victims' pictures",
        "separately for each victim, by its PSNR",
    ),
    "A curious server runs plain FedAvg. Which assumption about it is realistic?": (
        "it does not know the learning rate",
        "it cannot tell which client sent which reply",
        "it knows the weights before and after, and so the update",
        "it sees updates only after they are averaged",
    ),
}
"""Questions and what may be answered, in an order that a student does not see."""

_RIGHT = (
    "3c4f8b2a7c565c6b",
    "457205c9cf712465",
    "65881e5fa498b296",
    "7315362deddcdc29",
    "8be7de2a94118fc8",
    "9069dfcd533c1706",
)
"""Salted hashes of the right ones."""


def _hashed(question: str, choice: str) -> str:
    """Enough to check an answer, and nothing to read it from."""
    return hashlib.pbkdf2_hmac("sha256", choice.encode(), f"fedtap course {question}".encode(), 2000).hex()[:16]


def _shuffled(student: str) -> dict[str, list[str]]:
    draw = student_draw(student, 5, "quiz")
    asked = {}
    for question, choices in _QUESTIONS.items():
        asked[question] = [choices[at] for at in torch.randperm(_CHOICES, generator=draw).tolist()]
    return asked


def _lettered(student: str) -> Mapping[str, Any]:
    return {question: dict(zip("abcd", choices, strict=True)) for question, choices in _shuffled(student).items()}


def _quiz(answer: Any, student: str) -> Graded:
    if not isinstance(answer, list) or len(answer) != len(_QUESTIONS):
        raise WrongFormError(f"A list of {len(_QUESTIONS)} letters is asked for")
    right = []
    for (question, choices), letter in zip(_lettered(student).items(), answer, strict=True):
        choice = choices.get(letter.strip().casefold()) if isinstance(letter, str) else None
        right.append(choice is not None and _hashed(question, choice) in _RIGHT)
    if all(right):
        return Graded(1.0, "All are right.")
    wrong = [str(number) for number, found in enumerate(right, 1) if not found]
    asked = f"question{'s' * (len(wrong) > 1)} {', '.join(wrong)}"
    return Graded(sum(right) / len(right), f"Think again about {asked}: who stands where, and what passes by there?")


@lru_cache(maxsize=4)
def _pairs(student: str) -> tuple[Tensor, Mapping[str, Any]]:
    """Held-out pictures; pairs of the attacker's own, and the held-out leaks. All noised, and weights are not told."""
    draw = student_draw(student, 5, "pairs")
    side = course_photos().auxiliary
    images, labels = side.batch(torch.randperm(len(side), generator=draw)[: _PAIRS + _HELD_OUT])
    images = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), images.shape[-1] // _SIDE)
    model = course_model("mlp(width=32, depth=1)", student, 5, shape=(1, _SIDE, _SIDE))
    sent = gradients(model, images[:, None], labels[:, None])
    sent = {name: part + _NOISE * torch.randn(part.shape, generator=draw) for name, part in sent.items()}
    each = [{name: part[at] for name, part in sent.items()} for at in range(len(images))]
    leak = eavesdropper(
        fedtap.leak(model, each, shape=(1, _SIDE, _SIDE), defence=f"noise({_NOISE})", threat_model="eavesdropper")
    )
    assert isinstance(leak, GradientLeak)
    told = {"pairs": Pairs(leak[:_PAIRS], images[:_PAIRS, None], labels[:_PAIRS, None]), "leak": leak[_PAIRS:]}
    return images[_PAIRS:], told


def recorded_pairs(pairs: Pairs, folder: Path) -> Auxiliary:
    """The supplied pairs as a folder, from which any `Learner` can be trained: `Ridge().fit(recorded_pairs(…))`."""
    about = Provenance(pairs.leak.protocol, "photos", len(pairs))
    return Auxiliary.record(folder, about, pairs.leak.network, [pairs])


@lru_cache(maxsize=4)
def _ridge_error(student: str) -> float:
    truth, told = _pairs(student)
    with tempfile.TemporaryDirectory() as folder:
        learned = Ridge().fit(recorded_pairs(told["pairs"], Path(folder)))
    return _squared(learned(told["leak"]).images[:, 0], truth)


def _squared(images: Tensor, truth: Tensor) -> float:
    return float((images.double().clamp(0, 1) - truth.double()).square().mean())


def _beat_ridge(answer: Any, student: str) -> Graded:
    truth, told = _pairs(student)
    found = _squared(numbers_in(answer, *truth.shape), truth)
    ridge, blind = _ridge_error(student), _squared(told["pairs"].images[:, 0].mean(0).expand_as(truth), truth)
    said = f"Held-out mean squared error {found:.4f}, ridge {ridge:.4f}, the mean picture {blind:.4f}"
    if found < 0.95 * ridge:
        return Graded(1.0, f"{said}: below the baseline.", found)
    if found <= 1.05 * ridge:
        return Graded(0.5, f"{said}: as good as the baseline; what does unit 1 say of a first layer's gradient?", found)
    worse = f"{said}: worse than the baseline; train on the pairs, and keep some to choose settings on."
    return Graded(0.0, worse, found)


UNIT = Unit(
    5,
    "Learned attackers",
    "An attack is only as strong as what its attacker is assumed to know; a learned one needs pairs and no weights.",
    (
        Exercise("quiz", 20, f"a list of {len(_QUESTIONS)} letters, one a question", _lettered, _quiz),
        Exercise(
            "beat_ridge",
            50,
            f"the {_HELD_OUT} pictures behind `leak` as nested lists, {_HELD_OUT} × 1 × {_SIDE} × {_SIDE}",
            lambda student: _pairs(student)[1],
            _beat_ridge,
        ),
    ),
)
