"""Convolutions of many batch elements, rewritten where torch's own kernel was measured to be slower.

Under `vmap` each element has its own filters, which torch runs as one convolution with a group for each element. On a
CPU its transposed form is slow with a stride (`spread` is a plain convolution instead); once a compiler fuses the
copies away, windows unfolded into columns and one `bmm` are faster too. On a GPU, cuDNN runs some of them group by
group, and all of them are `bmm` of columns. The tables are for `make_fx`; whatever they do not cover keeps torch's own
kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def im2col(images: Tensor, kernel: list[int], stride: list[int], padding: list[int], groups: int) -> Tensor:
    """What each element's filters see: `n groups*inputs h w` -> `groups n*places kh*kw*inputs`.

    Channels come last, so that one row of a window is one run of memory.
    """
    n, channels, high, wide = images.shape
    last = images.reshape(n, groups, channels // groups, high, wide).permute(1, 0, 3, 4, 2)
    padded = F.pad(last, (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    element, image, row, place, _ = padded.stride()
    # output side (n + 2 p - k) / s + 1
    places = [(pixels - k) // s + 1 for pixels, k, s in zip(padded.shape[2:4], kernel, stride, strict=True)]
    # as_strided, so that a compiler lays the padded images down once instead of computing them anew for each tap
    windows = padded.as_strided(
        (groups, n, *places, kernel[0], kernel[1] * channels // groups),
        (element, image, row * stride[0], place * stride[1], row, 1),
    )
    return windows.reshape(groups, n * places[0] * places[1], -1)


def correlate(images: Tensor, filters: Tensor, stride: list[int], padding: list[int], groups: int) -> Tensor:
    """Convolution with one group an element: `n groups*inputs h w` with `groups*outputs inputs kh kw`."""
    outputs, _, *kernel = filters.shape
    high, wide = (
        (pixels + 2 * p - k) // s + 1 for pixels, p, k, s in zip(images.shape[2:], padding, kernel, stride, strict=True)
    )
    elements = filters.permute(0, 2, 3, 1).reshape(groups, outputs // groups, -1)
    out = torch.bmm(elements, im2col(images, kernel, stride, padding, groups).transpose(1, 2))
    out = out.reshape(groups, outputs // groups, -1, high, wide)
    return out.permute(2, 0, 1, 3, 4).reshape(-1, outputs, high, wide)


def filters_gradient(
    signal: Tensor, images: Tensor, shape: Any, stride: list[int], padding: list[int], groups: int
) -> Tensor:
    """Gradient of the filters: each element's output signal times what its filters saw."""
    outputs, inputs, *kernel = shape
    signals = signal.reshape(len(signal), groups, outputs // groups, -1).permute(1, 2, 0, 3)
    signals = signals.reshape(groups, outputs // groups, -1)
    # dL/dW[o, tap] = sum over images and places of signal[o] times what the tap saw
    product = torch.bmm(signals, im2col(images, kernel, stride, padding, groups))
    return product.reshape(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()


def spread(
    signal: Tensor,
    filters: Tensor,
    size: Any,
    stride: list[int],
    padding: list[int],
    groups: int,
    *,
    in_columns: bool = False,
) -> Tensor:
    """Transposed convolution onto `size` pixels, as a plain one that yields stride x stride pixels a place.

    With pixel = stride a + r, output place q and tap i: pixel = stride q + i - padding, so at shift e = q - a the tap
    is i = r + padding - stride e.
    """
    outputs, inputs, *kernel = filters.shape
    taps, pads = [], []
    for k, s, p, pixels, places in zip(kernel, stride, padding, size, signal.shape[2:], strict=True):
        # shifts e for which some tap i = r + padding - stride e lies in 0 ... k - 1
        first, last = -((k - 1 - p) // s), (s - 1 + p) // s
        # tap of each phase r and shift e; k, one past the last, is a zero
        table = [[r + p - s * e for e in range(first, last + 1)] for r in range(s)]
        taps.append(torch.tensor([[i if 0 <= i < k else k for i in row] for row in table], device=filters.device))
        pads.append((-first, -(-pixels // s) - 1 + last - (places - 1)))
    padded = F.pad(filters.reshape(groups, outputs // groups, inputs, *kernel), (0, 1, 0, 1))
    # groups outputs inputs r_h e_h r_w e_w -> (groups inputs r_h r_w) outputs e_h e_w
    phases = padded[:, :, :, taps[0].reshape(-1)][..., taps[1].reshape(-1)]
    phases = phases.reshape(groups, outputs // groups, inputs, *taps[0].shape, *taps[1].shape)
    phases = phases.permute(0, 2, 3, 5, 1, 4, 6).reshape(
        groups * inputs * stride[0] * stride[1], outputs // groups, taps[0].shape[1], taps[1].shape[1]
    )
    if in_columns:
        dense = correlate(F.pad(signal, (*pads[1], *pads[0])), phases, [1, 1], [0, 0], groups)
    elif all(left == right >= 0 for left, right in pads):
        dense = aten.convolution(signal, phases, None, [1, 1], [pads[0][0], pads[1][0]], [1, 1], False, [0, 0], groups)
    else:
        framed = F.pad(signal, (*pads[1], *pads[0]))
        dense = aten.convolution(framed, phases, None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups)
    n, _, high, wide = dense.shape
    dense = dense.reshape(n, groups * inputs, *stride, high, wide).permute(0, 1, 4, 2, 5, 3)
    spreaded: Tensor = dense.reshape(n, groups * inputs, high * stride[0], wide * stride[1])
    return spreaded[..., : size[0], : size[1]]


@dataclass(frozen=True)
class _Costs:
    """Which convolutions are rewritten on a kind of device."""

    least_taps: int | None
    """Pixels of a filter from which elements with filters of their own are worth columns; None where none is."""
    all_spread_in_columns: bool = False
    """Whether transposed convolutions of elements with filters of their own, and no others, are spread, in columns."""

    def columns(self, filters: Tensor, stride: list[int], dilation: list[int], groups: int) -> bool:
        """Whether a convolution is better run as `bmm` of columns."""
        taps = filters.shape[2] * filters.shape[3] if filters.ndim == 4 else 0
        return self.least_taps is not None and groups > 1 and _plain(stride, dilation) and taps >= self.least_taps

    def spread(self, filters: Tensor, stride: list[int], dilation: list[int], groups: int) -> bool:
        """Whether a transposed one is: with strides, of elements whose images have few channels, unless all are."""
        if not _plain(stride, dilation):
            return False
        if self.all_spread_in_columns:
            return groups > 1
        return max(stride) > 1 and (groups == 1 or filters.shape[1] < 8)


def _plain(stride: list[int], dilation: list[int]) -> bool:
    return len(stride) == 2 and stride[0] == stride[1] and list(dilation) == [1, 1]


def _convolution(
    images: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    *,
    costs: _Costs,
) -> Any:
    if not transposed and costs.columns(filters, stride, dilation, groups):
        out = correlate(images, filters, stride, padding, groups)
    elif not transposed or not _plain(stride, dilation) or filters.numel() == 0:
        return NotImplemented
    else:
        kernel = filters.shape[2:]
        size = [
            (n - 1) * s - 2 * p + k + extra
            for n, s, p, k, extra in zip(images.shape[2:], stride, padding, kernel, output_padding, strict=True)
        ]
        if costs.spread(filters, stride, dilation, groups):
            out = spread(images, filters, size, stride, padding, groups, in_columns=costs.all_spread_in_columns)
        else:  # a transposed convolution is the backward pass of a plain one, for which torch has the better kernel
            like = images.new_empty(len(images), groups * filters.shape[1], *size)
            terms = (stride, padding, dilation, False, [0, 0], groups, [True, False, False])
            out = aten.convolution_backward(images, like, filters, None, *terms)[0]
    return out if bias is None else out + bias.reshape(-1, 1, 1)


def _convolution_backward(
    signal: Tensor,
    images: Tensor,
    filters: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
    *,
    costs: _Costs,
) -> Any:
    """The gradients of images and filters by `spread` and `filters_gradient` where worth it; torch's for the others."""
    if transposed:
        return NotImplemented
    ours: dict[int, Tensor] = {}
    if output_mask[0] and costs.spread(filters, stride, dilation, groups):
        onto, columns = images.shape[2:], costs.all_spread_in_columns
        ours[0] = spread(signal, filters, onto, stride, padding, groups, in_columns=columns)
    if output_mask[1] and costs.columns(filters, stride, dilation, groups):
        ours[1] = filters_gradient(signal, images, filters.shape, stride, padding, groups)
    if not ours:
        return NotImplemented
    gradients: list[Tensor | None] = [None, None, None]
    rest = [wanted and place not in ours for place, wanted in enumerate(output_mask)]
    if any(rest):
        terms = (stride, padding, dilation, transposed, output_padding, groups, rest)
        gradients = list(aten.convolution_backward(signal, images, filters, bias_sizes, *terms))
    return tuple(ours.get(place, theirs) for place, theirs in enumerate(gradients))


def _table(costs: _Costs) -> dict[Any, Callable[..., Any]]:
    return {
        aten.convolution.default: partial(_convolution, costs=costs),
        aten.convolution_backward.default: partial(_convolution_backward, costs=costs),
    }


TABLE = _table(_Costs(least_taps=None))
"""What is faster on a CPU in any case."""

COMPILED_TABLE = _table(_Costs(least_taps=10))
"""What is faster on a CPU once compiled: for windows of more than 3 x 3 the copy pays."""

CUDA_TABLE = _table(_Costs(least_taps=1, all_spread_in_columns=True))
"""What is faster on a GPU."""
