"""The page of an audit: the risk in two sentences, what was audited, what was tried and what was not, the evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from xml.etree import ElementTree

from fedtap.scenarios.audit.attacks import best_explained
from fedtap.scenarios.audit.verdict import MASKED, NOISED, NOT_UNDERSTOOD, RAW
from fedtap.simulator.report.columns import Column, listing, single
from fedtap.simulator.report.outcomes import DOUBT
from fedtap.simulator.report.page import Page, html
from fedtap.simulator.report.pictures import Picture, gallery
from fedtap.simulator.scores import LEVELLED, LEVELS, limits
from fedtap.simulator.wire.soundness import EXPLAINED

COMES_BACK = (*LEVELS[1:], RAW)
"""Levels of a risk at which a build fails."""

NOTHING_KNOWN = "not known"
"""Level of a risk that was not measured."""

_THREAT = (
    "A curious server: it runs the app as it is, keeps what every client sends, and computes. It knows the app's code, "
    "the weights that it sent, and what the app prescribes: optimiser, learning rate, loss, steps, batch and the range "
    "of the inputs. It knows no input and no label, changes no message and colludes with no client.\n"
    "In an organisation that is whoever operates the server or can read its memory, logs or backups."
)

_BLIND_GUESS = (
    "the other clients' inputs, whose mean it is, and which stand for public data (grey where there are none)"
)

_CROSSWALK = (Column("text", over="rows"), Column("asks for", over="rows"), Column("here", over="rows"))

_COLUMNS = (
    Column("verdict", over="rows"),
    Column("client", over="rows"),
    Column("round", over="rows"),
    Column("model", over="rows"),
    Column("steps", "of the client's optimiser", over="rows"),
    Column("batches", "examples in each step", over="rows"),
    Column("optimiser", over="rows"),
    Column("learning_rate", over="rows"),
    Column("momentum", over="rows"),
    Column("loss", over="rows"),
    Column("inputs", "range of what the model is fed", over="rows"),
    Column("replay_error", "how far the replayed update is from what was sent, relative to it", over="rows"),
    Column("reason", over="rows"),
)

_ATTACKS = (
    Column("client", over="rows"),
    Column("round", over="rows"),
    Column("attack", over="rows"),
    Column("counts", "whether this attack is the one that leaves least unexplained", over="rows"),
    Column("recognisable", "inputs that came back", over="rows"),
    Column("blind", "inputs that a blind guess gets", over="rows"),
    Column("psnr", "in dB, mean over the inputs", over="rows", form=".1f"),
    Column("blind_psnr", "that of the blind guess", over="rows", form=".1f"),
    Column("labels", "share of the labels that were found, and what all classes alike would get", over="rows"),
    Column("unexplained", "share of the gradient that the result does not cause", over="rows"),
    Column("seconds", over="rows"),
    Column("error", over="rows"),
)


_ALONE = (Column("input", over="rows"), *_ATTACKS[2:])


def _of_single(alone: Sequence[Mapping[str, Any]]) -> str:
    """What single steps on single inputs tell."""
    found = [row for one in alone if (row := best_explained(one["attacks"]))]
    won = sum(level != LEVELS[0] for row in found for level in row["levels"])
    return (
        "The client's own model, weights, loss and optimiser, at one step on one input, which is what a batch of 1 and "
        f"a single local step would send: {won} of {len(found)} inputs come back recognisable. Where they do and the "
        "app's own do not, it is the batch and the steps that hide them, and no defence. These are computed from what "
        "was seen, and the app was not played again."
    )


def risk_of(exchanges: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The worst that was found: its level and sentences, and the share of the attacked inputs that came back with its
    95 % interval by Clopper and Pearson."""
    found = [row for one in exchanges if (row := best_explained(one["attacks"]))]
    levels = [level for row in found for level in row["levels"]]
    won, blind = (sum(level != LEVELS[0] for row in found for level in row[key]) for key in ("levels", "blind_levels"))
    risk: dict[str, Any] = {"attacked": len(levels), "recognisable": won, "blind": blind}
    if levels:
        risk |= {"share": won / len(levels), "interval": list(limits(won, len(levels), DOUBT / 2))}
        for key, column in (("labels", "label_correct"), ("blind_labels", "blind_label_correct")):
            risk[key] = sum(row[column] * len(row["levels"]) for row in found) / len(levels)
    raw = [one["reason"] for one in exchanges if one["verdict"] == RAW]
    if raw:
        told = f"The server of {name} is sent data as they are, in {len(raw)} of {len(exchanges)} exchanges. {raw[0]}"
        return risk | {"level": RAW, "sentence": told}
    if not levels:
        return risk | {"level": NOTHING_KNOWN, "sentence": _unattacked(exchanges, name)}
    low, high = risk["interval"]
    labels = f" Of their labels {risk['labels']:.0%} were found; a guess of all classes alike gets "
    labels += f"{risk['blind_labels']:.0%}."
    unexplained = [row["unexplained"] for row in found if row["unexplained"] is not None]
    if unexplained and min(unexplained) > EXPLAINED:
        labels += " No attack explains what was sent, so none has converged: more --minutes may tell more."
    figure = f"{won} of {len(levels)} ({won / len(levels):.0%} [{100 * low:.0f}–{100 * high:.0f}])"
    if won > blind:
        told = (
            f"The server of {name} can rebuild inputs of its clients: of those attacked, {figure} came back "
            f"recognisable, and of the blind guesses {blind}."
        )
        return risk | {
            "level": LEVELS[2] if LEVELS[2] in levels else LEVELS[1],
            "sentence": told + labels + _counted(exchanges),
        }
    told = (
        f"No attack here rebuilds more inputs of {name}'s clients than a blind guess: of those attacked, {figure} are "
        f"recognisable, and of the blind guesses {blind}. That these attacks fail is no proof that all do."
    )
    return risk | {"level": LEVELS[0], "sentence": told + labels + _counted(exchanges)}


def _unattacked(exchanges: Sequence[Mapping[str, Any]], name: str) -> str:
    """What is to be said where no input was attacked."""
    verdicts = {one["verdict"] for one in exchanges}
    why = next((one["reason"] for one in exchanges if one["verdict"] == NOT_UNDERSTOOD), "")
    if not verdicts:
        return f"No exchange of {name} was seen, so its risk is {NOTHING_KNOWN}."
    if verdicts == {MASKED}:
        return (
            f"The server of {name} reads nothing but sums over its clients, which SecAgg+ unmasks.{_counted(exchanges)}"
        )
    if why:
        return f"What the clients of {name} send was not understood, so its risk is {NOTHING_KNOWN}. {why}"
    said = (
        "is noised, and no attack was tried on it"
        if NOISED in verdicts
        else "was understood, and no attack was completed on it"
    )
    return f"What the clients of {name} send {said}, so its risk is {NOTHING_KNOWN}. {exchanges[0]['reason']}"


def _counted(exchanges: Sequence[Mapping[str, Any]]) -> str:
    verdicts = Counter(str(one["verdict"]) for one in exchanges)
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return f" Exchanges that were seen: {told}."


def audit_page(document: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> str:
    """The page of what audit.json holds."""
    app, exchanges = document["app"], document["exchanges"]
    rows = [_exchange_row(one) for one in exchanges]
    attacks = [_attack_row(one, row) for one in exchanges for row in one["attacks"]]
    charts = {}
    if attacks:
        charts["What was tried"] = listing(*single(attacks, _ATTACKS))
    if alone := document["single_steps"]:
        rows_alone = [_attack_row(one, row) | {"input": one["input"]} for one in alone for row in one["attacks"]]
        charts["What would change it"] = f"<p>{escape(_of_single(alone))}</p>{listing(*single(rows_alone, _ALONE))}"
    if pictures:
        charts[list(charts)[-1]] += gallery(pictures, _BLIND_GUESS)
    charts["What was not tried"] = f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in document['not_tested'])}</ul>"
    charts["Crosswalk"] = listing(*single(_crosswalk(document), _CROSSWALK))
    return html(
        Page(
            title=f"What does the server of {app['name']} learn?",
            question=document["risk"]["sentence"],
            threat=_THREAT,
            settings={
                "version": app["version"],
                "clients": app["nodes"],
                "rounds at most": app["rounds"],
                "replies": ", ".join(f"{count} {kind}" for kind, count in app["messages"].items()) or "none",
                **{f"run config: {key}": value for key, value in app["run_config"].items()},
                "seed": document["seed"],
                "minutes": document["minutes"],
                "files": f"{app['files']} (BLAKE2b of the app's Python files and pyproject.toml)",
                "to repeat it": document["repeat"],
                "expires": "when the app, its data, fedtap, Flower or torch change, and as attacks get better",
            },
            environment=document["versions"] | {"device": document["device"], "started": document["started"]},
            finished=document["finished"],
            columns=_COLUMNS,
            charts=charts,
            alarms=[f"{document['error']}"] * bool(document["error"])
            + [f"{count} replies were errors: {why}" for why, count in app["failures"].items()],
            notes=[f"{LEVELLED}.", f"The blind guess is made from {_BLIND_GUESS}."] if attacks else [],
        ),
        rows,
    )


def _crosswalk(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """What texts on privacy ask for that an audit may bear on, and what this one did of it."""
    attacked = document["risk"]["attacked"]
    opinion, untested = "EDPB Opinion 28/2024, paragraph 55", "not tested"
    noised = any(one["verdict"] == NOISED for one in document["exchanges"])
    told = [
        (opinion, "tests against reconstruction", f"{attacked} inputs attacked, in what clients send while they train"),
        (opinion, "tests against attribute and membership inference, exfiltration, regurgitation", untested),
        (opinion, "tests against inversion of the trained model", untested),
        ("NIST SP 800-226", "ε, δ and the unit of privacy", f"noise was seen, ε {untested}" if noised else untested),
        ("OWASP AISVS (draft), C11.3", "simulated membership inference", untested),
        ("OWASP AISVS (draft), C11.4", "resistance to inversion by queries to the model", untested),
    ]
    if not attacked:
        told[0] = (*told[0][:2], untested)
    return [{"text": text, "asks for": asks, "here": here} for text, asks, here in told]


def _exchange_row(one: Mapping[str, Any]) -> dict[str, Any]:
    sizes = Counter(one["batch_sizes"])
    row = {key: value for key, value in one.items() if key not in ("attacks", "batch_sizes", "input_range")}
    row["batches"] = ", ".join(f"{count} x {size}" for size, count in sizes.items()) or None
    ends = one["input_range"]
    row["inputs"] = None if ends is None else " to ".join(", ".join(f"{value:.3g}" for value in end) for end in ends)
    return row


def _attack_row(one: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    told = {"client": one["client"], "round": one["round"], "attack": row["attack"], "counts": row.get("chosen")}
    if "error" in row:
        return told | {"error": row["error"], "seconds": row["seconds"]}
    for column, key in (("recognisable", "levels"), ("blind", "blind_levels")):
        told[column] = f"{sum(level != LEVELS[0] for level in row[key])} of {len(row[key])}"
    told["labels"] = f"{row['label_correct']:.0%} (blind {row['blind_label_correct']:.0%})"
    return told | {key: row[key] for key in ("psnr", "blind_psnr", "unexplained", "seconds")}


def junit(document: Mapping[str, Any]) -> bytes:
    """The audit as test cases, for a build: one for the risk, and one for each exchange. Raw data and inputs that come
    back are failures; what was not understood is skipped; an audit that could not be done is an error."""
    suite = ElementTree.Element("testsuite", name="fedtap audit")
    cases = [("risk", "failure" if document["risk"]["level"] in COMES_BACK else "", document["risk"]["sentence"])]
    if document["error"]:
        cases = [("audit", "error", document["error"])]
    for one in document["exchanges"]:
        kind = {RAW: "failure", NOT_UNDERSTOOD: "skipped"}.get(one["verdict"], "")
        cases.append((f"round {one['round']}, client {one['client']}: {one['verdict']}", kind, one["reason"]))
    for name, kind, message in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=document["app"]["name"], name=name)
        if kind:
            ElementTree.SubElement(case, kind, message=message)
    for count, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(case[1] == kind for case in cases)))
    suite.set("tests", str(len(cases)))
    text: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return text
