"""The page of an audit: the risk in two sentences, what was audited, what was tried and what was not, the evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
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

_VALID = 183
"""Days after which an audit is out of date, if nothing has changed before."""

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


_CHANGES = (
    Column("change", over="rows"),
    Column("ε", "of all planned rounds, for a client", over="rows"),
    Column("attacked", "what the change was measured on", over="rows"),
    *(column for column in _ATTACKS if column.name in ("recognisable", "psnr", "labels")),
    Column("metric", "that clients report of their evaluation, a mean over them, of one run each", over="rows"),
    Column("as it is", over="rows", form=".4g"),
    Column("changed", over="rows", form=".4g"),
    Column("error", over="rows"),
)

_CAPABILITIES = (
    ("reads what each client sends", True),
    ("knows the weights that it sent", True),
    ("knows model, loss, optimiser, steps, batch and input range", True),
    ("has public data of the same kind", False),
    ("sends other weights or another model than the app does (malicious server)", False),
    ("puts several rounds together", False),
    ("colludes with clients, or runs some", False),
    ("sees sums of clients alone (secure aggregation)", None),
)
"""What an attacker may be able to do, and whether it was here; None where it is tried as a change."""

_CAPABILITY = (Column("capability of the attacker", over="rows"), Column("tested", over="rows"))

_PRIVACY = (Column("of the noise", over="rows"), Column("is", over="rows"))

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
    if changes := document["changes"]:
        rows_changed = sorted(map(_change_row, changes), key=_by_risk)
        table = listing(*single([row for _, row in rows_changed], _CHANGES))
        told = f"<p>{escape(_of_changes(document))}</p>{table}"
        charts["What would change it"] = charts.get("What would change it", "") + told
    if pictures and charts:
        charts[list(charts)[-1]] += gallery(pictures, _BLIND_GUESS)
    if privacy := document["privacy"]:
        charts["Differential privacy"] = listing(*single(_privacy_rows(privacy), _PRIVACY))
    able = [
        {"capability of the attacker": name, "tested": {True: "yes", False: "no", None: "as a change"}[tested]}
        for name, tested in _CAPABILITIES
    ]
    charts["What the attacker can do"] = listing(*single(able, _CAPABILITY))
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
                "expires": f"{_expires(document['started'])}, as attacks get better; before that when the app, its "
                "data, fedtap, Flower or torch change",
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


def _change_row(one: Mapping[str, Any]) -> tuple[tuple[float, float], dict[str, Any]]:
    """What a change is sorted by, the share that comes back and what the metric loses, and its row."""
    best = best_explained(one["attacks"])
    shown = {column.name for column in _CHANGES}
    row = {key: value for key, value in (_attack_row(one, best) if best else {}).items() if key in shown}
    before, after = one.get("metric_as_it_is"), one.get("metric_changed")
    row |= {"change": one["change"], "ε": one.get("epsilon"), "metric": one.get("metric"), "error": one.get("error")}
    row |= {"as it is": before, "changed": after}
    row["attacked"] = "one step on one input" if one.get("single") else f"client {one.get('client')}"
    share = sum(level != LEVELS[0] for level in best["levels"]) / len(best["levels"]) if best else 1.0
    lost = 0.0 if before is None or after is None else (after - before if "loss" in one["metric"] else before - after)
    return (share, lost), row


def _by_risk(one: tuple[tuple[float, float], Mapping[str, Any]]) -> tuple[float, float]:
    return one[0]


def _of_changes(document: Mapping[str, Any]) -> str:
    """What the changes are measured on, and in what order they stand."""
    alone = [row for one in document["single_steps"] if (row := best_explained(one["attacks"]))]
    back = document["risk"]["level"] in COMES_BACK or any(set(row["levels"]) != {LEVELS[0]} for row in alone)
    first = (
        "Changes, those first after which least comes back, and of these those that cost least of the metric. "
        if back
        else "Nothing comes back of the app as it is, so no change can be seen to take risk away; its cost is seen. "
    )
    return first + (
        "Noise and sums are computed from what was seen and attacked by attackers who know of them; the metric is that "
        "of the app played again. In production the noise is a client mod, `fedtap.clients.mod.mod_of`."
    )


def _privacy_rows(privacy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ε and what it is about, one line each."""

    def number(value: float | None) -> str:
        return "∞" if value is None else f"{value:.4g}"

    told = {"mechanism": privacy["mechanism"]}
    if "announced" in privacy:
        told["as announced"] = privacy["announced"]
    if "note" in privacy:
        return [{"of the noise": key, "is": value} for key, value in (told | {"ε": privacy["note"]}).items()]
    told |= {
        "ε of one round": number(privacy["epsilon_of_one_round"]),
        f"ε of {privacy['rounds']} rounds": number(privacy["epsilon"]),
    }
    if "epsilon_sampled" in privacy:
        told["if batches are Poisson samples"] = (
            f"{number(privacy['epsilon_sampled'])}, each example being in a batch with probability "
            f"{privacy['sample_rate']:.3g}"
        )
    told |= {"δ": f"{privacy['delta']:g}", "unit": privacy["unit"], "adjacency": privacy["adjacency"]}
    return [
        {"of the noise": key, "is": value} for key, value in (told | {"not covered": privacy["not_covered"]}).items()
    ]


def _expires(started: str) -> str:
    """A date half a year on."""
    return f"{datetime.fromisoformat(started) + timedelta(days=_VALID):%Y-%m-%d}"


def _crosswalk(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """What texts on privacy ask for that an audit may bear on, and what this one did of it."""
    attacked = document["risk"]["attacked"]
    opinion, untested = "EDPB Opinion 28/2024, paragraph 55", "not tested"
    privacy = document["privacy"]
    epsilon = (
        untested if privacy is None or privacy["epsilon"] is None else f"ε = {privacy['epsilon']:.3g}, stated here"
    )
    told = [
        (opinion, "tests against reconstruction", f"{attacked} inputs attacked, in what clients send while they train"),
        (opinion, "tests against attribute and membership inference, exfiltration, regurgitation", untested),
        (opinion, "tests against inversion of the trained model", untested),
        ("NIST SP 800-226", "ε, δ and the unit of privacy", epsilon),
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
