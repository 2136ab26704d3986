"""Seeds: the global generators of torch, numpy and Python, and the seeds that a mechanism uses while it is called."""

from __future__ import annotations

import copy
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

FEW_BITS = 32
"""Seeds of so many bits or fewer can all be tried."""


def seed_everything(seed: int | None) -> None:
    """Seed the global generators; None for entropy of the operating system."""
    if seed is None:
        seed = int.from_bytes(os.urandom(6), "little")
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def same_noise(seed: int, generators: Sequence[Any] = ()) -> Iterator[None]:
    """Inside, all randomness that can be held still is a function of `seed`: the global generators, what Python reads
    of the operating system's, and some generators, which are set back to where they are afterwards.

    It is for an auditor's questions alone, of what a mechanism makes of two updates under the same noise.
    """
    source = random.Random(seed)
    states = [_state(one) for one in generators]
    urandom, inner = os.urandom, random._urandom  # type: ignore[attr-defined]

    def drawn(size: int) -> bytes:
        return source.randbytes(size)

    seed_everything(seed)
    os.urandom = random._urandom = drawn  # type: ignore[attr-defined]
    try:
        yield
    finally:
        os.urandom, random._urandom = urandom, inner  # type: ignore[attr-defined]
        for one, state in zip(generators, states, strict=True):
            _set(one, state)
        seed_everything(None)


def generators_in(found: Any) -> list[Any]:
    """Generators of torch, numpy and Python that a function finds in its module, its closure or its object."""
    inner = getattr(found, "__func__", found)
    code = inner if hasattr(inner, "__globals__") else vars(type(inner)).get("__call__", inner)
    held: list[Any] = [*getattr(code, "__globals__", {}).values(), *getattr(found, "__dict__", {}).values()]
    held += [*getattr(getattr(found, "__self__", None), "__dict__", {}).values()]
    for cell in getattr(inner, "__closure__", None) or ():
        try:
            held += [cell.cell_contents, *getattr(cell.cell_contents, "__dict__", {}).values()]
        except ValueError:  # an empty cell
            continue
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    own = {id(one): one for one in held if isinstance(one, kinds) and not isinstance(one, random.SystemRandom)}
    return list(own.values())


def seeds_of(generators: Sequence[Any]) -> list[int]:
    """The seeds of generators that tell theirs."""
    found = []
    for one in generators:
        if isinstance(one, torch.Generator):
            found.append(one.initial_seed())
        elif isinstance(one, np.random.Generator):
            entropy = getattr(getattr(one.bit_generator, "seed_seq", None), "entropy", None)
            found += [entropy] if isinstance(entropy, int) else []
    return found


def standing(generator: Any) -> Any:
    """Where a generator stands, as something that can be compared."""
    state = _state(generator)
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else str(state)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


@contextmanager
def seeds_seen() -> Iterator[list[int]]:
    """Inside, every seed that Python code gives to a generator of torch, numpy or Python is noted.

    torch's own functions are seen by Python's profiling hook, which tells of calls of C functions; numpy's are replaced
    in its module, so code that took them from there before is not seen.
    """
    found: list[int] = []

    def note(seed: object) -> None:
        if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
            found.append(int(seed))

    def watch(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_return" and getattr(called, "__name__", "") == "manual_seed":
            if isinstance(getattr(called, "__self__", None), torch.Generator):
                note(called.__self__.initial_seed())
        elif event == "call" and frame.f_code is random.Random.seed.__code__:
            note(frame.f_locals.get("a"))

    seed, default_rng, state = np.random.seed, np.random.default_rng, np.random.RandomState

    class Watched(state):  # type: ignore[misc,valid-type]
        """numpy's legacy generator."""

        def __init__(self, seed: Any = None) -> None:
            note(seed)
            super().__init__(seed)

    def numpy_seed(given: Any = None) -> None:
        note(given)
        seed(given)

    def generator(given: Any = None) -> Any:
        note(given)
        return default_rng(given)

    def bits(kind: Any) -> Any:
        class WatchedBits(kind):  # type: ignore[misc]
            """numpy's source of bits."""

            def __init__(self, seed: Any = None) -> None:
                note(seed)
                super().__init__(seed)

        return WatchedBits

    before = sys.getprofile()
    plain = {name: getattr(np.random, name) for name in ("PCG64", "PCG64DXSM", "MT19937", "SFC64", "Philox")}
    replaced: dict[str, Any] = {"seed": numpy_seed, "default_rng": generator, "RandomState": Watched}
    replaced |= {name: bits(kind) for name, kind in plain.items()}
    plain |= {"seed": seed, "default_rng": default_rng, "RandomState": state}
    for name, value in replaced.items():
        setattr(np.random, name, value)
    sys.setprofile(watch)
    try:
        yield found
    finally:
        sys.setprofile(before)
        for name, value in plain.items():
            setattr(np.random, name, value)


def of_another_client(releases: Callable[[], np.ndarray], seconds: float) -> np.ndarray | None:
    """What another client's process gets: `releases` is called in a child of this process, which is seeded anew.

    Returns:
        What it returned, None where it raised or took longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "releases.npy"
        child = os.fork()
        if not child:  # the child: nothing may come back from here
            try:
                import signal

                signal.alarm(max(int(seconds), 1))
                seed_everything(None)
                np.save(path, releases(), allow_pickle=False)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return np.load(path, allow_pickle=False) if path.is_file() else None
