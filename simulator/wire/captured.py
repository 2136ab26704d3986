"""A gradient captured elsewhere, as a leak: one's own model, and what `torch.autograd.grad` returned for it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fedtap.simulator.errors import FedtapError, short, unknown
from fedtap.simulator.leaks import GradientLeak, Protocol, check_protocol, float_buffers, own_names
from fedtap.simulator.models.registry import Shape, on_meta
from fedtap.simulator.wire.soundness import doubts, warned

Part = Tensor | np.ndarray | None
Captured = Mapping[str, Part] | Iterable[Part]
"""One victim's gradient, by the parameters' names or in their order; None where a parameter was not used."""


def leak(
    model: Any,  # this and the next are what people have, and are looked at below: `fedtap.leak` has their types
    gradients: Any,
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
        gradients: of the mean cross-entropy over a victim's batch, tensors or NumPy arrays: a list in the order of
            `model.parameters()`, as `torch.autograd.grad` returns it, or a mapping by name; of several victims, a list
            of these.
        shape: of one input, without the batch: channels, height, width of an image.
        classes: how many logits the model has; counted where not given.
        batch: examples behind each gradient.
        weights: those of the model, where it has others by now; name -> tensor.
        name: of the model in rows; `module:function` lets `fedtap attack` build it again. Its class's where not given.
        terms: further terms of the protocol (`fedtap.simulator.leaks.Protocol`): `defence="noise(0.01)"`, …

    Raises:
        FedtapError: the model does not take such an input, the gradients are not those of its parameters, or no client
            could train like that.
    """
    if not isinstance(model, nn.Module):
        raise FedtapError(
            f"The model is of type {type(model).__name__}, and what was trained is a torch.nn.Module: give that, at "
            "the weights at which the gradient was taken."
        )
    model = unwrapped(model)
    name = name or type(model).__name__
    logits = _logits(model, shape, name)
    if classes not in (None, logits):
        raise FedtapError(f"Model {short(name)!r} returns {logits} logits and not {classes}: leave classes out.")
    if strange := sorted(terms.keys() - {term.name for term in dataclasses.fields(Protocol)}):
        raise unknown("term of the protocol", strange[0], (term.name for term in dataclasses.fields(Protocol)))
    protocol = Protocol(name, tuple(shape), logits, batch, **terms)
    check_protocol(protocol)
    victims = [_named(model, part) for part in _each_victim(gradients)]
    _doubt_dropout(model, name)
    known = own_names(dict(weights), model) if weights is not None else dict(model.named_parameters())
    numbers = torch.arange(len(victims))
    found = GradientLeak(
        observed={name: torch.stack([victim[name] for victim in victims]) for name in victims[0]},
        protocol=protocol,
        network=on_meta(copy.deepcopy(model).float()),  # as the leak's tensors are
        weights=_plain(known),
        buffers=_plain(float_buffers(model)),
        clients=numbers,
        rounds=torch.ones_like(numbers),
        restarts=torch.zeros_like(numbers),
    )
    found.check()
    for line in warned(found, doubts(found)):
        warnings.warn(line, stacklevel=3)
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
    return int(logits.shape[1])


def _each_victim(gradients: Any) -> list[Any]:
    """The gradient of each victim, of those that are given.

    Raises:
        FedtapError: what is given is none, or none of any victim.
    """
    if isinstance(gradients, Mapping) and all(isinstance(name, str) for name in gradients):
        return [gradients]
    if not isinstance(gradients, Iterable) or isinstance(gradients, Mapping | str | Tensor | np.ndarray):
        raise _no_gradient(type(gradients).__name__)
    parts = list(gradients)
    if all(part is None or isinstance(part, Tensor | np.ndarray) for part in parts):
        return [parts]
    return parts


def _no_gradient(what: str) -> FedtapError:
    return FedtapError(
        f"A gradient is a list of tensors or a mapping of them by name, and here is a value of type {what}: "
        "give what torch.autograd.grad(loss, list(model.parameters())) returns."
    )


def _doubt_dropout(model: nn.Module, name: str) -> None:
    """Warn of units that were dropped at random, which no attack knows."""
    dropped = (module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd))
    if any(module.training and module.p > 0 for module in dropped):
        warnings.warn(
            f"Model {short(name)!r} is in training mode and drops units at random, which an attack cannot know, so a "
            "gradient taken like that is not explained: take it after model.eval(), or expect no likeness.",
            stacklevel=4,
        )


def _named(model: nn.Module, gradient: Any) -> dict[str, Tensor]:
    """One victim's gradient by name; zeros for what was not used or is frozen."""
    parameters = dict(model.named_parameters())
    moving = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not isinstance(gradient, Mapping):
        if not isinstance(gradient, Sequence):
            raise _no_gradient(type(gradient).__name__)
        names = list(parameters) if len(gradient) == len(parameters) else moving
        if len(gradient) != len(names):
            raise FedtapError(
                f"A gradient is a list of {len(gradient)} tensors, and the model has {len(parameters)} parameters: "
                "give one for each, in the order of model.parameters(), or a mapping by name."
            )
        gradient = dict(zip(names, gradient, strict=True))
    gradient = {name: None if part is None else _dense(part) for name, part in gradient.items()}
    given = own_names({name: tensor for name, tensor in gradient.items() if tensor is not None}, model)
    unused = {*parameters} - {*moving} | {name for name, tensor in gradient.items() if tensor is None}
    zeros = {name: torch.zeros_like(parameters[name]) for name in unused if name in parameters and name not in given}
    return _plain({**given, **zeros})


def _dense(part: Any) -> Tensor:
    """A tensor of numbers, of a NumPy array or of a sparse tensor.

    Raises:
        FedtapError: it is something else, or has no values.
    """
    if isinstance(part, np.ndarray) and part.dtype.kind in "fiu":
        part = torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))
    if not isinstance(part, Tensor):
        raise _no_gradient(type(part).__name__)
    if part.is_meta or part.is_complex():
        kind = "lies on the meta device, without values" if part.is_meta else "is of complex numbers"
        raise FedtapError(f"A tensor of the gradient {kind}, and a gradient is of real ones: give it as it was sent.")
    return part if part.layout == torch.strided else part.to_dense()


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As a leak holds them: float32, on the CPU, without a graph."""
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
