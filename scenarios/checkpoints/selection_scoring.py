"""What chosen documents are worth: here they meet the private ones, beside random documents.

A model is retrained from the broadcast weights on what was chosen, as the clients trained, and compared on held-out
documents of the client's domain: with one that is retrained on random documents and with an expert, on private ones.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from fedtap.attackers.checkpoints.models import embedded, labels_for, model
from fedtap.scenarios.checkpoints.fine_tuned import candidate_order, evenly
from fedtap.simulator import scores
from fedtap.simulator.attack import generator
from fedtap.simulator.corpus import Selection
from fedtap.simulator.data.documents import Documents, concatenated, decoded
from fedtap.simulator.leaks import CheckpointLeak
from fedtap.simulator.models.adapters import inject
from fedtap.simulator.models.fine_tuning import FineTuning
from fedtap.simulator.models.text_model import IGNORED, TextModel
from fedtap.simulator.run import finite
from fedtap.simulator.scenario import Observed, Row, Scored, Trial

if TYPE_CHECKING:
    from fedtap.scenarios.checkpoints.selection import Selecting
    from fedtap.scenarios.checkpoints.tasks import Task

QUOTED = 3
"""Documents of each kind that a row quotes."""

LARGEST_LOSS = 700.0
"""Mean loss in nats above which a perplexity is no longer a number that fits."""

FEWEST_ASKED = 100
"""Others among candidates from which on 1 % of them is one at least."""

EMBEDDED = 500
"""Documents whose embeddings are compared, at most."""


@dataclass(frozen=True)
class TunedObserved(Observed):
    """Checkpoints, and what they are held against, which all attacks on a victim share."""

    baselines: dict[int, Row] = field(default_factory=dict, kw_only=True)
    """A victim's place in the leak -> its columns that no attack changes; filled in as they are measured."""


def scored(setting: Selecting, task: Task, trial: Trial) -> Scored:
    """A row for each victim."""
    found, leak, observed = trial.reconstruction, trial.leak, trial.observed
    assert isinstance(found, Selection)
    assert isinstance(leak, CheckpointLeak)
    assert isinstance(observed, TunedObserved)
    rows: list[Row] = []
    for place, (victim, number) in enumerate(observed.names):
        if place not in observed.baselines:
            observed.baselines[place] = baselines(setting, task, leak, place)
        row: Row = {"client": victim, "round": number} | observed.baselines[place]
        chosen = found.chosen[place]
        labels = None if _reader(leak).generative else found.labels[place]
        domains = [task.domain[client] for client in setting.behind(victim)]
        row["precision"] = float(torch.isin(task.domains[chosen], torch.tensor(domains)).double().mean())
        repeated = [Documents(task.corpus.ids[chosen], labels)] * setting.retrainings
        row |= retrained(setting, task, leak, place, repeated, setting.retraining)
        row |= {
            "recovered_fraction": recovered_fraction(row),
            "wasserstein": wasserstein(setting, task, leak, place, chosen),
        }
        if found.membership.shape[1]:
            asked = found.membership[place][candidate_order(setting).argsort()]
            members, others = asked.view(-1, 2, setting.candidates)[victim]
            row["membership_auc"] = scores.auc(members, others)
            enough = len(others) >= FEWEST_ASKED
            row["tpr_at_1"] = scores.true_positives(members, others, 0.01) if enough else None
        row["chosen"] = quoted(task, task.corpus.ids[chosen])
        rows.append(finite(row | {"objective": float(found.objective[place]), "error": None}))
    return Scored(rows)


def baselines(setting: Selecting, task: Task, leak: CheckpointLeak, place: int) -> Row:
    """A victim's columns that no attack changes: chance, and what random and private documents are worth."""
    victim = int(leak.clients[place])
    domains = torch.tensor([task.domain[client] for client in setting.behind(victim)])
    row: Row = {"chance": float(torch.isin(task.domains, domains).double().mean())}
    tuned = model(leak, leak.tuned(place), str(leak.device))
    sent = quality(tuned, _tested(setting, task, victim))
    row |= {f"sent_{name}": value for name, value in sent.items()}
    draws = [_drawn(setting, task, victim, number) for number in range(max(1, setting.retrainings))]
    random = [Documents(task.corpus.ids[drawn], labels_for(tuned, task.corpus.ids[drawn])) for drawn in draws]
    private = private_of(setting, task, victim)
    repeated = [private] * setting.retrainings
    for name, stacks, how in (("random", random, setting.retraining), ("expert", repeated, setting.tuning)):
        found = retrained(setting, task, leak, place, stacks[: setting.retrainings], how)
        row |= {f"{what}_{name}": value for what, value in found.items()}
    row |= {"private": quoted(task, private.ids), "random": quoted(task, task.corpus.ids[draws[0]])}
    return row | {"wasserstein_random": wasserstein(setting, task, leak, place, draws[0])}


def private_of(setting: Selecting, task: Task, victim: int) -> Documents:
    """As many private documents as a client has; of a sum, some of each of its clients'."""
    return evenly(setting, task.private, victim, setting.documents)


def _drawn(setting: Selecting, task: Task, victim: int, number: int) -> Int[Tensor, "selected"]:
    """As many random documents as are chosen."""
    draw = generator(setting.seed, "baseline", victim, *([number] if number else []))
    return torch.randperm(len(task.corpus), generator=draw)[: setting.selected]


def retrained(
    setting: Selecting,
    task: Task,
    leak: CheckpointLeak,
    place: int,
    stacks: Sequence[Documents],
    how: FineTuning,
) -> Row:
    """Perplexity or accuracy after training from the weights that a victim was sent; a mean over trainings, each with
    a seed and documents of its own."""
    tested, found = _tested(setting, task, int(leak.clients[place])), []
    for number, documents in enumerate(stacks):
        net = model(leak, leak.broadcast(place), str(leak.device)).requires_grad_(True)
        if setting.lora is not None:
            net = inject(net, setting.lora, number)
        how(net, documents.ids, documents.labels, generator(setting.seed, "retraining", number))
        found.append(quality(net, tested))
    return {name: statistics.fmean(one[name] for one in found) for name in (found[0] if found else ())}


def quality(net: TextModel, tested: Documents) -> dict[str, float]:
    """`perplexity` of documents, the exponential of the mean loss of a token; or a classifier's `accuracy`."""
    total, many, device = 0.0, 0, next(net.parameters()).device
    with torch.no_grad():
        for some in torch.split(torch.arange(len(tested)), 128):
            ids, labels = tested.ids[some].to(device), None if tested.labels is None else tested.labels[some].to(device)
            if labels is not None:
                total += int((net.logits(net.features(ids))[:, 0].argmax(1) == labels).sum())
                many += len(labels)
                continue
            places = (net.targets(ids, None) != IGNORED).sum(1)
            total += float((net.losses(ids, None).double() * places).sum())
            many += int(places.sum())
    return (
        {"perplexity": math.exp(total / many) if total / many < LARGEST_LOSS else math.inf}
        if tested.labels is None
        else {"accuracy": total / many}
    )


def recovered_fraction(row: Row) -> float | None:
    """(random - selected) / (random - expert); None where the expert is no better than random documents."""
    for name, sign in (("perplexity", 1), ("accuracy", -1)):
        if name in row:
            random, chosen, expert = (sign * row[column] for column in (f"{name}_random", name, f"{name}_expert"))
            return float((random - chosen) / (random - expert)) if random > expert else None
    return None


def wasserstein(
    setting: Selecting, task: Task, leak: CheckpointLeak, place: int, chosen: Int[Tensor, "selected"]
) -> float | None:
    """Wasserstein distance between chosen and private documents, by their mean features in the broadcast model; None
    where POT is not installed."""
    if importlib.util.find_spec("ot") is None:
        return None
    import ot

    net = model(leak, leak.broadcast(place), str(leak.device))
    private = private_of(setting, task, int(leak.clients[place]))
    one, other = (
        embedded(net, ids[:: max(1, len(ids) // EMBEDDED)].to(leak.device)).cpu().double().numpy()
        for ids in (task.corpus.ids[chosen], private.ids)
    )
    return float(ot.emd2([], [], ot.dist(one, other, metric="euclidean")))


def quoted(task: Task, ids: Int[Tensor, "documents tokens"]) -> list[str]:
    """The texts of the first documents."""
    return [decoded(task.vocabulary, one) for one in ids[:QUOTED]]


def _reader(leak: CheckpointLeak) -> TextModel:
    assert isinstance(leak.network, TextModel)
    return leak.network


def _tested(setting: Selecting, task: Task, victim: int) -> Documents:
    stacks = {id(task.tested[client]): task.tested[client] for client in setting.behind(victim)}  # some share theirs
    return concatenated([*stacks.values()])
