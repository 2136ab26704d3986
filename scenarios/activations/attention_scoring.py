"""Scores of attacks on an attention block's output: here reconstructions meet the inputs behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtap.attackers.activations.block import block_of, nearest_embeddings
from fedtap.simulator.leaks import Leak
from fedtap.simulator.scenario import Row, Trial
from fedtap.simulator.scores import relative_error

if TYPE_CHECKING:
    from fedtap.scenarios.activations.attention import Attention

STOPS = (*range(26), 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Steps after which an attack is looked at, for its chart."""

LARGE = 1024
"""Unknowns from which the Jacobian's condition is not computed."""


def attention_rows(setting: Attention, trial: Trial) -> list[Row]:
    """One a victim, in the leak's order."""
    leak, guess = trial.leak, trial.reconstruction
    truth, values = setting.truth(leak, trial.session.data_root).to(leak.device), guess.values.to(leak.device)
    errors = relative_error(values, truth)
    standard = relative_error(*map(_standard, (values, truth)))
    residual = relative_error(block_of(leak)(values), leak.observed["output"])
    path = _path(setting, trial, truth, errors)
    conditions, right = _conditions(leak, truth), _right(setting, leak, values)
    return [
        {
            "client": int(leak.clients[victim]),
            "relative_error": float(errors[victim]),
            "standardised_error": float(standard[victim]),
            "iterations": int(guess.iterations[victim]),
            "converged": bool(guess.converged[victim]),
            "objective": float(guess.objective[victim]),
            "residual": float(residual[victim]),
            "condition": conditions[victim],
            "tokens_right": right[victim],
            "path": [[stop, float(error[victim])] for stop, error in path.items()],
        }
        for victim in range(len(leak))
    ]


def _path(setting: Attention, trial: Trial, truth: Tensor, errors: Tensor) -> Mapping[int, Tensor]:
    """Steps -> the error after them, by playing the attack anew with so few; none from starts of its own."""
    leak, last = trial.leak, int(trial.reconstruction.iterations.max())
    start = setting.start(leak)
    if start is None or not hasattr(trial.attack, "steps"):
        return {}
    path = {0: relative_error(start, truth)}
    for stop in STOPS[1:]:
        if stop >= last:
            break
        fewer = dataclasses.replace(trial.attack, steps=stop)  # type: ignore[type-var]
        path[stop] = relative_error(fewer(leak, seed=setting.seed, start=start).values, truth)
    return path | {last: errors}


def _conditions(leak: Leak, truth: Tensor) -> list[float | None]:
    if truth[0].numel() > LARGE:
        return [None] * len(leak)
    block = block_of(leak)
    return [float(torch.linalg.cond(block.linearised(x[None])[1][0])) for x in truth]


def _right(setting: Attention, leak: Leak, values: Tensor) -> list[float | None]:
    """Share of the words that the nearest embeddings are."""
    if not setting.vocabulary:
        return [None] * len(leak)
    assert leak.weights is not None
    found = nearest_embeddings(block_of(leak), values, leak.weights["table"]).cpu()
    words = torch.stack([setting.words(client) for client in leak.clients.tolist()])
    return (found == words).double().mean(1).tolist()


def _standard(x: Tensor) -> Tensor:
    """Tokens of mean 0 and length 1: LayerNorm lets nothing else through."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True)  # type: ignore[no-any-return]
