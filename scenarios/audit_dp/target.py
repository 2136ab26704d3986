"""What is audited: a function from update to update, a Flower mod, or a Flower strategy with its noise.

Each becomes a `Mechanism`, which is called with an update and returns what an observer sees of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtap.scenarios.audit.process import users_code
from fedtap.scenarios.audit_dp.promise import promised_by
from fedtap.scenarios.audit_dp.seeds import generators_in
from fedtap.simulator.errors import FedtapError, short

AuditedUpdate = dict[str, Tensor]
"""Tensors by name: a client's update, or a stack of examples' gradients."""

MOD = "mod"
"""What a client mod is called among mechanisms."""

_RECORDS = 16
"""Examples in a stack, where a mechanism takes the examples' own gradients."""

_STATE = {
    "conv.weight": (8, 4, 3, 3),
    "bn.weight": (8,),
    "bn.bias": (8,),
    "bn.running_mean": (8,),
    "bn.running_var": (8,),
    "fc.weight": (10, 360),
    "fc.bias": (10,),
}
"""The update of a small network, as a state_dict names it."""

_COUNTER = "bn.num_batches_tracked"
"""A counter, which BatchNorm keeps as a whole number."""

_COUNTS = ("num", "count", "size", "total", "examples")
"""Parts of the names of numbers of examples."""

_SINGLE = ("steps", "loss", "accuracy")
"""Parts of the names of other single numbers."""

_MOST_NAMES = 12
"""Entries that a mechanism may ask for by names that are not among those above."""


@dataclass
class Mechanism:
    """What turns an update into what is observed."""

    call: Callable[[AuditedUpdate], Mapping[str, Any]]
    """From an update to what is observed of it."""
    template: AuditedUpdate
    """Zeros, of the names, shapes and types of an update."""
    records: int = 0
    """Examples in the leading axis of each tensor; 0 where the tensors are one update."""
    attributes: dict[str, float] = field(default_factory=dict)
    """What it says of its promise itself."""
    notes: list[str] = field(default_factory=list)
    """What has to be known of how it was called."""
    kind: str = "function"
    """What it is, in a word."""
    counts: list[str] = field(default_factory=list)
    """Names of its inputs that say how many examples there are."""
    generators: list[Any] = field(default_factory=list)
    """Generators of random numbers that it keeps."""

    def release(self, update: AuditedUpdate) -> dict[str, np.ndarray]:
        """What is observed of an update: arrays of float64 by name.

        Raises:
            FedtapError: it raises, or returns no dict of tensors.
        """
        try:
            out = self.call({name: tensor.clone() for name, tensor in update.items()})
        except FedtapError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise RaisedError(
                f"The mechanism raises {type(error).__name__} ({short(error, 120)}): see that it can be called with "
                "an update, a dict of tensors, as often as a federation has rounds and clients."
            ) from error
        return _arrays(out)


class RaisedError(FedtapError):
    """The mechanism itself raised."""


def _arrays(out: object) -> dict[str, np.ndarray]:
    if not isinstance(out, Mapping) or not out:
        raise FedtapError(
            f"The mechanism returns {'an empty dict' if out == {} else f'a {type(out).__name__}'}, and what is audited "
            "is a dict of tensors: return the update as it is sent, by name."
        )
    found = {}
    for name, value in out.items():
        try:
            array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, float)
        except (TypeError, ValueError) as error:
            raise FedtapError(
                f"The mechanism returns {short(name, 30)} as a {type(value).__name__}, which is no tensor: return a "
                "dict of tensors."
            ) from error
        found[str(name)] = np.ascontiguousarray(array).reshape(-1) + 0.0
    return found


def mechanism_named(target: str, said: Mapping[str, Any]) -> Mechanism:
    """The mechanism that `module:attribute` names, of the current folder or an installed package.

    Args:
        said: option -> value of the promise, None where it was not given.

    Raises:
        FedtapError: it cannot be imported, is no mechanism, or cannot be called.
    """
    return as_mechanism(_imported(target), said, target)


def _imported(target: str) -> Any:
    module, _, path = target.partition(":")
    if not module or not path:
        raise FedtapError(
            f"{short(target)} names no mechanism: give the folder of a Flower app, or module:function of an update."
        )
    sys.path.insert(0, str(Path.cwd()))

    def said(why: str) -> str:
        return (
            f"{short(module)} cannot be imported ({why}): run the command in the folder that holds the module, and see "
            "that Python imports it there."
        )

    with users_code(said):
        if module.endswith(".py"):
            file = Path(module).resolve()
            spec = importlib.util.spec_from_file_location(file.stem, file)
            if spec is None or spec.loader is None or not file.is_file():
                raise ModuleNotFoundError(f"no file {module}")
            sys.path.insert(0, str(file.parent))
            found: Any = importlib.util.module_from_spec(spec)
            sys.modules[file.stem] = found
            spec.loader.exec_module(found)
        else:
            found = importlib.import_module(module)
    for part in path.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
            raise FedtapError(
                f"{short(module)} has no {short(path)}: name one of {short(', '.join(names) or 'its functions', 120)}."
            )
        found = getattr(found, part)
    return found


def as_mechanism(found: Any, said: Mapping[str, Any], name: str) -> Mechanism:
    """An object as a mechanism.

    Raises:
        FedtapError: it is none, or cannot be called.
    """
    from fedtap.scenarios.audit_dp.flower import is_strategy, of_mod, of_strategy

    if isinstance(found, type):
        found = _made(found, said, name)
    if is_strategy(found):
        return _keeping(found, of_strategy(found, said))
    if not callable(found):
        raise FedtapError(
            f"{short(name)} is a {type(found).__name__}, and no mechanism: name a function of an update, a Flower mod, "
            "or a strategy that adds noise."
        )
    needed = _needed(found)
    if needed == 3:
        return _keeping(found, of_mod(found, said, name))
    if needed not in (0, 1, None):
        raise FedtapError(
            f"{short(name)} takes {needed} arguments, so it needs a state that it does not get here: name a function "
            "of one update (a dict of tensors), or a Flower mod of (message, context, call_next)."
        )
    return _keeping(found, _negotiated(found, said))


def _keeping(found: Any, mechanism: Mechanism) -> Mechanism:
    mechanism.generators = generators_in(found)
    return mechanism


def _needed(found: Any) -> int | None:
    """Arguments without which it cannot be called; None where it does not say."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in places and one.default is one.empty for one in parameters)


def _made(kind: type, said: Mapping[str, Any], name: str) -> Any:
    """An object of a class that is made of what the command line says.

    Raises:
        FedtapError: it takes something else.
    """
    known = {"clipping_norm": said.get("clip"), "clip": said.get("clip"), "max_grad_norm": said.get("clip")}
    known |= {"sensitivity": said.get("sensitivity"), "epsilon": said.get("epsilon"), "delta": said.get("delta")}
    if known["sensitivity"] is None:
        known["sensitivity"] = said.get("clip")
    try:
        parameters = list(inspect.signature(kind).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    required = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if missing := [one for one in required if known.get(one) is None]:
        raise FedtapError(
            f"{short(name)} is a class, and it needs {short(', '.join(missing), 80)}, which nothing here says: make an "
            "object of it in a module of yours, and name that."
        )
    return kind(**{one: known[one] for one in required})


def _templates(records: int) -> list[AuditedUpdate]:
    """Updates that may suit, the one that shows most first; of a stack of examples if there are some."""
    stack = (records,) if records else ()
    floats = {name: torch.zeros(*stack, *shape) for name, shape in _STATE.items()}
    single: list[AuditedUpdate] = [{"weight": torch.zeros(*stack, 32, 32)}, {"update": torch.zeros(*stack, 1024)}]
    if records:
        return [{"weight": torch.zeros(records, 16, 60), "bias": torch.zeros(records, 16)}, single[1]]
    return [floats | {_COUNTER: torch.zeros((), dtype=torch.long)}, floats, *single]


def _negotiated(function: Callable[[AuditedUpdate], Any], said: Mapping[str, Any]) -> Mechanism:
    """With the first of some updates that the function takes.

    Raises:
        FedtapError: it takes none of them.
    """
    attributes = promised_by(function)
    own = getattr(function, "example", None)
    if isinstance(own, Mapping) and own and all(isinstance(value, Tensor) for value in own.values()):
        template = {str(key): torch.zeros_like(value) for key, value in own.items()}
        lengths = {len(value) if value.ndim else 0 for value in template.values()}
        stacked = said.get("unit") == "example" and len(lengths) == 1
        return Mechanism(function, template, lengths.pop() if stacked else 0, attributes)
    first: FedtapError | None = None
    choices: list[tuple[int, AuditedUpdate]] = []
    if said.get("unit") == "example":
        choices += [(_RECORDS, template) for template in _templates(_RECORDS)]
    choices += [(0, template) for template in _templates(0)]
    length = said.get("clip") or said.get("sensitivity") or 1.0
    for records, template in choices:
        mechanism = Mechanism(function, template, records, attributes)
        try:
            out = _tried(mechanism, length)
        except FedtapError as error:
            first = first or error
            continue
        shapes = {name: tuple(value.shape[bool(records) :]) for name, value in mechanism.template.items()}
        if records and not any(out.get(name) == math.prod(shapes[name]) for name in shapes):
            continue  # it takes the stack for one update
        if not records and _COUNTER not in mechanism.template:
            mechanism.notes.append(f"updates with a whole number ({_COUNTER}) are refused by it, and were not tried")
        return mechanism
    assert first is not None
    raise first


def _tried(mechanism: Mechanism, length: float) -> dict[str, int]:
    """Entries of what it returns of a small update, by name; names that it asks for are added to the template.

    Raises:
        FedtapError: it raises something else than KeyError.
    """
    for _ in range(_MOST_NAMES):
        update = {
            name: torch.full_like(value, 0.01 * length) if value.is_floating_point() else torch.ones_like(value)
            for name, value in mechanism.template.items()
        }
        update |= {name: mechanism.template[name] for name in mechanism.counts}
        try:
            with quiet():
                return {name: len(value) for name, value in mechanism.release(update).items()}
        except RaisedError as error:
            asked = error.__cause__
            if not isinstance(asked, KeyError) or not asked.args or not isinstance(asked.args[0], str):
                raise
            name = asked.args[0]
            if name in mechanism.template:
                raise
            if any(part in name.lower() for part in _COUNTS) or name.lower() == "n":
                mechanism.template[name] = torch.tensor(float(_RECORDS))
                mechanism.counts.append(name)
                continue
            stack = (mechanism.records,) if mechanism.records else ()
            shape = () if any(part in name.lower() for part in _SINGLE) else (64,)
            mechanism.template[name] = torch.zeros(*stack, *shape)
    return {name: len(value) for name, value in mechanism.release(mechanism.template).items()}


@contextmanager
def quiet() -> Any:
    """Without Flower's lines in the log for each exchange."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
