"""Options are derived from a dataclass's annotations, written out or by the name that several share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fedtap.simulator.options import Option, options_of

if TYPE_CHECKING:
    from torch import Tensor

Sigma = Annotated[float, Option("standard deviation of the noise", 0, 1)]


@dataclass(frozen=True)
class Above:
    written: Annotated[int, Option("victims", 1, 9)] = 1
    shared: Sigma = 0.5
    other: Tensor | None = None


@dataclass(frozen=True)
class Below(Above):
    shared: float = 0.25


def test_an_option_may_be_annotated_by_a_shared_name_and_keeps_its_meaning_below() -> None:
    for scenario, default in ((Above, 0.5), (Below, 0.25)):
        found = options_of(scenario)
        assert found.keys() == {"written", "shared"}
        assert (found["shared"].type, found["shared"].values) == (float, (default,))
        assert (found["shared"].option.low, found["shared"].option.high) == (0, 1)
        assert found["shared"].option.help == "standard deviation of the noise"
