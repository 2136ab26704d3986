"""What an exchange of an app is, and why: raw data, a gradient, an update, noised, masked, or not understood."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedtap.scenarios.audit.observe import LocalTraining
from fedtap.scenarios.audit.replay import NotReplayedError, replayed
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Tensors, own_names
from fedtap.simulator.wire.recorder import by_name
from fedtap.simulator.wire.records import tensors_of

RAW, GRADIENT, UPDATE, NOISED, MASKED, NOT_UNDERSTOOD = VERDICTS = (
    "raw data",
    "gradient",
    "update",
    "noised",
    "masked",
    "not understood",
)
"""What an exchange may be."""

REPLAYED = 1e-3
"""Relative error of the replayed update up to which all that shaped the reply was seen; float32's rounding is added."""

_MASKED_KEY, _STAGE_KEY = "masked_params", "stage"
"""Names in Flower's records by which SecAgg+ is recognised."""

_LIST = 16
"""Numbers in a list of a record from which on it is data and no metric."""

_BYTES = 64
"""Length of a record's bytes from which on they could hold an example."""

_ENTRIES, _ALIKE, _TAILS = 64, 0.25, 0.5
"""A tensor counts in the test for noise from this many entries; standard deviations of tensors differ by this share at
most, and the excess kurtosis of all entries is this at most, if one Gaussian noise was added to all of them."""


@dataclass(frozen=True)
class AuditedExchange:
    """A message and its reply, and what is known of what lies between them."""

    client: int
    """Partition of the client."""
    round: int
    """The federation's round, from 1; 0 before the first."""
    verdict: str
    """One of VERDICTS."""
    reason: str
    """Why, in a sentence or two."""
    training: LocalTraining = field(default_factory=LocalTraining)
    """What the client was seen to do."""
    before: Tensors = field(default_factory=dict)
    """Weights that it was sent, under the model's names."""
    after: Tensors = field(default_factory=dict)
    """Weights that it sent back."""
    replay_error: float | None = None
    """Relative error of the update that the replay makes; None where there is no replay."""
    noise: float = 0.0
    """Standard deviation of what each weight of the reply is apart from the replay, where that is noise; 0 if none."""
    defence: str = ""
    """The defence that an attack is told of, in units of (before - after) / learning rate; empty for `noise` alone."""
    hindrance: str = ""
    """Why no attack is told enough of a gradient or an update to be tried; empty where one may be."""

    @property
    def attackable(self) -> bool:
        """Whether it was understood and attacks may be tried."""
        known = self.verdict in (GRADIENT, UPDATE) or (self.verdict == NOISED and self.noise > 0)
        return known and not self.hindrance

    def told(self) -> dict[str, Any]:
        """As audit.json has it, without input range and attacks."""
        steps = self.training.steps
        group = steps[0].groups[0] if steps and steps[0].groups else {}
        losses = dict.fromkeys(call.name for batch in self.training.batches for call in batch.losses)
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "client": self.client,
            "round": self.round,
            "model": None if self.training.start is None else type(self.training.start).__name__,
            "steps": len(steps),
            "batch_sizes": [batch.count for batch in self.training.batches],
            "optimiser": steps[0].optimiser.__name__ if steps else None,
            "learning_rate": _number(group.get("lr")),
            "momentum": _number(group.get("momentum", 0.0)) if steps else None,
            "loss": " + ".join(losses) or None,
            "replay_error": self.replay_error,
        }


def judged(message: Message, reply: Message, training: LocalTraining, client: int, rnd: int) -> AuditedExchange | None:
    """What this exchange is; None where nothing but single numbers or a protocol's own words came back."""
    content, found = reply.content, AuditedExchange(client, rnd, NOT_UNDERSTOOD, "", training)
    if any(_MASKED_KEY in record for record in content.config_records.values()):
        reason = "SecAgg+ masks the reply: the server reads the sum of all clients' vectors and no client's own."
        return replace(found, verdict=MASKED, reason=reason)
    if any(_STAGE_KEY in record for record in message.content.config_records.values()):
        return None  # keys and shares of secure aggregation
    try:
        sent = {key: tensors_of(record) for key, record in content.array_records.items() if len(record)}
        asked = {key: tensors_of(record) for key, record in message.content.array_records.items() if len(record)}
    except Exception as error:  # the bytes are a client's, and numpy raises what it likes about them
        return replace(found, reason=f"The reply holds arrays that cannot be read ({short(error, 80)}).")
    if data := _strange(sent, asked, training, message.metadata.message_type) or _lists(content):
        reason = f"The server reads what is no parameter of the model, as it is: {', '.join(data[:3])}."
        return replace(found, verdict=RAW, reason=reason)
    if not sent:
        unread = _bytes(content)
        return replace(found, reason=f"The reply holds {unread[0]}, which fedtap cannot read.") if unread else None
    if not asked:  # the first weights, which Flower's legacy API asks a client for
        return None
    return _of_weights(asked, sent, found)


def _bytes(content: RecordDict) -> list[str]:
    """Bytes that are long enough to hold an example."""
    return [
        f"{len(value):,} bytes under {short(name, 30)}"
        for record in content.config_records.values()
        for name, value in record.items()
        if isinstance(value, bytes) and len(value) >= _BYTES
    ]


def _of_weights(
    asked: dict[str, dict[str, Tensor]], sent: dict[str, dict[str, Tensor]], found: AuditedExchange
) -> AuditedExchange:
    """A reply that holds arrays which the server had sent, changed; `found` says whose it is."""
    before, after = max(asked.values(), key=_numbers), max(sent.values(), key=_numbers)
    training = found.training
    if _unchanged(before, after) and not training.steps:
        return replace(found, reason="The client sent back what it was sent: it trained nothing.")
    if training.start is None:
        travels = ", ".join(f"{short(name, 30)} of {_size(tensor)}" for name, tensor in list(after.items())[:4])
        reason = (
            f"No training of a torch model was seen, and yet the weights changed: the client does not use torch, or "
            f"trains in another process, and no attack here suits. Arrays that travel: {travels}."
        )
        return replace(found, reason=reason)
    try:
        before, after = (_named(side, training) for side in (before, after))
    except FedtapError as error:
        return replace(found, reason=f"The arrays of the reply are not those of the model: {error}")
    found = replace(found, before=before, after=after)
    try:
        again, changed = replayed(training, before)
        found = replace(found, after=_weights(before, after, again))
    except NotReplayedError as error:
        verdict = NOISED if _private(training) else NOT_UNDERSTOOD
        return replace(found, verdict=verdict, reason=f"{_private(training)}Replay cannot check the reply: {error}.")
    return _compared(found, again, changed)


def _compared(found: AuditedExchange, again: Tensors, changed: str) -> AuditedExchange:
    """The verdict on weights that could be replayed.

    Args:
        again: the state that the replay ends in.
        changed: what changed the gradients on the way.
    """
    before, after, training = found.before, found.after, found.training
    assert training.start is not None
    names = [name for name in after if name in before and name in again and after[name].is_floating_point()]
    update, mine = _moved(before, after, again)
    size = float(update.norm())
    error = float((update - mine).norm()) / size if size else 1.0
    rounding = 4 * torch.finfo(torch.float32).eps * float(_flat(after, names).norm()) / max(size, 1e-30)
    if not size:
        return replace(found, reason="The client trained, and yet it sent back what it was sent.", replay_error=error)
    one = len(training.steps) == 1 and training.steps[0].optimiser is torch.optim.SGD
    found = replace(found, verdict=GRADIENT if one else UPDATE, replay_error=error)
    if _private(training):
        reason = f"{_private(training)}The reply is apart from the same training without that by {error:.2g} of itself."
        return replace(found, verdict=NOISED, reason=reason, noise=_rms(update - mine))
    if error <= max(REPLAYED, rounding):
        kept = [name for name, _ in training.start.named_parameters() if name not in after]
        more = f" On the way {changed}." if changed else ""
        more += f" {len(kept)} parameters stay with the client ({', '.join(kept[:2])})." if kept else ""
        hindrance = f"{changed}, of which no attack is told" if changed else ""
        if kept:
            hindrance = "the update is partial, and the server does not know the parameters that stay with the client"
        return replace(found, reason=f"Replay of {_steps(training)} gives what was sent.{more}", hindrance=hindrance)
    # the part of what was sent that points along the trained update: <sent, trained> / |trained|^2
    scale = float(update @ mine / mine.square().sum()) if float(mine.norm()) else 0.0
    rest = update - scale * mine
    if float(rest.norm()) <= REPLAYED * size:
        reason = f"The reply is {scale:.3g} times the update that was trained: it was clipped or scaled afterwards."
        return replace(found, reason=reason, hindrance="no attack is told the factor by which the update was scaled")
    if deviation := _gaussian(rest, [before[name].numel() for name in names]):
        reason = (
            f"The reply holds what looks like Gaussian noise of standard deviation {deviation:.2g} in every weight, "
            f"{float(rest.norm() / mine.norm()):.2g} times as long as the trained update."
        )
        return replace(found, verdict=NOISED, reason=reason, noise=deviation)
    reason = (
        f"The reply is not what the training that was seen makes, but apart from it by {error:.2g} of itself: it was "
        "changed afterwards, or part of the training was not seen."
    )
    return replace(found, verdict=NOT_UNDERSTOOD, reason=reason)


def _private(training: LocalTraining) -> str:
    """A sentence on DP-SGD, where the model was wrapped for it; empty where not."""
    if training.wrapper.startswith("opacus."):
        return "The client trains with Opacus, which clips each example's gradient and adds noise (DP-SGD). "
    return ""


def _steps(training: LocalTraining) -> str:
    count, name = len(training.steps), training.steps[0].optimiser.__name__
    return f"{count} step{'s' * (count != 1)} of {name}"


def _named(tensors: dict[str, Tensor], training: LocalTraining) -> dict[str, Tensor]:
    """Under the names that the trained model has for them; they may be those of one of its parts.

    Raises:
        FedtapError: they are of no part of the model.
    """
    assert training.start is not None
    for prefix, part in training.start.named_modules():
        state = part.state_dict()
        try:
            own = own_names(by_name(tensors, part), part)
        except FedtapError:  # a list of another length than the part's state
            continue
        if own and all(name in state and state[name].shape == tensor.shape for name, tensor in own.items()):
            return {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in own.items()}
    name, tensor = next(iter(tensors.items()))
    raise FedtapError(f"no part of {type(training.start).__name__} has {short(name, 30)} of {_size(tensor)}.")


def _moved(before: Tensors, after: Tensors, again: Tensors) -> tuple[Tensor, Tensor]:
    """The update that was sent and the one that was replayed, each in one row, of the tensors that both have."""
    names = [name for name in after if name in before and name in again and after[name].is_floating_point()]
    sent, mine = (_flat({name: side[name].double() - before[name] for name in names}) for side in (after, again))
    return sent, mine


def _weights(before: Tensors, after: Tensors, again: Tensors) -> Tensors:
    """What the client's weights are, where it sends them or their difference to those that it was sent: whichever is
    nearer to the replay."""
    both = {name: before[name].double() + after[name].double() for name in after if name in before}
    apart = [float((sent - mine).norm()) for sent, mine in (_moved(before, side, again) for side in (after, both))]
    return after if apart[0] <= apart[1] else both


def _strange(
    sent: dict[str, dict[str, Tensor]], asked: dict[str, dict[str, Tensor]], training: LocalTraining, kind: str
) -> list[str]:
    """Arrays that are neither the model's nor of the name and shape of any that the client was sent."""
    if not asked and not kind.startswith("query"):
        return []
    known = {(name, tuple(tensor.shape)) for record in asked.values() for name, tensor in record.items()}
    if training.start is not None:
        known |= {(name, tuple(tensor.shape)) for name, tensor in training.start.state_dict().items()}
    return [
        f"{short(name, 30)} of {_size(tensor)}"
        for record in sent.values()
        for name, tensor in record.items()
        if (name, tuple(tensor.shape)) not in known and tensor.numel() > 1
    ]


def _lists(content: RecordDict) -> list[str]:
    """Lists of a record that are long enough to be data."""
    records: list[Any] = [*content.metric_records.values(), *content.config_records.values()]
    return [
        f"{short(name, 30)}, a list of {len(value)}"
        for record in records
        for name, value in record.items()
        if isinstance(value, list) and len(value) >= _LIST
    ]


def _gaussian(rest: Tensor, sizes: list[int]) -> float | None:
    """Standard deviation of the entries, if they look like one Gaussian noise on all tensors; None if not."""
    parts = [part for part in torch.split(rest, sizes) if len(part) >= _ENTRIES]
    if not parts:
        return None
    every = torch.cat(parts)
    whole = float(every.std())
    if not whole or any(abs(float(part.std()) / whole - 1) > _ALIKE for part in parts):
        return None
    excess = float(((every - every.mean()) / whole).pow(4).mean()) - 3
    return whole if abs(excess) <= _TAILS else None


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0


def _unchanged(before: Tensors, after: Tensors) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def _numbers(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _flat(tensors: Tensors, names: list[str] | None = None) -> Tensor:
    parts = [tensors[name].double().flatten() for name in (tensors if names is None else names)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "1"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | Tensor) else None
