"""Unit 3: ε as a game with a bound.

Gaussian noise after a clip: Balle and Wang 2018, https://arxiv.org/abs/1805.06530; the game with canaries: Hayes,
Mahloujifar and Balle 2023, https://arxiv.org/abs/2302.07225; auditing a mechanism by playing it: Nasr et al. 2021,
https://arxiv.org/abs/2101.04535.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

from fedtap.scenarios.course.exercise import (
    Exercise,
    Graded,
    Unit,
    WrongFormError,
    fields_in,
    graded_with,
    number_in,
    one_of,
    same_word,
    student_draw,
    within_factor,
)
from fedtap.simulator.defences.accountant import ADJACENCIES, noise_for

_PLAYED, _SIDES = 12, 3
_LETTERS = "ABCD"
_FAULTS = ("half the noise", "no clip", "the same noise every time")
_TRIALS, _DIMENSIONS = 400, 16
_DELTA = 1e-5
_PEOPLE, _FEATURES = 60, 8


def _duel(student: str) -> Mapping[str, Any]:
    """Twelve noisy releases of one of two canaries, six of them nearer to each."""
    draw = student_draw(student, 3, "attacker")
    canary = torch.randn(_SIDES, generator=draw).double()
    canary = (canary / canary.norm()).mul(100).round() / 100
    near: dict[bool, list[Tensor]] = {True: [], False: []}
    while min(map(len, near.values())) < _PLAYED // 2:
        sign = 1.0 if torch.rand((), generator=draw) < 0.5 else -1.0
        release = (sign * canary + torch.randn(_SIDES, generator=draw).double()).mul(100).round() / 100
        if abs(float(release @ canary)) > 0.05:  # nothing that is a matter of rounding
            near[bool(release @ canary > 0)].append(release)
    both = torch.stack([*near[True][: _PLAYED // 2], *near[False][: _PLAYED // 2]])
    return {"a": canary, "b": -canary, "releases": both[torch.randperm(_PLAYED, generator=draw)], "sigma": 1.0}


def _attacker(answer: Any, student: str) -> Graded:
    if not isinstance(answer, list) or len(answer) != _PLAYED:
        raise WrongFormError(f"A list of {_PLAYED} letters is asked for")
    told = _duel(student)
    best = ["a" if value > 0 else "b" for value in (told["releases"] @ told["a"]).tolist()]
    alike = [same_word(one, true) for one, true in zip(answer, best, strict=True)]
    score = max(0.0, 2 * sum(alike) / _PLAYED - 1)  # a guess by coin scores 0
    return graded_with(
        score,
        "So the best attacker says, who is still wrong at times: that is what noise buys.",
        f"The best attacker agrees with {sum(alike)} of {_PLAYED}: which of the two canaries is the likelier one to "
        "have given this release, if noise is equally likely in all directions?",
    )


def _promise(student: str) -> Mapping[str, Any]:
    draw = student_draw(student, 3, "sigma")
    return {
        "epsilon": one_of(draw, (0.8, 1.0, 1.5, 2.0, 3.0)),
        "delta": _DELTA,
        "clip": one_of(draw, (0.5, 1.0, 1.5, 2.0)),
        "adjacency": one_of(draw, tuple(ADJACENCIES)),
        "rounds": one_of(draw, (4, 9, 16)),
    }


def _right_sigma(student: str) -> float:
    """Releases of the same data at a distance Δ are one at √rounds Δ."""
    told = _promise(student)
    distance = told["clip"] * ADJACENCIES[told["adjacency"]] * math.sqrt(told["rounds"])
    return noise_for(told["epsilon"], told["delta"], distance)


def _sigma(answer: Any, student: str) -> Graded:
    share = number_in(answer) / _right_sigma(student)
    if abs(share - 1) <= 0.01:
        return Graded(1.0, "That is the least noise that keeps the promise.")
    if 1 < share <= 1.6:
        return Graded(0.5, "The promise is kept, with more noise than it takes: there is an exact formula for ε.")
    if share > 1.6:
        return Graded(
            0.0,
            "That is far more noise than the promise takes: is the sensitivity counted twice, and by how much does it "
            "grow with the rounds?",
        )
    return Graded(
        0.0,
        "That noise breaks the promise: how far apart can two neighbours' releases lie under this adjacency, and how "
        "does that grow with the rounds?",
    )


@lru_cache(maxsize=4)
def _mechanisms(student: str) -> tuple[dict[str, str], Mapping[str, Any]]:
    """Which mechanism is broken and how; and what each of four gave for a long vector, again and again."""
    draw = student_draw(student, 3, "broken")
    truth = {"mechanism": one_of(draw, _LETTERS), "fault": one_of(draw, _FAULTS)}
    clip, sigma = one_of(draw, (0.5, 1.0, 2.0)), one_of(draw, (0.5, 1.0, 1.5))
    vector = torch.randn(_DIMENSIONS, generator=draw)
    vector = 10 * clip * vector / vector.norm()
    outputs = {}
    for letter in _LETTERS:
        fault = truth["fault"] if letter == truth["mechanism"] else ""
        noise = torch.randn(1 if fault == _FAULTS[2] else _TRIALS, _DIMENSIONS, generator=draw)
        sent = vector if fault == _FAULTS[1] else vector * clip / vector.norm()
        outputs[letter] = (sent + (0.5 if fault == _FAULTS[0] else 1) * sigma * noise).expand(_TRIALS, -1).clone()
    return truth, {"clip": clip, "sigma": sigma, "vector": vector, "outputs": outputs, "faults": _FAULTS}


def _broken(answer: Any, student: str) -> Graded:
    said, truth = fields_in(answer, "mechanism", "fault"), _mechanisms(student)[0]
    right = [same_word(said[name], truth[name]) for name in truth]
    hints = (
        "Audit each mechanism: compare the mean and the spread of its outputs with what is announced.",
        "Say what is wrong in the words of faults: what do the outputs' mean, their spread, and two outputs beside "
        "each other tell?",
    )
    missing = [hint for hint, found in zip(hints, right, strict=True) if not found]
    return Graded(sum(right) / 2, " ".join(missing) or "Found: nobody had to read the code.")


@lru_cache(maxsize=4)
def _survey(student: str) -> Mapping[str, Any]:
    """People's features with labels, and others' to test on."""
    draw = student_draw(student, 3, "accuracy")
    direction = torch.randn(_FEATURES, generator=draw).double()
    direction = direction / direction.norm()
    labels = torch.randint(2, (2 * _PEOPLE,), generator=draw).double() * 2 - 1
    spread = float(one_of(draw, (0.8, 1.0, 1.2)))
    features = labels[:, None] * direction + spread * torch.randn(len(labels), _FEATURES, generator=draw).double()
    features = features / features.norm(dim=1, keepdim=True).clamp_min(1)
    people = {"features": features[:_PEOPLE], "labels": labels[:_PEOPLE]}
    others = {"test_features": features[_PEOPLE:], "test_labels": labels[_PEOPLE:]}
    return {**people, **others, "delta": _DELTA, "clip": 1.0, "lost": 0.05}


def _expected_accuracy(told: Mapping[str, Any], epsilon: float) -> float:
    """Of w = Σ y x + N(0, σ²): each test row is right with probability Φ(y w·x / σ|x|)."""
    weights = (told["labels"][:, None] * told["features"]).sum(0)
    margin = told["test_labels"] * (told["test_features"] @ weights) / told["test_features"].norm(dim=1)
    sigma = noise_for(epsilon, told["delta"], told["clip"]) if math.isfinite(epsilon) else 1e-12
    return float(torch.special.ndtr(margin / sigma).mean())


def _least_epsilon(student: str) -> float:
    told = _survey(student)
    wanted = _expected_accuracy(told, math.inf) - told["lost"]
    return math.exp(brentq(lambda power: _expected_accuracy(told, math.exp(power)) - wanted, -6, 6))


def _accuracy(answer: Any, student: str) -> Graded:
    score = within_factor(answer, _least_epsilon(student), 1.25, 3.0)
    return graded_with(
        score,
        "That ε costs as much accuracy as was allowed, and no more.",
        "Another ε costs that much: add N(0, σ²) to each entry of Σ y x, with σ for one release at add/remove, and "
        "take the mean accuracy over many draws.",
    )


UNIT = Unit(
    3,
    "Noise and ε",
    "ε is a game with a bound: no attacker, whatever it knows, wins more often.",
    (
        Exercise("attacker", 15, f'a list of {_PLAYED} letters, "a" or "b", one a release', _duel, _attacker),
        Exercise(
            "sigma",
            20,
            "a number: the least σ of each round's noise, on the scale of the clip and not divided by it",
            _promise,
            _sigma,
        ),
        Exercise(
            "broken",
            25,
            'an object {"mechanism": a letter, "fault": one of faults}',
            lambda student: _mechanisms(student)[1],
            _broken,
        ),
        Exercise(
            "accuracy",
            20,
            "a number: the ε of one release at which the mean accuracy is `lost` below that without noise",
            _survey,
            _accuracy,
        ),
    ),
)
