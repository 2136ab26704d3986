"""What a defence guarantees in an image federation, and how often an attack succeeded against it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fedtap.simulator.defences.accountant import mechanism_of
from fedtap.simulator.defences.notation import described
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.settings import Federation
from fedtap.simulator.report.outcomes import outcome
from fedtap.simulator.scenario import Row

ADJACENCY = "add/remove"
"""Of the rows' ε for a client: one that is not there sends noise alone. An example of DP-SGD's is replaced."""

UNCOVERED = "number of examples, partition"
"""What travels beside every update in the clear, so that no ε covers it."""


def promised(part: Federation, clients: int = 0) -> Row:
    """What the part's defence guarantees: ε of a victim's attacked exchanges, and of all in which a client takes part.

    Nothing where the part names no δ.

    Args:
        clients: honest ones on the grid; 0 means as many as the part names, or one a victim.

    Raises:
        FedtapError: no accountant here covers the defence.
    """
    if part.delta is None:
        return {}
    rounds = part.rounds + part.attacked_rounds(
        clients or part.clients or part.victims
    )  # a client answers in all of them
    defences = described(part.defence)
    try:
        once, ever = (
            mechanism_of(defences, ADJACENCY, releases, part.local_steps) for releases in (part.repeats, rounds)
        )
    except FedtapError as error:
        if part.success_db is not None:
            raise
        return {"epsilon": None, "epsilon_note": str(error), "delta": part.delta}
    guarantee = dataclasses.asdict(once.guarantee(part.delta))
    note = {} if math.isfinite(guarantee["epsilon"]) else {"epsilon_note": UNPROTECTED}
    guarantee["epsilon"] = float(f"{guarantee['epsilon']:.9g}")  # as it was asked for, where it was
    return {
        **{name: value if value != math.inf else None for name, value in guarantee.items()},
        **note,
        "epsilon_all": _finite(ever.guarantee(part.delta).epsilon),
        "releases": rounds,
        "sigma": once.sigma,
        "not_covered": UNCOVERED + (", drift norm" if part.local_samples else ""),
        **(dict.fromkeys(SUCCESS) | {"success_db": part.success_db} if part.success_db is not None else {}),
    }


SUCCESS = ("success_db", "success", "success_low", "success_high", "bound")
UNPROTECTED = "ε = ∞: it takes a clip, and noise after it"


def success_of(rows: Sequence[Row]) -> Row:
    """The share of an attack's images that came back, with Clopper and Pearson's 95 % interval.

    There is no bound beside it: nobody knows with what probability these images could have been guessed.
    """
    found = outcome(rows)
    if not found.images:
        return {}
    low, high = found.interval
    return {"success": found.share, "success_low": low, "success_high": high}


def _finite(value: float) -> float | None:
    return value if abs(value) < math.inf else None
