"""What would change an app's risk: noise at an ε, larger batches, more local work, sums of clients; each is measured.

Noise and sums are computed from what was seen and attacked. What they and a changed run config cost is seen by playing
the app again with them, beside what its clients reported when it was played as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedtap.clients.mod import defended, mod_of
from fedtap.scenarios.audit.app import FlowerApp
from fedtap.scenarios.audit.observe import LocalBatch, LocalStep, LossCall
from fedtap.scenarios.audit.privacy import DELTA
from fedtap.scenarios.audit.verdict import GRADIENT, AuditedExchange
from fedtap.simulator.attack import generator
from fedtap.simulator.defences.accountant import noise_for
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.errors import FedtapError

EPSILONS = (8.0, 1.0)
"""ε of all planned rounds for which noise is tried."""

_TIMES = 4
"""How many times larger a batch or the number of local epochs or steps is tried."""

_BATCH = re.compile(r"(local|train|training)?[-_]?batch[-_]?size|batch", re.IGNORECASE)
_LOCAL = re.compile(r"(num[-_]?)?(local[-_]?)?(epochs?|steps|iterations)|local[-_]?(epochs?|steps)", re.IGNORECASE)
"""Keys of a run config that say how large a batch is, and how much a client trains in a round."""


@dataclass(frozen=True)
class Change:
    """A way to run the app otherwise."""

    told: str
    """In words."""
    overrides: tuple[str, ...] = ()
    """`key=value` of the run config."""
    defence: str = ""
    """What the client does to its update, in units of (before - after) / learning rate."""
    epsilon: float | None = None
    """ε of all planned rounds for a client, where it gives one."""


@dataclass
class ReportedMetrics:
    """What clients report of their models, for the number that says how well the app learns."""

    _seen: dict[str, dict[int, list[tuple[float, float]]]] = field(default_factory=dict)

    def note(self, message: Message, reply: Message, rnd: int) -> None:
        """Take a reply's metrics into account; those of an evaluation, and not of training."""
        if reply.has_error() or not message.metadata.message_type.startswith("evaluate"):
            return
        for record in reply.content.metric_records.values():
            plain = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
            weight = next((value for name, value in plain.items() if "examples" in name), 1.0)
            for name, value in plain.items():
                if "examples" not in name and math.isfinite(value):
                    self._seen.setdefault(name, {}).setdefault(rnd, []).append((value, weight))

    def last(self) -> tuple[str, int, float] | None:
        """Name, round and mean over the clients' examples of the metric that tells most: an accuracy, else a loss."""
        for kind in ("acc", "auc", "f1", "loss"):
            for name, rounds in self._seen.items():
                if kind in name.lower():
                    values = rounds[max(rounds)]
                    total = sum(weight for _, weight in values) or 1.0
                    return name, max(rounds), sum(value * weight for value, weight in values) / total
        return None


def changes_of(app: FlowerApp, exchange: AuditedExchange, rounds: int) -> tuple[list[Change], list[str]]:
    """What is tried, and what cannot be and why.

    Args:
        exchange: a client's, whose update's length is the clip.
        rounds: planned, over which ε composes.
    """
    tried, untried = [], []
    rate = exchange.training.learning_rate
    clip = _length(exchange) / rate
    if clip > 0 and not exchange.noise:
        for epsilon in EPSILONS:
            # rounds releases at distance clip are one at distance sqrt(rounds) clip
            sigma = noise_for(epsilon, DELTA, math.sqrt(rounds) * clip)
            told = (
                f"each update clipped to {clip * rate:.3g}, the length of one that was seen, with Gaussian noise of "
                f"{sigma * rate:.3g} on each weight: ε = {epsilon:g} at δ = {DELTA:g} for a client (add/remove) over "
                f"{rounds} rounds"
            )
            tried.append(Change(told, defence=f"clip({clip!r})+noise({sigma!r})", epsilon=epsilon))
    for pattern, what in ((_BATCH, "batch"), (_LOCAL, "number of local epochs or steps")):
        keys = [key for key, value in app.run_config.items() if pattern.fullmatch(key) and type(value) is int]
        if keys:
            value = int(app.run_config[keys[0]]) * _TIMES
            tried.append(Change(f"{keys[0]} = {value}", overrides=(f"{keys[0]}={value}",)))
        else:
            untried.append(f"another {what}: no key of the run config is known to set it")
    return tried, untried


def hidden(exchange: AuditedExchange, change: Change, seed: int) -> AuditedExchange:
    """The exchange with the change's defence on what was sent; the attacker is told of it."""
    rate = exchange.training.learning_rate
    names = [name for name in _parameters(exchange) if name in exchange.after]
    draw = generator(seed, "audit", change.told)
    before, after = ({name: side[name] for name in names} for side in (exchange.before, exchange.after))
    sent = defended(parse(change.defence).update, before, after, rate, draw)
    return dataclasses.replace(exchange, after={**exchange.after, **sent}, defence=change.defence)


def changed_client(app: FlowerApp, change: Change, exchange: AuditedExchange, seed: int) -> ClientAppCallable:
    """The app's client with the change's defence as a mod of its own, on the model's parameters alone.

    Args:
        exchange: one that was seen, which tells the order in which parameters travel.
    """
    if not change.defence:
        return app.client
    rate = exchange.training.learning_rate
    order, kept = list(exchange.after), set(_parameters(exchange))
    draw = generator(seed, "audit", "mod", change.told)

    def client(message: Message, context: Context) -> Message:
        records = list(message.content.array_records.values())
        raw = list(records[0]) if len(records) == 1 else []
        named = {sent for sent, name in zip(raw, order, strict=False) if name in kept}
        mod = mod_of(parse(change.defence).update, rate, named or None, draw)
        return mod(message, context, app.client)

    return client


def summed(exchanges: Sequence[AuditedExchange]) -> AuditedExchange:
    """The mean of several clients' gradients as one exchange, which is what secure aggregation shows.

    Raises:
        FedtapError: a client's update is not one step of SGD on one batch, or batches differ in size.
    """
    if len(exchanges) < 2:
        raise FedtapError("a sum of clients needs two that were understood in the same round")
    steps = [one.training.steps for one in exchanges]
    single = all(one.verdict == GRADIENT and len(one.training.batches) == 1 for one in exchanges)
    if not single or len({one.training.batches[0].count for one in exchanges}) > 1:
        raise FedtapError("a sum of several clients' updates, which attacks read where each is one step on one batch")
    batches = [one.training.batches[0] for one in exchanges]
    calls = [batch.losses[0] for batch in batches]
    targets = [call.target for call in calls]
    if not all(isinstance(one, Tensor) for one in targets) or any(len(batch.inputs) != 1 for batch in batches):
        raise FedtapError("a sum of clients: their inputs and targets are not one tensor each")
    if str(calls[0].options.get("reduction", "mean")) != "mean":
        raise FedtapError("a sum of clients: their loss is not a mean, of which the mean over clients would be one")
    options = {name: value for name, value in calls[0].options.items() if name != "target"}
    scores = torch.Size((sum(len(target) for target in targets), *calls[0].scores[1:]))
    loss = LossCall(calls[0].function, None, scores, (torch.cat(targets),), options)
    inputs = torch.cat([batch.inputs[0] for batch in batches])
    batch = LocalBatch((inputs,), len(inputs), batches[0].random, [loss], minimised=True)
    first = exchanges[0]
    training = dataclasses.replace(
        first.training, steps=[LocalStep(steps[0][0].optimiser, steps[0][0].groups, math.inf, [batch])]
    )
    mean = {
        name: sum((one.after[name].double() for one in exchanges), torch.zeros(())) / len(exchanges)
        for name in first.after
    }
    return dataclasses.replace(first, training=training, after={name: tensor.float() for name, tensor in mean.items()})


def _parameters(exchange: AuditedExchange) -> list[str]:
    assert exchange.training.start is not None
    return [name for name, _ in exchange.training.start.named_parameters()]


def _length(exchange: AuditedExchange) -> float:
    """L2 norm of the change of the weights."""
    names = [name for name in _parameters(exchange) if name in exchange.after]
    squares = [float((exchange.after[name].double() - exchange.before[name].double()).square().sum()) for name in names]
    return math.sqrt(sum(squares))


def metric_told(before: ReportedMetrics, after: ReportedMetrics) -> Mapping[str, Any]:
    """The metric as it was and with a change, where both are known of the same round."""
    one, other = before.last(), after.last()
    if one is None or other is None or one[:2] != other[:2]:
        return {"metric": None, "metric_as_it_is": None, "metric_changed": None}
    return {"metric": f"{one[0]}, round {one[1]}", "metric_as_it_is": one[2], "metric_changed": other[2]}
