"""A stand-in for a CUDA graph on a CPU: a step's operations, recorded once and done again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
"""Operations that hand a value, or a shape that depends on one, to the host."""


class WaitsError(RuntimeError):
    """The step asks for what a graph cannot tell."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Callable[[], list[Tensor]], list[Tensor], list[bool]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(each.dtype == torch.bool for each in _tensors(args[1]))
        if name in _WAITING or by_mask:
            raise WaitsError(f"{func} waits for the device")
        given = {_memory(each) for each in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        made = _tensors(out)
        self.tape.append(
            (lambda: _tensors(func(*args, **kwargs)), made, [bool(_memory(each) not in given) for each in made])
        )
        return out


def tape(step: Callable[[], None]) -> Callable[[], None]:
    """The step's operations, done again on the tensors that they were recorded with.

    Recording takes the step, which a capture does not, and so the first replay is that one.
    """
    recorder = _Recorder()
    with recorder:
        step()
    replays = iter([True])

    def replay() -> None:
        if next(replays, False):
            return
        with torch._C._AutoDispatchBelowAutograd():  # type: ignore[attr-defined]  # where they were recorded
            for again, made, new in recorder.tape:
                for old, now, is_new in zip(made, again(), new, strict=True):
                    if is_new:
                        old.copy_(now)

    return replay


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_flatten(values)[0] if isinstance(each, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
