"""The page of an audit of a promise: the verdict, promised ε beside the audited bound, what fell and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtap.simulator.report.charts import Panel, Series, chart, unzipped
from fedtap.simulator.report.columns import Column, listing, single
from fedtap.simulator.report.page import Page, html

_THREAT = (
    "The observer knows the mechanism, its code and its parameters, chooses the update of one unit (a client, or an "
    "example), and sees every release. It does not know the noise. That is the attacker of the definition of "
    "differential privacy, and an upper bound on what a curious server learns."
)

_COLUMNS = (
    Column("fault", over="rows"),
    Column("what it is, and what to change", over="rows"),
    Column("found", "what is there", over="rows", form=".4g"),
    Column("correct", "what would be right", over="rows", form=".4g"),
    Column("observations", "releases after which it was found", over="rows"),
    Column("e_value", "evidence: one honest mechanism of so many shows as much, at most", over="rows", form=".3g"),
)

_TESTED = (
    Column("hypothesis", over="rows"),
    Column("e_value", "the most evidence against it", over="rows", form=".3g"),
    Column("refuted at", "releases", over="rows"),
)


def verdict_of(document: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    promised = document["promised"]
    said = f"ε = {promised.get('epsilon')} at δ = {promised.get('delta')}"
    if document["error"]:
        return f"The promise of {document['target']} could not be audited: {document['error']}"
    if document["refuted"]:
        return f"{document['target']} does not keep {said}. {document['refuted'][0]['sentence']}"
    return (
        f"{document['observations']:,} observations do not refute that {document['target']} keeps {said}; the audited "
        f"lower bound is ε ≥ {document['epsilon_lower_bound']:.3g}. That no fault was found is no proof that there is "
        "none."
    )


def audit_dp_page(document: Mapping[str, Any]) -> str:
    """The page of what audit_dp.json holds."""
    promised, refuted = document["promised"], document["refuted"]
    charts = {}
    if document["history"] and promised.get("epsilon"):
        charts["Promised and audited"] = _chart(document)
    if document["hypotheses"]:
        rows = [
            {"hypothesis": one["hypothesis"], "e_value": one["e_value"], "refuted at": one["refuted_at"]}
            for one in document["hypotheses"]
        ]
        needed = document["e_value_needed"]
        charts["Every hypothesis"] = (
            f"<p>Each is refuted at an e-value of {needed:.4g}, at any time, so that an honest mechanism is refuted "
            f"with probability {document['alpha']:g} at most.</p>{listing(*single(rows, _TESTED))}"
        )
    settings = {f"promised {name}": value for name, value in promised.items() if name != "source"}
    settings |= {f"{name} is from": where for name, where in promised.get("source", {}).items()}
    settings |= {f"mechanism: {name}": value for name, value in (document["mechanism"] or {}).items()}
    settings |= {f"ε at least, by {name}": f"{value:.4g}" for name, value in document["lower_bounds"].items()}
    rows = [
        {
            "fault": one["fault"],
            "what it is, and what to change": one["sentence"],
            "found": one["found"],
            "correct": one["needed"],
            "observations": one["observations"],
            "e_value": one["e_value"],
        }
        for one in refuted
    ]
    return html(
        Page(
            title=f"Is the noise that was promised in {document['target']}?",
            question=verdict_of(document),
            threat=_THREAT,
            settings=settings | {"observations": document["observations"], "alpha": document["alpha"]},
            environment=document["versions"] | {"device": document["device"], "started": document["started"]},
            finished=document["finished"],
            columns=_COLUMNS,
            charts=charts,
            alarms=[f"{document['error']}"] * bool(document["error"]),
            answers=[one["sentence"] for one in refuted],
            notes=[
                *document["notes"],
                *([composition["sentence"]] if (composition := document["composition"]) else []),
            ],
        ),
        rows,
    )


def _chart(document: Mapping[str, Any]) -> str:
    """The audited lower bound over observations, beside what is promised."""
    x, y = unzipped([(point["observations"], min(point["epsilon"], 1e6)) for point in document["history"]])
    promised = document["promised"]["epsilon"]
    high = max([promised, *y])
    panel = Panel(
        "observations",
        "ε",
        [Series("audited lower bound", x, y)],
        levels={"promised": promised},
        log=high > 20 * promised and min(y, default=1.0) > 0,
    )
    return chart([panel], "the audited lower bound on ε over observations, and the ε that is promised")
