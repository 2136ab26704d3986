"""A gradient captured elsewhere, as a leak: one's own model, and what `torch.autograd.grad` returned for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import GradientLeak, Protocol, float_buffers, own_names
from fedtap.simulator.models.registry import Shape, on_meta

Captured = Mapping[str, Tensor | None] | Sequence[Tensor | None]
"""One victim's gradient, by the parameters' names or in their order; None where a parameter was not used."""


def leak(
    model: nn.Module,
    gradients: Captured | Sequence[Captured],
    *,
    shape: Shape,
    classes: int | None = None,
    batch: int = 1,
    weights: Mapping[str, Tensor] | None = None,
    name: str = "",
    **terms: Any,
) -> GradientLeak:
    """The leak of one victim, or of several at the same weights: `leak(model, grads, shape=(3, 32, 32))`.

    Args:
        model: at the weights at which the gradients were taken; it is copied, and stays as it is.
        gradients: of the mean cross-entropy over a victim's batch: a list in the order of `model.parameters()`, as
            `torch.autograd.grad` returns it, or a mapping by name; of several victims, a list of these.
        shape: of one input, without the batch: channels, height, width of an image.
        classes: how many logits the model has; counted where not given.
        batch: examples behind each gradient.
        weights: those of the model, where it has others by now; name -> tensor.
        name: of the model in rows; `module:function` lets `fedtap attack` build it again. Its class's where not given.
        terms: further terms of the protocol (`fedtap.simulator.leaks.Protocol`): `defence="noise(0.01)"`, …

    Raises:
        FedtapError: the model does not take such an input, or the gradients are not those of its parameters.
    """
    model = unwrapped(model)
    name = name or type(model).__name__
    logits = _logits(model, shape, name)
    if classes not in (None, logits):
        raise FedtapError(f"Model {short(name)!r} returns {logits} logits and not {classes}: leave classes out.")
    one = isinstance(gradients, Mapping) or all(part is None or isinstance(part, Tensor) for part in gradients)
    each = [gradients] if one else gradients
    victims = [_named(model, part) for part in each]  # type: ignore[arg-type]
    known = own_names(dict(weights), model) if weights is not None else dict(model.named_parameters())
    numbers = torch.arange(len(victims))
    found = GradientLeak(
        observed={name: torch.stack([victim[name] for victim in victims]) for name in victims[0]},
        protocol=Protocol(name, tuple(shape), logits, batch, **terms),
        network=on_meta(copy.deepcopy(model)),
        weights=_plain(known),
        buffers=_plain(float_buffers(model)),
        clients=numbers,
        rounds=torch.ones_like(numbers),
        restarts=torch.zeros_like(numbers),
    )
    found.check()
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile, data parallelism or Opacus wrap."""
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)  # type: ignore[arg-type]
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        return unwrapped(model.module)
    if type(model).__module__.startswith("opacus."):
        return unwrapped(model._module)  # type: ignore[arg-type]
    return model


def _logits(model: nn.Module, shape: Shape, name: str) -> int:
    """How many the model returns for one input."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            first = next(model.parameters())
            logits = copy.deepcopy(model).eval()(torch.zeros(2, *shape, device=first.device, dtype=first.dtype))
    except Exception as error:  # a user's code may raise anything
        raise FedtapError(
            f"Model {short(name)!r} does not take two inputs of shape {shape} ({short(error, 120)}): "
            "give the shape of one input without the batch, shape=(3, 32, 32)."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise FedtapError(
            f"Model {short(name)!r} returns {what} for two inputs, and an attack compares logits, one row an input: "
            "give a model that returns those alone."
        )
    return logits.shape[1]


def _named(model: nn.Module, gradient: Captured) -> dict[str, Tensor]:
    """One victim's gradient by name; zeros for what was not used or is frozen."""
    parameters = dict(model.named_parameters())
    moving = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not isinstance(gradient, Mapping):
        names = list(parameters) if len(gradient) == len(parameters) else moving
        if len(gradient) != len(names):
            raise FedtapError(
                f"A gradient is a list of {len(gradient)} tensors, and the model has {len(parameters)} parameters: "
                "give one for each, in the order of model.parameters(), or a mapping by name."
            )
        gradient = dict(zip(names, gradient, strict=True))
    given = own_names({name: tensor for name, tensor in gradient.items() if tensor is not None}, model)
    unused = {*parameters} - {*moving} | {name for name, tensor in gradient.items() if tensor is None}
    zeros = {name: torch.zeros_like(parameters[name]) for name in unused if name in parameters and name not in given}
    return _plain({**given, **zeros})


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As a leak holds them: float32, on the CPU, without a graph."""
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
