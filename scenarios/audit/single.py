"""The app's training at its most exposed: one step on one input, computed from what was seen and not by the app.

Model, weights, loss and optimiser are the client's own; batch and steps are 1. It tells how far a larger batch and more
steps are what hides the inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedtap.scenarios.audit.observe import LocalBatch, LocalStep, LossCall
from fedtap.scenarios.audit.replay import check_replayable, replayed
from fedtap.scenarios.audit.verdict import GRADIENT, UPDATE, AuditedExchange


def single_steps(exchange: AuditedExchange, most: int) -> list[AuditedExchange]:
    """Exchanges of one step on one input, for the first inputs that it was trained on.

    Args:
        most: of them.

    Raises:
        NotReplayedError: the training cannot be replayed, or not on one input.
    """
    check_replayable(exchange.training)
    inputs = [(batch, place) for batch in exchange.training.batches for place in range(batch.count)]
    return [_single(exchange, batch, place) for batch, place in inputs[:most]]


def _single(exchange: AuditedExchange, batch: LocalBatch, place: int) -> AuditedExchange:
    step, count = exchange.training.steps[0], batch.count

    def one(value: Any) -> Any:
        """The row of what has one for each input."""
        rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
        return value[place : place + 1] if rows else value

    (call,) = batch.losses
    scores = torch.Size((1, *call.scores[1:])) if call.scores[:1] == (count,) else call.scores
    options = {name: one(value) for name, value in call.options.items() if name not in ("weight", "pos_weight")}
    kept = {name: value for name, value in call.options.items() if name in ("weight", "pos_weight")}
    loss = LossCall(call.function, None, scores, tuple(map(one, call.rest)), {**options, **kept})
    alone = LocalBatch(tuple(map(one, batch.inputs)), 1, batch.random, [loss], minimised=True)
    # without a norm that was seen, nothing is taken for a clip
    training = replace(exchange.training, steps=[LocalStep(step.optimiser, step.groups, float("inf"), [alone])])
    after, _ = replayed(training, exchange.before)
    sent = {name: after[name] for name in exchange.after}
    verdict = GRADIENT if step.optimiser is torch.optim.SGD else UPDATE
    return replace(exchange, verdict=verdict, training=training, after=sent, replay_error=None)
