"""A step that an attack takes thousands of times on the same tensors: on a GPU, one replayed CUDA graph.

A small kernel costs more of the host's time than of the GPU's, so that an iteration of an attack on LeNet waits for
Python. A CUDA graph holds the iteration's kernels and launches them together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fedtap.simulator.errors import FedtapError, short

_WARM_UP = 3
"""Calls before the graph is captured, in which libraries choose their kernels and the match is traced."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""From a step, which it may not run, to what replays it."""


def capture_on(device: torch.device) -> Capture | None:
    """How a step is captured on this device; None where it is called each time."""
    return cuda_graph if device.type == "cuda" else None


class Repeated:
    """`step()`, again and again; what differs between the calls is in tensors that it changes in place.

    A step that is captured neither asks for a tensor's value nor makes tensors whose shape depends on one. One that
    cannot be captured is called each time, and that is said once.

    Args:
        step: reads and writes the same tensors in each call.
    """

    def __init__(self, step: Callable[[], None], capture: Capture | None) -> None:
        self._step, self._capture, self._calls = step, capture, 0

    def __call__(self) -> None:
        """Take the step."""
        if self._capture is not None and self._calls == _WARM_UP:
            try:
                self._step = self._capture(self._step)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, FedtapError) as error:
                reason = short(error.__cause__ or error, 120)
                warnings.warn(
                    f"This attack's step cannot be captured as a CUDA graph ({reason}), so each of its kernels is "
                    "launched by itself: it is slower, and the result is the same.",
                    stacklevel=2,
                )
            self._capture = None
        self._calls += 1
        if self._capture is None:
            self._step()
        else:
            _aside(self._step)


def adam(x: Tensor, rate: float, capture: Capture | None) -> torch.optim.Adam:
    """Adam on `x`, whose rate a schedule changes between replays too."""
    if capture is None:
        return torch.optim.Adam([x], lr=rate)
    return torch.optim.Adam([x], lr=torch.tensor(rate, device=x.device), capturable=True)


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of this step's kernels, on the tensors that it works on now.

    Raises:
        RuntimeError: the step waits for the GPU, or does something else that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _aside(step: Callable[[], None]) -> None:
    """Run it on a stream of its own, as the warm-up of a capture is, where there is a GPU."""
    if not torch.cuda.is_available():
        step()
        return
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
