"""Flower's own places for noise as mechanisms: a client mod, and a strategy that clips and adds noise around another.

A mod is called with a message that holds zeros and a reply that holds the update, so that what it sends is the update
as the server observes it. A strategy is given the replies of all clients of a round, of which one is the canary, and
what is observed is the model that it hands on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import (
    DEFAULT_TTL,
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from fedtap.scenarios.audit_dp.promise import promised_by, promised_by_multiplier
from fedtap.scenarios.audit_dp.target import MOD, AuditedUpdate, Mechanism, quiet
from fedtap.simulator.errors import FedtapError, short

_EXAMPLES = "num-examples"
"""The metric by which FedAvg weighs replies."""

_KEY_OF_CLIP = "clipping_norm"
"""The entry of a message's config by which Flower's strategies tell clients the norm to clip to."""

_COUNTER = "bn.num_batches_tracked"
"""BatchNorm's counter, a tensor without an axis."""

_OTHERS = 7
"""Clients of a round beside the canary, where a strategy does not say how many it samples."""


def _message(content: RecordDict) -> Message:
    """A train message of no run."""
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, DEFAULT_TTL, MessageType.TRAIN)
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def _record(update: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.array(tensor.numpy())) for name, tensor in update.items()})


def of_mod(mod: Any, said: Mapping[str, Any], name: str) -> Mechanism:
    """A mod as a mechanism.

    Raises:
        FedtapError: it cannot be called, or does not reply.
    """
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    promised = promised_by(mod)
    clip = float(said.get("clip") or promised.get("clip") or 1.0)

    def call(update: AuditedUpdate) -> dict[str, Any]:
        config = ConfigRecord({_KEY_OF_CLIP: clip})
        zeros = {key: torch.zeros_like(value) for key, value in update.items()}
        order = _message(RecordDict({"arrays": _record(zeros), "config": config}))

        def client(order: Message, context: Context) -> Message:
            metrics = MetricRecord({_EXAMPLES: 1})
            return _message(RecordDict({"arrays": _record(update), "metrics": metrics}))

        with quiet():
            reply = mod(order, context, client)
        if not isinstance(reply, Message):
            raise FedtapError(
                f"{short(name)} returns a {type(reply).__name__} and no message, so it is no mod: name a function of "
                "one update, or a mod of (message, context, call_next)."
            )
        if reply.has_error():
            raise FedtapError(
                f"{short(name)} replies with an error ({short(reply.error.reason, 120)}): it needs a state that it "
                "does not get here."
            )
        return _seen(reply.content)

    mechanism = Mechanism(call, _weights(), attributes=promised, kind=MOD)
    mechanism.release({name: torch.full_like(tensor, 1e-3 * clip) for name, tensor in mechanism.template.items()})
    mechanism.notes += _of_counters(call)
    return mechanism


def _weights() -> AuditedUpdate:
    """The update of a layer and of what BatchNorm keeps, without its counter."""
    return {"fc.weight": torch.zeros(16, 40), "fc.bias": torch.zeros(16), "bn.running_mean": torch.zeros(16)}


def _of_counters(call: Callable[[AuditedUpdate], dict[str, Any]]) -> list[str]:
    """A note, if a number without an axis, such as BatchNorm's counter, is sent as it is: it is beside the verdict."""
    try:
        sent = call(_weights() | {_COUNTER: torch.tensor(1000)})
    except (FedtapError, TypeError, ValueError, ArithmeticError):
        return []
    if float(np.asarray(sent.get(_COUNTER, 0.0))) != 1000:
        return []
    return [
        f"a tensor without an axis ({_COUNTER}, which every BatchNorm has) is neither clipped nor noised by it and "
        "travels in the clear: the verdict is about the other tensors"
    ]


def _seen(content: RecordDict) -> dict[str, Any]:
    """What a server reads of a reply: arrays by name, and each metric."""
    found: dict[str, Any] = {}
    for record in content.array_records.values():
        found |= {name: np.array(array.numpy()) for name, array in record.items()}
    for metrics in content.metric_records.values():
        found |= {f"metric {name}": np.asarray(value, float) for name, value in metrics.items()}
    return found


def is_strategy(found: object) -> bool:
    """Whether it is a strategy of Flower's Message API."""
    from flwr.serverapp.strategy import Strategy

    return isinstance(found, Strategy)


def of_strategy(strategy: Any, said: Mapping[str, Any]) -> Mechanism:
    """A strategy with noise as a mechanism: one client's update in, the new model's difference out.

    All other clients send zeros. The promise is read from its noise multiplier z: Gaussian noise of deviation z times
    the clip on a sum.

    Raises:
        FedtapError: it adds no noise that its attributes tell of.
    """
    multiplier = getattr(strategy, "noise_multiplier", None)
    clip = getattr(strategy, "clipping_norm", None)
    if not isinstance(multiplier, int | float) or not isinstance(clip, int | float):
        raise FedtapError(
            f"No mechanism was found in {type(strategy).__name__}: it has no noise_multiplier and clipping_norm; name "
            "a strategy that wraps another with clipping and noise."
        )
    clients = int(getattr(strategy, "num_sampled_clients", _OTHERS + 1))
    number = [0]
    others: list[Message] = []
    by_clients = "ClientSide" in type(strategy).__name__

    def call(update: AuditedUpdate) -> dict[str, Any]:
        number[0] += 1
        zeros = {key: torch.zeros_like(value) for key, value in update.items()}
        # Flower's clip divides by the length of a change, so clients that do not move do so by next to nothing
        still = {key: torch.full_like(value, 1e-12) for key, value in zeros.items()}
        absent = all(not bool(value.any()) for value in update.values())
        own = still if absent else update
        if by_clients:
            own = _clipped(own, float(clip))
        one = copy.copy(strategy)
        one.current_arrays = _record(zeros)
        if getattr(one, "_pending_events", None) is not None:
            one._pending_events = {number[0]: None}
        if not others:
            others.extend(_reply(still) for _ in range(clients - 1))
        replies = [_reply(own), *others]
        with quiet():
            arrays, _ = one.aggregate_train(number[0], replies)
        if arrays is None:
            raise FedtapError(
                f"{type(strategy).__name__} aggregates nothing from {clients} replies: see what it needs of them."
            )
        found: dict[str, Any] = {key: np.array(array.numpy()) for key, array in arrays.items()}
        if one.clipping_norm != clip:
            found["next clipping norm"] = np.asarray(one.clipping_norm, float)
        return found

    def _reply(tensors: AuditedUpdate) -> Message:
        metrics: dict[str, Any] = {_EXAMPLES: 1}
        if by_clients and "Adaptive" in type(strategy).__name__:
            metrics["norm_bit"] = float(sum(float(one.square().sum()) for one in tensors.values()) >= clip**2 * 0.999)
        return _message(RecordDict({"arrays": _record(tensors), "metrics": MetricRecord(metrics)}))

    counted = getattr(strategy, "clipped_count_stddev", None)
    if counted:  # the count of clipped updates is released too: 1/z² = 1/z'² + 1/(2 σ_b)² (1905.03871, theorem 1)
        multiplier = (multiplier**-2 + (2 * counted) ** -2) ** -0.5
    mechanism = Mechanism(call, _weights(), kind="strategy")
    if multiplier > 0:
        mechanism.attributes = promised_by_multiplier(float(multiplier), float(clip), "client", said)
    else:
        mechanism.attributes = {"clip": float(clip)}
    mechanism.notes.append(
        f"{clients} clients a round with the same number of examples each; FedAvg weighs by that number, and a client "
        "that claims more moves the model farther"
    )
    fraction = getattr(getattr(strategy, "strategy", None), "fraction_train", 1.0)
    if isinstance(fraction, int | float) and 0 < fraction < 1:
        mechanism.notes.append(
            f"fraction_train is {fraction:g}, and Flower draws that number of clients in each round: no amplification "
            f"is claimed for it, and if each client took part by a coin of its own, --rate {fraction:g} would say what "
            "the rounds add up to"
        )
    return mechanism


def _clipped(update: AuditedUpdate, clip: float) -> AuditedUpdate:
    """As Flower's client mod clips it."""
    length = float(sum(value.double().square().sum() for value in update.values())) ** 0.5
    factor = min(1.0, clip / max(length, 1e-300))
    return {name: value * factor for name, value in update.items()}
