"""Unit 6: every message is a leak: texts, posteriors, and what an app sends.

Texts from the gradient of a projection: Petrov et al. 2024, https://arxiv.org/abs/2405.15586. A regression's posterior
holds the sums of its records (scenarios/posteriors/ has more of them); the verdicts are
those of `fedtap audit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedtap.scenarios.course.exercise import (
    Exercise,
    Graded,
    Unit,
    WrongFormError,
    fields_in,
    graded_with,
    number_or_nan,
    one_of,
    same_word,
    student_draw,
)
from fedtap.simulator.leaks import GradientLeak, Protocol
from fedtap.simulator.models.language import build_language

_WORDS = (
    ("minister", "court", "union", "mayor", "bank", "museum", "airline", "senate", "startup", "coach"),
    ("rejects", "backs", "delays", "signs", "cancels", "reviews", "leaks", "defends", "funds", "sues"),
    ("new", "secret", "old", "costly", "disputed", "joint", "draft", "final", "rival", "local"),
    ("trade", "climate", "rail", "data", "housing", "energy", "film", "vaccine", "water", "tax"),
    ("deal", "plan", "report", "law", "project", "merger", "treaty", "budget", "study", "strike"),
    ("after", "before", "despite", "during", "without", "amid", "over", "under", "since", "until"),
    ("storm", "protests", "talks", "elections", "losses", "victory", "warning", "vote", "flood", "trial"),
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tonight", "overnight"),
)
"""What each place of a headline may hold."""
_SPECIAL = ("<pad>", "<start>", "<end>")
_TEXTS, _WIDTH = 8, 96
_RECORDS, _SPREAD = (120, 400), 2.0
_VERDICTS = ("raw data", "gradient", "update", "noised", "masked")
_APPS = "ABCDE"
_INPUTS, _STEP = 12, 0.1


@lru_cache(maxsize=4)
def _headlines(student: str) -> tuple[list[list[str]], Mapping[str, Any]]:
    """Eight headlines, and the gradient of a small GPT whose embeddings are frozen."""
    draw = student_draw(student, 6, "tokens")
    texts = [[one_of(draw, words) for words in _WORDS] for _ in range(_TEXTS)]
    vocabulary = [*_SPECIAL, *(word for words in _WORDS for word in words)]
    name = f"gpt(width={_WIDTH})"
    model = build_language(name, len(_WORDS), len(vocabulary), int(torch.randint(2**31, (), generator=draw)))
    ids = torch.tensor([[vocabulary.index(word) for word in text] for text in texts])
    loss = model.loss(ids, torch.zeros(_TEXTS, dtype=torch.long))
    parts = torch.autograd.grad(loss, list(model.parameters()))
    numbers = torch.arange(1)
    leak = GradientLeak(
        observed={key: part[None] for key, part in zip(dict(model.named_parameters()), parts, strict=True)},
        protocol=Protocol(name, (len(_WORDS),), len(vocabulary), _TEXTS),
        network=build_language(name, len(_WORDS), len(vocabulary)),
        weights={key: weight.detach() for key, weight in model.named_parameters()},
        buffers=dict(model.named_buffers()),
        clients=numbers,
        rounds=torch.ones_like(numbers),
        restarts=torch.zeros_like(numbers),
    )
    return texts, {"leak": leak, "vocabulary": vocabulary}


def _tokens(answer: Any, student: str) -> Graded:
    if not isinstance(answer, list) or not 1 <= len(answer) <= _TEXTS:
        raise WrongFormError(f"A list of {_TEXTS} texts is asked for")
    truth = _headlines(student)[0]
    said = []
    for text in answer:
        if isinstance(text, str):
            text = text.split()
        if not isinstance(text, list) or not all(isinstance(word, str) for word in text):
            raise WrongFormError("A text is a string, or a list of words")
        said.append([word.casefold() for word in text[: len(_WORDS)]])
    # a batch has no order: the assignment of texts with the most right words
    right = [[sum(a == b.casefold() for a, b in zip(one, text, strict=False)) for text in truth] for one in said]
    rows, columns = linear_sum_assignment(right, maximize=True)
    share = sum(right[row][column] for row, column in zip(rows, columns, strict=True)) / (_TEXTS * len(_WORDS))
    return graded_with(
        share,
        "Every word: a gradient of texts is the texts.",
        f"{share:.0%} of the words are right, each in its place: which attack of fedtap list reads texts, and is token "
        "number 0 the first word of the vocabulary?",
    )


def _posterior(student: str) -> tuple[dict[str, float], Mapping[str, Any]]:
    """A regression's records, whose y do not matter here, as the covariance of the posterior of a + b x shows them."""
    draw = student_draw(student, 6, "statistics")
    many = int(torch.randint(*_RECORDS, (), generator=draw))
    centre, spread = one_of(draw, (20.0, 40.0, 60.0)), one_of(draw, (3.0, 5.0, 8.0))
    x = centre + spread * torch.randn(many, generator=draw).double()
    design = torch.stack([torch.ones_like(x), x], dim=1)
    # with a flat prior and known σ, Cov (a, b) = σ² (X'X)⁻¹
    covariance = _SPREAD**2 * torch.linalg.inv(design.T @ design)
    truth = {"records": float(many), "mean": float(x.mean()), "variance": float(x.var(correction=0))}
    return truth, {"sigma": _SPREAD, "covariance": covariance, "parameters": ("intercept", "slope of x")}


def _statistics(answer: Any, student: str) -> Graded:
    truth, _ = _posterior(student)
    said = fields_in(answer, *truth)
    right = [abs(number_or_nan(said[name]) / value - 1) <= 0.02 for name, value in truth.items()]
    wrong = [name for name, found in zip(truth, right, strict=True) if not found]
    if not wrong:
        return Graded(1.0, "All within 2 %, and no record was sent.")
    return Graded(
        sum(right) / len(right),
        f"Not within 2 %: {', '.join(wrong)}. With a flat prior the covariance is σ² (X'X)⁻¹, X with a column of ones.",
    )


def _exchanges(student: str) -> tuple[dict[str, str], Mapping[str, Any]]:
    """What five apps' clients were sent and replied, beside what the client was seen to hold."""
    draw = student_draw(student, 6, "audit")
    order = torch.randperm(len(_VERDICTS), generator=draw).tolist()
    truth = {app: _VERDICTS[at] for app, at in zip(_APPS, order, strict=True)}
    apps = {}
    for app, verdict in truth.items():
        x, y = torch.rand(4, _INPUTS, generator=draw), torch.randn(4, generator=draw)
        before = torch.randn(_INPUTS, generator=draw)
        once = before - _STEP * _slope(before, x, y)
        if verdict == "raw data":
            after = torch.cat([x.flatten(), once])
        elif verdict == "gradient":
            after = once
        elif verdict == "update":
            after = before
            for _ in range(5):
                after = after - _STEP * _slope(after, x, y)
        elif verdict == "noised":
            after = once + _STEP * 0.5 * torch.randn(_INPUTS, generator=draw)
        else:
            after = torch.randint(2**22, (_INPUTS,), generator=draw)
        apps[app] = {"before": before, "reply": after, "inputs": x, "targets": y}
    return truth, {"apps": apps, "learning_rate": _STEP, "verdicts": _VERDICTS}


def _slope(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the mean squared error ½ (x·w - y)²."""
    return x.T @ (x @ weights - y) / len(y)


def _audit(answer: Any, student: str) -> Graded:
    truth = _exchanges(student)[0]
    said = fields_in(answer, *truth)
    right = {app: same_word(said[app], verdict) for app, verdict in truth.items()}
    return graded_with(
        sum(right.values()) / len(right),
        "All verdicts are right.",
        f"Look again at {', '.join(app for app, found in right.items() if not found)}: how long is the reply, are its "
        "numbers whole, and what is left of (before - reply) / learning rate without the gradients of one step, or of "
        "five?",
    )


UNIT = Unit(
    6,
    "Beyond images",
    "Every message is a leak: of texts, of records, of whatever an app sends.",
    (
        Exercise("tokens", 30, f"a list of {_TEXTS} texts of {len(_WORDS)} words", lambda s: _headlines(s)[1], _tokens),
        Exercise(
            "statistics",
            30,
            'an object {"records": their number, "mean": of x, "variance": of x, divided by the number}',
            lambda student: _posterior(student)[1],
            _statistics,
        ),
        Exercise(
            "audit",
            30,
            'an object with one of the verdicts for each app, {"A": …, "B": …, "C": …, "D": …, "E": …}',
            lambda student: _exchanges(student)[1],
            _audit,
        ),
    ),
)
