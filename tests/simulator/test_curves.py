"""Charts: the axis that a knob's values get."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from fedtap.simulator.report.curves import MANY, scale


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.0, 2.0, 10.0], "linear"),
        ([0.1, 1.0, 10.0], "log"),
        ([0.0, 0.1, 10.0], "symlog"),
        ([-1.0, 0.1, 10.0], "linear"),
        ([0.0], "linear"),
    ],
)
def test_values_over_more_than_an_order_of_magnitude_get_a_logarithmic_axis(values: list[float], kind: str) -> None:
    axes = Figure().subplots()
    scale(axes, values)
    assert axes.get_xscale() == kind
    assert axes.get_xticks().tolist() == values


def test_many_values_share_few_ticks() -> None:
    axes, values = Figure().subplots(), [float(value) for value in range(3 * MANY)]
    scale(axes, values)
    ticks = axes.get_xticks().tolist()
    assert MANY // 2 <= len(ticks) <= MANY
    assert set(ticks) <= set(values)
