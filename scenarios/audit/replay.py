"""The audit's check of itself: the steps that were seen, done once more from the weights that were sent.

If the result is what the client replied with, the audit has seen all that shaped the reply. If not, something else did:
noise, a clip, a second model, a client that does not send what it trained.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtap.scenarios.audit.observe import LocalBatch, LocalStep, LocalTraining
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Tensors

_SAME_NORM = 1e-3
"""Relative difference of two lengths of a gradient from which on it was changed between `backward` and the step."""


class NotReplayedError(FedtapError):
    """What was seen is not enough to do it once more; the sentence says what is lacking."""


def replayed(training: LocalTraining, broadcast: Tensors) -> tuple[dict[str, Tensor], str]:
    """The model's state after the steps that were seen, by name, and what changed the gradients, if anything did.

    Args:
        broadcast: the weights that the client was sent, under the model's names; what is not among them is as the
            client had it.

    Raises:
        NotReplayedError: part of it was not seen.
    """
    check_replayable(training)
    net = copy.deepcopy(training.start)
    assert net is not None
    net.load_state_dict(dict(broadcast), strict=False)
    changed = ""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            optimiser = _optimiser(net, training.steps[0])
            for step in training.steps:
                changed = _again(net, optimiser, step) or changed
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise NotReplayedError(f"its steps cannot be done once more ({short(error, 120)})") from error
    return net.state_dict(), changed


def check_replayable(training: LocalTraining) -> None:
    """Refuse what was not seen whole.

    Raises:
        NotReplayedError: naming what is lacking.
    """
    steps, batches = training.steps, training.batches
    if training.start is None or not steps:
        raise NotReplayedError("no training of a torch model was seen")
    if not training.whole:
        raise NotReplayedError("it trained on more than is kept in memory")
    if not batches:
        raise NotReplayedError("its optimiser made steps, but the model was not called as a whole")
    if len({step.optimiser for step in steps}) > 1:
        raise NotReplayedError("it trains with several optimisers")
    if not all(batch.minimised for batch in batches):
        raise NotReplayedError(
            "what it minimises is not the value of one loss function of torch alone, but has terms that are not seen"
        )


def _optimiser(net: nn.Module, step: LocalStep) -> torch.optim.Optimizer:
    known = inspect.signature(step.optimiser).parameters
    groups = [
        {key: value for key, value in group.items() if key in known}
        | {"params": [net.get_parameter(name) for name in group["names"]]}
        for group in step.groups
    ]
    first = {key: value for key, value in groups[0].items() if key != "params"}
    return step.optimiser(groups, **first)


def _again(net: nn.Module, optimiser: torch.optim.Optimizer, step: LocalStep) -> str:
    """One step; what changed the gradient, where its length was another than it is here."""
    for group, seen in zip(optimiser.param_groups, step.groups, strict=True):
        group.update({key: seen[key] for key in group.keys() & seen.keys() - {"params"}})
    optimiser.zero_grad()
    for batch in step.batches:
        torch.set_rng_state(batch.random)
        _loss(net, batch).backward()  # type: ignore[no-untyped-call]
    gradients = [one.grad for group in optimiser.param_groups for one in group["params"] if one.grad is not None]
    norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    changed = ""
    if norm > 0 and step.norm < norm * (1 - _SAME_NORM):  # clip_grad_norm_: the same direction, and shorter
        for gradient in gradients:
            gradient.mul_(step.norm / norm)
        changed = f"the gradient was clipped, in one step to a length of {step.norm:.3g}"
    optimiser.step()
    return changed


def _loss(net: nn.Module, batch: LocalBatch) -> Tensor:
    (call,) = batch.losses
    output = net(*batch.inputs)
    candidates = output if isinstance(output, tuple | list) else [output]
    if isinstance(output, Mapping):
        candidates = list(output.values())
    for one in candidates:
        if isinstance(one, Tensor) and one.numel() == call.scores.numel():
            options: dict[str, Any] = dict(call.options)
            return call.function(one.reshape(call.scores), *call.rest, **options)
    raise ValueError("the loss was not computed from the model's output alone")
