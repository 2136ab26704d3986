"""Gradient matching: what a victim would have sent for candidate images, and its distance from what was sent.

A batch element is one victim at one restart. All elements run at once through `torch.func.vmap`, without which a
single one does; after a few calls the function is traced into a plain list of tensor operations (`make_fx`), which
saves the bookkeeping of functorch, and, with `compiled`, compiled. All give the numbers of the plain double backward
pass, which the tests compare.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from fedtap.attackers.parts.convolutions import COMPILED_TABLE, CUDA_TABLE, TABLE
from fedtap.simulator.attack import Images
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Leak, Protocol, Tensors, UpdateLeak, float_buffers
from fedtap.simulator.wire.replay import client_reply, mean_gradient, targets, trained

AnyLabels = Int[Tensor, "elements batch"] | Float[Tensor, "elements batch classes"]
"""Labels of each image: class numbers, or a distribution over the classes."""

Distance = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""(reply of one element, leaked reply), both parameter name -> tensor, -> a scalar; lower is closer."""

Extra = Callable[[nn.Module, Tensors, Tensors, Tensor], Tensor]
"""A prior that needs the network: (network, weights, buffers, images of one element) -> a scalar."""

CALLS_BEFORE_TRACING, CUDA_CALLS_BEFORE_TRACING = 64, 1
"""Calls before tracing: tracing costs about as much time as this many; on a GPU it also has better convolutions."""

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of elements that programs are traced for; a batch is filled up to the next of them."""

CUDA_SIZES = (*SIZES, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of elements that programs are traced for on a GPU, which is faster with many at once."""

CUDA_SHARE = 4
"""A chunk of elements takes one in this many of a GPU's free bytes."""

COMPILED_SIZES = (1, 16)
"""Numbers of elements that programs are compiled for, which takes half a minute each; more than 16 overflow a CPU's
cache."""


def squared_distance(client_reply: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
    """``sum (reply - leaked)^2`` over every entry of every tensor."""
    return torch.stack([(client_reply[name] - leaked[name]).square().sum() for name in leaked]).sum()


def relative_distance(client_reply: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
    """``|reply - leaked|^2 / |leaked|^2``, all tensors taken together as one vector."""
    size = torch.stack([leaked[name].square().sum() for name in leaked]).sum()
    return squared_distance(client_reply, leaked) / size.clamp_min(1e-30)


def cosine_distance(client_reply: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
    """``1 - <reply, leaked> / (|reply| |leaked|)``, all tensors taken together as one vector."""
    product = torch.stack([(client_reply[name] * leaked[name]).sum() for name in leaked]).sum()
    norms = [torch.stack([side[name].square().sum() for name in leaked]).sum() for side in (client_reply, leaked)]
    return 1 - product / (norms[0] * norms[1]).clamp_min(1e-30).sqrt()


class Match:
    """Distance of each element's reply from its leak: `match(images, labels)` -> one value an element, differentiable.

    Args:
        leak: one entry for each element.
        distance: between one element's reply and the leaked one.
        extra: a prior that needs the network, added to the distance.
        compiled: run through `torch.compile`; half a minute to start, twice as fast from then on.
    """

    def __init__(self, leak: Leak, distance: Distance, extra: Extra | None = None, compiled: bool = False) -> None:
        if leak.weights is None:
            raise AssertionError("a match needs the weights: the attack should say needs_weights")
        self.leak, self.distance, self.extra, self.compiled = leak, distance, extra, compiled
        self.leaked = mean_gradient(leak)
        size = sum(tensor[0].numel() for tensor in self.leaked.values())
        cuda = leak.device.type == "cuda"
        # an element's tensors and their adjoints take about its parameters and 200 numbers a pixel; 2**25 float32 are
        # 128 MiB, which keep a chunk's memory bounded on a CPU
        numbers = torch.cuda.mem_get_info(leak.device)[0] // (4 * CUDA_SHARE) if cuda else 2**25
        room = numbers // (size + 200 * leak.protocol.batch * _pixels(leak))
        sizes: tuple[int, ...] = CUDA_SIZES if cuda else SIZES
        if compiled:
            sizes = COMPILED_SIZES + ((64, 256, 1024) if cuda else ())
        self.chunk = max((n for n in CUDA_SIZES if n <= min(room, sizes[-1])), default=1)
        self.sizes = [n for n in sizes if n < self.chunk] + [self.chunk]
        self._calls: dict[tuple[int, bool], int] = {}

    @property
    def tolerance(self) -> float:
        """The squared distance that rounding on the wire leaves at the true images."""
        scale = (
            self.leak.protocol.learning_rate * self.leak.protocol.local_steps
            if isinstance(self.leak, UpdateLeak)
            else 1
        )
        # E |e|^2 = resolution^2 for each entry
        return (self.leak.resolution / scale) ** 2 * sum(tensor[0].numel() for tensor in self.leaked.values())

    def __call__(self, images: Images, labels: AnyLabels, elements: Tensor | None = None) -> Float[Tensor, "elements"]:
        """The matching loss of each element, differentiable by images and, where they are distributions, labels.

        Args:
            elements: which of the leak's entries these are; all where not given.
        """
        soft = labels.is_floating_point()
        target = labels if soft else targets(labels, self.leak.protocol.classes).to(images.dtype)
        return _Ready.apply(images, target, *self._evaluate(images, target, elements, soft))  # type: ignore[no-any-return,no-untyped-call]

    def with_input_gradient(
        self, images: Images, labels: AnyLabels, elements: Tensor | None = None
    ) -> tuple[Tensor, Images]:
        """The matching loss of each element and its gradient with respect to the images; labels are class numbers."""
        target = targets(labels, self.leak.protocol.classes).to(images.dtype)
        values, input_gradient, _ = self._evaluate(images, target, elements, soft=False)
        return values, input_gradient

    def _evaluate(self, images: Tensor, target: Tensor, elements: Tensor | None, soft: bool) -> tuple[Tensor, ...]:
        """Values, gradients by images, and gradients by label distributions (empty where labels are class numbers)."""
        images, target = images.detach(), target.detach()
        if elements is None:
            if len(images) in self.sizes:
                return self._chunk(images, target, None, soft)
            elements = torch.arange(len(self.leak), device=images.device)
        where = elements.to(images.device)
        parts = [self._chunk(images[rows], target[rows], where[rows], soft) for rows in _chunks(len(where), self.chunk)]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def _chunk(self, images: Tensor, target: Tensor, elements: Tensor | None, soft: bool) -> tuple[Tensor, ...]:
        """`_evaluate` for elements that fit into one program; `elements` is None where they are all, in order."""
        true = len(images)
        # filled up with copies of the last element, whose values are dropped
        lacking = next(n for n in self.sizes if n >= true) - true
        if lacking and elements is not None:
            fill = torch.arange(true + lacking, device=images.device).clamp_max(true - 1)
            images, target, elements = images[fill], target[fill], elements[fill]

        rows = slice(None) if elements is None else _in_a_row(elements)

        def pick(tensors: Tensors, stacked: bool) -> Tensors:
            return {name: tensor[rows] for name, tensor in tensors.items()} if stacked else tensors

        buffers = pick(self.leak.buffers, self.leak.stacked)
        inputs = (
            pick(self.leak.weights or {}, self.leak.stacked),
            {name: buffer.clone() for name, buffer in buffers.items()},  # a spectral norm writes into its own
            pick(self.leaked, True),
            images.contiguous(),
            target.contiguous(),
        )
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                gradients, values = self._program(inputs, soft)(*inputs)
            if values.is_meta:
                raise RuntimeError("its output is on the meta device")
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise FedtapError(
                f"The gradient of model {self.leak.protocol.model!r} cannot be matched, since torch.func cannot "
                f"differentiate it twice for {len(images)} victim(s) at once ({short(error, 100)}): "
                f"{how_to_write(error, self.leak.network)}."
            ) from error
        return values[:true], gradients[0][:true], gradients[1][:true] if soft else gradients[0][:0]

    def _program(self, inputs: Any, soft: bool) -> Callable[..., Any]:
        """The function itself at first; after `CALLS_BEFORE_TRACING` calls with as many elements, its trace."""
        count = len(inputs[3])
        self._calls[count, soft] = self._calls.get((count, soft), 0) + 1
        leak = self.leak
        cuda = leak.device.type == "cuda"
        patience = CUDA_CALLS_BEFORE_TRACING if cuda else CALLS_BEFORE_TRACING
        if self._calls[count, soft] <= patience and not self.compiled:
            return self._function(count, soft)
        # what a trace depends on: shapes, dtype and device, and what the protocol computes
        where = (count, leak.device, inputs[3].dtype)
        # traces are kept with the network, which the key's other parts describe
        key = (leak.kind, leak.protocol, leak.stacked, self.distance, self.extra, self.compiled, soft, where)
        programs = _PROGRAMS.setdefault(leak.network, {})
        if key not in programs:
            table = CUDA_TABLE if cuda else COMPILED_TABLE if self.compiled else TABLE if count > 1 else {}
            trace = _without_repeats(make_fx(self._function(count, soft), decomposition_table=table)(*inputs))
            programs[key] = torch.compile(trace, options=_options(leak.device)) if self.compiled else trace
        return programs[key]

    def _function(self, count: int, soft: bool) -> Callable[..., Any]:
        """From stacks of `count` elements to gradients and values: vmapped, or, of a single element, as it is."""
        respond, network, distance, extra = client_reply(self.leak), self.leak.network, self.distance, self.extra

        def element(weights: Tensors, buffers: Tensors, leaked: Tensors, images: Tensor, target: Tensor) -> Any:
            def objective(images: Tensor, target: Tensor) -> Tensor:
                value = distance(respond(weights, buffers, images, target), leaked)
                return value if extra is None else value + extra(network, weights, buffers, images)

            return grad_and_value(objective, argnums=(0, 1) if soft else (0,))(images, target)

        shared = 0 if self.leak.stacked else None
        if count > 1:
            return vmap(element, in_dims=(shared, shared, 0, 0, 0))

        def alone(*stacks: Any) -> Any:
            places = (shared, shared, 0, 0, 0)
            one = [
                tree_map(itemgetter(0), stack) if at == 0 else stack for stack, at in zip(stacks, places, strict=True)
            ]
            return tree_map(lambda tensor: tensor[None], element(*one))

        return alone


def check_match(leak: Leak) -> None:
    """Refuse a model that no `Match` can work on: it is tried on two elements of random numbers.

    Raises:
        FedtapError: torch.func cannot differentiate the network twice, or nothing in it is trained.
    """
    network = leak.network
    if not trained(network):
        raise FedtapError(
            f"Every parameter of model {leak.protocol.model!r} is frozen (requires_grad=False), so its clients send "
            "nothing but zeros: train at least one layer."
        )
    whole = [name for name, held in network.named_buffers() if held.is_meta and not held.is_floating_point()]
    if lost := [name for name in whole if not name.endswith("num_batches_tracked")]:  # torch would read any memory
        raise FedtapError(
            f"Model {short(leak.protocol.model)!r} keeps {short(lost[0])}, a buffer of whole numbers whose values are "
            "not known here: make it in forward (torch.arange), or register it as floating point numbers."
        )
    if leak.protocol.optimiser == "adam" and leak.protocol.local_steps > 1:
        raise FedtapError(
            f"Adam divides each step by the gradient's own size, so of {leak.protocol.local_steps} steps nothing is "
            f"left to "
            "be matched: attack clients of one step, whose gradient's signs are."
        )
    # two steps and two images show all that more of them would use
    steps, batch = min(leak.protocol.local_steps, 2), min(leak.protocol.batch, 2)
    tried = (leak.kind, dataclasses.replace(leak.protocol, local_steps=steps, batch=batch))
    if tried in _TRIED.setdefault(network, set()):
        return
    draw = torch.Generator().manual_seed(0)

    def made_up(tensors: Mapping[str, Tensor], *lead: int) -> dict[str, Tensor]:
        return {
            name: 0.1 * torch.rand(*lead, *tensor.shape, generator=draw, dtype=tensor.dtype)
            for name, tensor in tensors.items()
        }

    parameters = dict(network.named_parameters())
    pair = dataclasses.replace(
        leak[:1].repeat(2),  # a single element is not vmapped
        protocol=dataclasses.replace(leak.protocol, local_steps=steps, batch=batch),
        observed=made_up(parameters, 2),
        weights=made_up(parameters),
        buffers=made_up(float_buffers(network)),
        stacked=False,
    )
    images = torch.rand(2, batch, *leak.protocol.shape, generator=draw)
    Match(pair, squared_distance)(images, torch.zeros(2, batch, dtype=torch.long))
    _TRIED[network].add(tried)


_TRIED: WeakKeyDictionary[nn.Module, set[tuple[str, Protocol]]] = WeakKeyDictionary()


def zeroed(network: nn.Module) -> nn.Module:
    """A copy on the CPU with zeros for weights and buffers; `to_empty` would untie weights that layers share."""
    copied, made = copy.deepcopy(network), dict[int, Any]()
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = nn.Parameter(torch.zeros_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), zeros)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.zeros_like(buffer, device="cpu"))
    return copied


def how_to_write(error: Exception, network: nn.Module | None = None) -> str:
    """How a user's model has to be written, told from the error of its forward pass and from its layers."""
    recurrent = next((m for m in network.modules() if isinstance(m, nn.GRU | nn.RNN)), None) if network else None
    if recurrent is not None:
        return f"nn.{type(recurrent).__name__} is not written for that: use nn.LSTM, or write the recurrence out"
    if "autograd.Function" in str(error):
        return (
            "give its torch.autograd.Function a setup_context and generate_vmap_rule = True, or use torch's functions"
        )
    if any(word in str(error) for word in ("meta", "same device", "expected device")):
        return "it keeps a tensor that is no parameter, so register it as a buffer of floating point numbers"
    return "write it without random numbers, operations in place and branches on data"


_PROGRAMS: WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]]] = WeakKeyDictionary()


class _Ready(torch.autograd.Function):
    """Hand autograd values whose gradients are computed already."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, target: Tensor, values: Tensor, input_gradient: Tensor, soft: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input_gradient, soft)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        input_gradient, soft = ctx.saved_tensors
        return (
            weight.reshape(-1, 1, 1, 1, 1) * input_gradient,
            weight.reshape(-1, 1, 1) * soft if len(soft) else None,
            None,
            None,
            None,
        )


def _without_repeats(trace: GraphModule) -> GraphModule:
    """Drop operations that repeat an earlier one, and those that nothing uses; none where one writes in place."""
    if any(_writes(node.target) for node in trace.graph.nodes):
        return trace
    seen: dict[Any, Any] = {}
    for node in list(trace.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        earlier = seen.setdefault((node.op, node.target, repr(node.args), repr(node.kwargs)), node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            trace.graph.erase_node(node)
    trace.graph.eliminate_dead_code()
    trace.recompile()
    return trace


def _writes(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target is torch.ops.aten.detach_.default:
        return False
    return bool(target._schema.is_mutable)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))


def _options(device: torch.device) -> dict[str, Any]:
    """On a CPU no Python between the kernels (it counts where elements are few), and no channels-last convolutions."""
    return {"cpp_wrapper": True, "layout_optimization": False} if device.type == "cpu" else {}


def _in_a_row(elements: Tensor) -> slice | Tensor:
    """A slice, which copies nothing, where the elements follow each other; a GPU copies sooner than it is asked."""
    if elements.is_cuda:
        return elements
    first = int(elements[0])
    row = torch.arange(first, first + len(elements), device=elements.device)
    return slice(first, first + len(elements)) if torch.equal(elements, row) else elements


def _pixels(leak: Leak) -> int:
    channels, height, width = leak.protocol.shape
    return channels * height * width
