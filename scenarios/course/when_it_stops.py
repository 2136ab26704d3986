"""Unit 2: what averaging hides, and what it does not.

Pictures of a batch come back from units that one picture alone switches on (Boenisch et al. 2021,
https://arxiv.org/abs/2112.02918). Secure aggregation shows sums alone (Bonawitz et al. 2017,
https://eprint.iacr.org/2017/281), and two sums differ by whoever was in one of them.
"""

from __future__ import annotations

import re
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
    graded_with,
    numbers_in,
    one_of,
    share_near,
    student_draw,
    within_factor,
)
from fedtap.scenarios.course.pictures import course_model, course_photos
from fedtap.simulator import scores
from fedtap.simulator.auxiliary import gradients

_BATCHES = (1, 2, 4, 8, 16, 32)
_IMAGES = 32
_WIDTHS = (12, 24, 48, 96, 256)
_PRESENT, _ENTRIES = 5, 4


@lru_cache(maxsize=4)
def _series(student: str) -> Mapping[str, Any]:
    draw = student_draw(student, 2, "crossing")
    side = course_photos().auxiliary
    images, labels = side.batch(torch.randperm(len(side), generator=draw)[:_IMAGES])
    model = course_model(f"mlp(width={one_of(draw, _WIDTHS)}, depth=1)", student, 2)
    return {"model": model, "images": images, "labels": labels, "batches": _BATCHES}


@lru_cache(maxsize=4)
def _shares(student: str) -> tuple[float, ...]:
    """Share of the images that come back with 30 dB, for each batch size, over all batches of that size."""
    told = _series(student)
    images, labels = told["images"], told["labels"]
    found = []
    for batch in _BATCHES:
        groups = (images.unflatten(0, (-1, batch)), labels.unflatten(0, (-1, batch)))
        sent = gradients(told["model"], *groups)
        each = [{name: part[victim] for name, part in sent.items()} for victim in range(_IMAGES // batch)]
        leak = fedtap.leak(told["model"], each, shape=tuple(images.shape[1:]), batch=batch)
        back = fedtap.attack(leak, "linear").images
        found.append(sum(_returned(guess, truth) for guess, truth in zip(back, groups[0], strict=True)) / _IMAGES)
    return tuple(found)


def _returned(guess: Tensor, truth: Tensor) -> int:
    """How many true images have one among the reconstructed that is within 30 dB."""
    error = (guess[None] - truth[:, None]).square().flatten(2).mean(2)
    return int((scores.psnr(error.min(1).values) >= scores.RECOVERED_DB).sum())


def _first_below(student: str) -> int:
    """The smallest batch size of which less than half of the images come back; twice the largest where none is."""
    below = (batch for batch, share in zip(_BATCHES, _shares(student), strict=True) if share < 0.5)
    return next(below, 2 * _BATCHES[-1])


def _crossing(answer: Any, student: str) -> Graded:
    score = within_factor(answer, _first_below(student), 1.4, 2.8)
    return graded_with(
        score,
        "The curve crosses there.",
        "The curve crosses half elsewhere: take every batch of that size, attack each with linear, and count an image "
        f"that one of the reconstructed matches with {scores.RECOVERED_DB:g} dB.",
    )


def _sums(student: str) -> tuple[Tensor, dict[str, Any]]:
    """The update of the client that is in the first round alone; means of both rounds, and a colluder's update."""
    draw = student_draw(student, 2, "collusion")
    updates = torch.randint(1, 20, (_PRESENT + 1, _ENTRIES), generator=draw) / 10
    signs = torch.randint(2, updates.shape, generator=draw) * 2 - 1
    updates = updates.double() * signs
    victim = one_of(draw, range(_PRESENT))
    second = [client for client in range(_PRESENT + 1) if client != victim]
    return updates[victim], {
        "first_round": [*range(_PRESENT)],
        "first_mean": updates[:_PRESENT].mean(0),
        "second_round": second,
        "second_mean": updates[second].mean(0),
        "colluder": _PRESENT,
        "colluders_update": updates[_PRESENT],
    }


def _collusion(answer: Any, student: str) -> Graded:
    share = share_near(numbers_in(answer, _ENTRIES), _sums(student)[0], 1e-3)
    return graded_with(
        share,
        "Exact: no single reply was seen, and one is known.",
        f"{share:.0%} of the entries are right: write both rounds as sums over their clients and see which terms are "
        "in one of them alone. What the server is given are means.",
    )


_RUBRIC = {
    "how the batch size matters": r"\bbatch",
    "what several local steps or epochs change": r"\b(local (step|epoch)|epoch|several steps)",
    "what secure aggregation shows of a round": r"\b(secure aggregation|secagg|\bsums?\b|aggregat)",
    "how it is undone": r"\b(collu\w*|differenc\w*|drop\w*|subtract\w*|only client)",
    "what a failed attack does not prove": r"\b(stronger|fail\w*|other attack|better attack|not (mean|prove))",
}
"""What an essay speaks of, and words by which that is noticed: a teacher reads whether it is right."""

_LEAST, _MOST = 80, 600
"""Words of an essay."""


def _essay(answer: Any, student: str) -> Graded:
    if not isinstance(answer, str):
        raise WrongFormError("A text is asked for")
    words = re.findall(r"\w+", answer.casefold())
    sentences = [one for one in re.split(r"[.!?]\s", answer) if len(one.split()) >= 4]
    if not _LEAST <= len(words) <= _MOST:
        return Graded(0.0, f"The essay has {len(words):,} words: write {_LEAST} to {_MOST}.")
    if len(sentences) < 4 or len(set(words)) < 0.4 * len(words):
        return Graded(0.0, "Write whole sentences of your own, five or more, without repeating words.")
    missing = [point for point, sign in _RUBRIC.items() if not re.search(sign, answer.casefold())]
    score = 1 - len(missing) / len(_RUBRIC)
    hint = f"It does not seem to say {missing[0]}." if missing else "It speaks of every point; your teacher reads it."
    return Graded(score, hint)


def _asked(student: str) -> Mapping[str, Any]:
    return {"question": "When does an attack on a gradient stop, and what follows from that?", "speaks_of": [*_RUBRIC]}


UNIT = Unit(
    2,
    "When it stops",
    "Averaging over images, steps and clients hides much, and not what a difference of two averages brings back.",
    (
        Exercise(
            "crossing",
            30,
            "a number: the smallest of the batch sizes at which less than half of the images come back with 30 dB "
            "(twice the largest where there is none)",
            _series,
            _crossing,
        ),
        Exercise(
            "collusion",
            30,
            f"a list of {_ENTRIES} numbers: the update of the client that is in the first round and not in the second",
            lambda student: _sums(student)[1],
            _collusion,
        ),
        Exercise("essay", 20, f"a text of {_LEAST} to {_MOST} words", _asked, _essay),
    ),
)
