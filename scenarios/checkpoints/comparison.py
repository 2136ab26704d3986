"""How well scores of vulnerability order the cases: chosen on one half of them, and judged on the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fedtap.simulator import scores
from fedtap.simulator.scenario import Row

VULNERABLE = 0.5
"""Share recovered from which a case counts as vulnerable."""

WRONG = "misclassified"
"""Column of the cases on the wrong side of a score's threshold."""


def side_by_side(rows: Sequence[Row], columns: Iterable[str]) -> list[Row]:
    """Of each score: Spearman's correlation with recovery on either half and on all, and the cases it gets wrong.

    Also without weight decay, which is easily told from the rest.

    The threshold is the one with the fewest wrong cases on the first half; `missed` are vulnerable cases of the other
    half that it calls safe, `alarms` safe ones that it calls vulnerable.

    Args:
        columns: those of the rows that hold scores.
    """
    halves = {held: [row for row in rows if row["validation"] is held] for held in (False, True)}
    table: list[Row] = []
    for name in columns:
        threshold = _threshold(halves[False], name)
        wrong = [row for row in halves[True] if (row[name] >= threshold) != (row["recovered"] >= VULNERABLE)]
        table.append(
            {
                "score": name,
                "chosen_on": _correlation(halves[False], name),
                "validation": _correlation(halves[True], name),
                "all": _correlation(rows, name),
                "fedprox_alone": _correlation([row for row in rows if row["regulariser"].startswith("fedprox")], name),
                "threshold": threshold,
                "missed": sum(row["recovered"] >= VULNERABLE for row in wrong),
                "alarms": sum(row["recovered"] < VULNERABLE for row in wrong),
                "of": len(halves[True]),
                WRONG: "; ".join(map(_named, wrong)),
            }
        )
    return table


def _named(row: Row) -> str:
    """The case, and what came back."""
    size = f"width {row['width']}, depth {row['depth']}, {row['activation']}, {row['examples']} examples"
    return f"{size}, {row['regulariser']}: {row['recovered']:.0%}"


def _threshold(rows: Sequence[Row], name: str) -> float:
    """The value from which on to call cases vulnerable: of those with the fewest wrong, the lowest."""
    tried: list[float] = [*sorted({row[name] for row in rows}), float("inf")]
    wrong = [sum((row[name] >= value) != (row["recovered"] >= VULNERABLE) for row in rows) for value in tried]
    return tried[int(np.argmin(wrong))]


def _correlation(rows: Sequence[Row], name: str) -> float:
    return scores.rank_correlation([row[name] for row in rows], [row["recovered"] for row in rows])
