"""A course in six units, whose exercises differ between students and are graded by computing the answers again.

`given` is what a student is handed for a unit; `fedtap course` copies the units, and `fedtap grade` grades the answers.
A notebook begins with these two lines:

    from fedtap.scenarios.course import given
    mine = given(1, "Ada Lovelace")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedtap.simulator.errors import FedtapError, short

if TYPE_CHECKING:
    from fedtap.scenarios.course.exercise import Unit

COURSE_UNITS = {
    1: "what_a_gradient_says",
    2: "when_it_stops",
    3: "noise_and_epsilon",
    4: "defences_judged",
    5: "learned_attackers",
    6: "beyond_images",
}
"""Number of a unit -> the file of its exercises."""


def course_unit(number: int) -> Unit:
    """The unit of this number, which imports torch.

    Raises:
        FedtapError: there is none.
    """
    if number not in COURSE_UNITS:
        raise FedtapError(f"There is no unit {short(number)}: the course has units 1 to {len(COURSE_UNITS)}.")
    found: Unit = import_module(f"fedtap.scenarios.course.{COURSE_UNITS[number]}").UNIT
    return found


def given(number: int, student: str) -> dict[str, dict[str, Any]]:
    """What a student is handed for a unit: of each exercise by name, what it is about, by name.

    Args:
        number: of the unit, from 1.
        student: the name that stands in the answers file; another name has other exercises.

    Raises:
        FedtapError: there is no such unit, or no name.
    """
    if not isinstance(student, str) or not student.strip():
        raise FedtapError("The exercises differ between students, and no student is named: given(1, 'Ada Lovelace').")
    return {one.name: dict(one.given(student)) for one in course_unit(number).exercises}
