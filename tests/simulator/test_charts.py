"""Charts: the axis that a knob's values get."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from fedtap.simulator.report.charts import MANY, Panel, Series, chart, scale


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


def test_a_chart_is_the_same_each_time_and_holds_its_words() -> None:
    series = [Series("a $ <b>", [1, 2, 3], [0.1, 0.2, 0.4], low=[0, 0, 0], high=[1, 1, 1], names=["p", "q", "r$"])]
    series += [Series("", [1, 2], [0.3, 0.1], "faint", like="a $ <b>"), Series("bars", [2], [1], "bars", [0.5], [1.5])]
    panels = [Panel("across $x$", "up", series, levels={"blind guess": 0.2}, mark=2), Panel("x", "y", series, log=True)]
    drawn = chart(panels, "what 'is' seen")
    assert drawn == chart(panels, "what 'is' seen")
    assert drawn.startswith("<svg role='img' aria-label='what &#x27;is&#x27; seen'")
    for words in ("a $ &lt;b&gt;", "across $x$", "blind guess", "r$"):
        assert words in drawn
    assert drawn.count("a $ &lt;b&gt;") == 1  # the legend names each series once
    assert 'href="http' not in drawn
