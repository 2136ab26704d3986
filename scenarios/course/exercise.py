"""What an exercise is: something that a student is given, and a check that computes the answer again from the seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedtap.simulator import scores
from fedtap.simulator.attack import generator
from fedtap.simulator.errors import short


@dataclass(frozen=True)
class Graded:
    """What an answer is worth."""

    score: float
    """In [0, 1]."""
    hint: str
    """A sentence that helps, and never gives the solution."""
    measured: float | None = None
    """What a class may be ranked by, such as a held-out error; None where there is no such number."""


@dataclass(frozen=True)
class Exercise:
    """One exercise of a unit."""

    name: str
    """As the answers file calls it."""
    minutes: int
    """That it takes a student."""
    form: str
    """What the answer looks like in JSON."""
    given: Callable[[str], Mapping[str, Any]]
    """From the student's name to what the exercise is about."""
    check: Callable[[Any, str], Graded]
    """From an answer of any JSON type and the student's name to its score and a hint; raises WrongFormError."""


@dataclass(frozen=True)
class Unit:
    """One lesson."""

    number: int
    """From 1."""
    title: str
    """Of the lesson."""
    goal: str
    """What a student is to understand."""
    exercises: tuple[Exercise, ...]
    """In the order in which they are done."""


class WrongFormError(ValueError):
    """The answer is not of the form that was asked for; the message is the hint."""


def grade_answer(exercise: Exercise, answer: Any, student: str) -> Graded:
    """The score of one answer, whatever was written; an answer that is left out scores 0."""
    if answer is None or answer in ("", [], {}):
        return Graded(0.0, f"Not answered yet: {exercise.form}.")
    try:
        return exercise.check(answer, student)
    except WrongFormError as error:
        return Graded(0.0, f"{error}: {exercise.form}.")


def graded_with(score: float, praise: str, hint: str) -> Graded:
    """The score, with praise of a whole one and a hint beside any other."""
    return Graded(score, praise if score == 1 else hint)


def same_word(answer: Any, *words: str) -> bool:
    """Whether the answer is one of the words; capitals and spaces around it make no difference."""
    return isinstance(answer, str) and answer.strip().casefold() in [word.casefold() for word in words]


def student_draw(student: str, *names: int | str) -> torch.Generator:
    """Random numbers of a student's exercise; capitals and spaces around a name make no difference."""
    return generator("course", " ".join(student.split()).casefold(), *names)


def one_of(draw: torch.Generator, among: Sequence[Any]) -> Any:
    """One of several, each as likely as the others."""
    return among[int(torch.randint(len(among), (), generator=draw))]


def number_in(answer: Any, what: str = "the answer") -> float:
    """A finite number.

    Raises:
        WrongFormError: it is none.
    """
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        raise WrongFormError(f"{what[0].upper()}{what[1:]} is {short(repr(answer), 30)}, which is no finite number")
    return float(answer)


def number_or_nan(answer: Any) -> float:
    """A finite number; NaN, which equals nothing, where there is none."""
    try:
        return number_in(answer)
    except WrongFormError:
        return math.nan


def numbers_in(answer: Any, *shape: int) -> Float[Tensor, "..."]:
    """Nested lists of finite numbers, of just this shape, in double precision.

    Raises:
        WrongFormError: it is something else.
    """

    def flat(value: Any, sides: tuple[int, ...]) -> list[float]:
        if not sides:
            return [number_in(value, "one of the numbers")]
        if not isinstance(value, list) or len(value) != sides[0]:
            many = f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
            raise WrongFormError(f"A list of {sides[0]} entries is asked for, and here is {many}")
        return [one for entry in value for one in flat(entry, sides[1:])]

    return torch.tensor(flat(answer, shape), dtype=torch.float64).reshape(shape)


def fields_in(answer: Any, *names: str) -> dict[str, Any]:
    """The named fields of an object, None where one is missing.

    Raises:
        WrongFormError: it is no object.
    """
    if not isinstance(answer, dict):
        raise WrongFormError(f"An object of {', '.join(names)} is asked for, and here is {short(repr(answer), 30)}")
    return {name: answer.get(name) for name in names}


def share_near(answer: Float[Tensor, "..."], truth: Float[Tensor, "..."], most: float) -> float:
    """Share of the numbers that differ by `most` at most."""
    return float(((answer - truth.double()).abs() <= most).double().mean())


def within_factor(answer: Any, truth: float, full: float, half: float) -> float:
    """1 within the factor `full` of the truth, 0.5 within `half`, 0 beyond.

    Raises:
        WrongFormError: it is no number.
    """
    value = number_in(answer)
    factor = max(value / truth, truth / value) if value > 0 else math.inf
    return 1.0 if factor <= full else 0.5 if factor <= half else 0.0


def decibels(answer: Float[Tensor, "..."], truth: Float[Tensor, "..."]) -> float:
    """PSNR of one picture."""
    return float(scores.psnr(scores.mse(answer[None], truth[None])))


def flat_decibels(truth: Float[Tensor, "channel height width"]) -> float:
    """PSNR of the best picture of one colour: what can be had without seeing anything."""
    return decibels(truth.mean((1, 2), keepdim=True).expand_as(truth), truth)
