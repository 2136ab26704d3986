"""What a victim would have sent for a guess, and how far that is from what it did send: the heart of every match.

One lane is one victim at one restart. All lanes run at once through `torch.func.vmap`; after a few calls the vmapped
function is traced into a plain list of tensor operations (`make_fx`), which saves the bookkeeping of functorch, and,
where asked, compiled. Both give the same numbers as the plain double backward pass, which the tests keep beside them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtap.attackers.parts.convolutions import COMPILED_TABLE, TABLE
from fedtap.simulator.attack import Images
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Leak, Protocol, Tensors, UpdateLeak, float_buffers
from fedtap.simulator.wire.replay import answer, mean_gradient, targets, trained

Labels = Int[Tensor, "lanes batch"] | Float[Tensor, "lanes batch classes"]
"""Hard labels, or what each image's label is thought to be: a distribution over the classes."""

Misfit = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""Of one lane's answer and the leaked one, both named as the parameters are: a scalar, lower is closer."""

Extra = Callable[[nn.Module, Tensors, Tensors, Tensor], Tensor]
"""A prior that looks through the network: of (network, weights, buffers, images of one lane), a scalar."""

WARM_UP = 64
"""Calls before tracing, which costs about as much as these."""

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of lanes that programs are made for; others are filled up to the next."""

CUDA_SIZES = (*SIZES, 48, 64, 96, 128, 192, 256)
"""Likewise on a GPU, which wants many."""

COMPILED_SIZES = (1, 16)
"""Likewise, where a program takes half a minute to make; more lanes than these fall out of the CPU's cache."""


def squared_distance(answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
    """``sum (answer - leaked)^2`` over every entry of every tensor."""
    return torch.stack([(answer[name] - leaked[name]).square().sum() for name in leaked]).sum()


def relative_distance(answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
    """``|answer - leaked|^2 / |leaked|^2``, all tensors taken together as one vector."""
    size = torch.stack([leaked[name].square().sum() for name in leaked]).sum()
    return squared_distance(answer, leaked) / size.clamp_min(1e-30)


def cosine_distance(answer: Mapping[str, Tensor], leaked: Mapping[str, Tensor]) -> Tensor:
    """``1 - <answer, leaked> / (|answer| |leaked|)``, all tensors taken together as one vector."""
    product = torch.stack([(answer[name] * leaked[name]).sum() for name in leaked]).sum()
    norms = [torch.stack([side[name].square().sum() for name in leaked]).sum() for side in (answer, leaked)]
    return 1 - product / (norms[0] * norms[1]).clamp_min(1e-30).sqrt()


class Match:
    """How far each lane's answer is from its leak: `match(images, labels)` -> one value a lane, differentiable.

    Args:
        leak: one entry a lane.
        misfit: distance of one lane's answer from the leaked one.
        extra: a prior that needs the network, added to the misfit.
        compiled: run through `torch.compile`; half a minute to start, twice as fast from then on.
    """

    def __init__(self, leak: Leak, misfit: Misfit, extra: Extra | None = None, compiled: bool = False) -> None:
        if leak.weights is None:
            raise AssertionError("a match needs the weights: the attack should say needs_weights")
        self.leak, self.misfit, self.extra, self.compiled = leak, misfit, extra, compiled
        self.leaked = mean_gradient(leak)
        size = sum(tensor[0].numel() for tensor in self.leaked.values())
        cuda = leak.device.type == "cuda"
        room = (2**28 if cuda else 2**25) // (size + 200 * leak.protocol.batch * _pixels(leak))
        sizes: tuple[int, ...] = CUDA_SIZES if cuda else SIZES
        if compiled:
            sizes = COMPILED_SIZES + ((64, 256) if cuda else ())
        self.chunk = max((n for n in CUDA_SIZES if n <= min(room, sizes[-1])), default=1)
        self.sizes = [n for n in sizes if n < self.chunk] + [self.chunk]
        self._calls: dict[tuple[int, bool], int] = {}

    @property
    def floor(self) -> float:
        """The squared distance that rounding on the wire leaves at the true images."""
        scale = (
            self.leak.protocol.learning_rate * self.leak.protocol.local_steps
            if isinstance(self.leak, UpdateLeak)
            else 1
        )
        return (self.leak.resolution / scale) ** 2 * sum(tensor[0].numel() for tensor in self.leaked.values())

    def __call__(self, images: Images, labels: Labels, lanes: Tensor | None = None) -> Float[Tensor, "lanes"]:
        """The misfit of each lane, with its slope towards images and, where they are a distribution, labels.

        Args:
            lanes: which of the leak's entries these are; all where not given.
        """
        soft = labels.is_floating_point()
        target = labels if soft else targets(labels, self.leak.protocol.classes).to(images.dtype)
        return _Ready.apply(images, target, *self._evaluate(images, target, lanes, soft))  # type: ignore[no-any-return,no-untyped-call]

    def with_slope(self, images: Images, labels: Labels, lanes: Tensor | None = None) -> tuple[Tensor, Images]:
        """The misfit of each lane and its slope towards the images, without autograd: for hard labels and no prior."""
        target = targets(labels, self.leak.protocol.classes).to(images.dtype)
        values, slope, _ = self._evaluate(images, target, lanes, soft=False)
        return values, slope

    def _evaluate(self, images: Tensor, target: Tensor, lanes: Tensor | None, soft: bool) -> tuple[Tensor, ...]:
        """Values, slope towards images, slope towards labels (empty where hard)."""
        images, target = images.detach(), target.detach()
        if lanes is None:
            if len(images) in self.sizes:
                return self._chunk(images, target, None, soft)
            lanes = torch.arange(len(self.leak))
        where = lanes.to(images.device)
        parts = [self._chunk(images[rows], target[rows], where[rows], soft) for rows in _chunks(len(where), self.chunk)]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def _chunk(self, images: Tensor, target: Tensor, lanes: Tensor | None, soft: bool) -> tuple[Tensor, ...]:
        """The same for lanes that fit into one program; `lanes` None where they are all, in order."""
        true = len(images)
        lacking = next(n for n in self.sizes if n >= true) - true
        if lacking and lanes is not None:
            fill = torch.arange(true + lacking, device=images.device).clamp_max(true - 1)
            images, target, lanes = images[fill], target[fill], lanes[fill]

        rows = slice(None) if lanes is None else _in_a_row(lanes)

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
                slopes, values = self._program(inputs, soft)(*inputs)
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
        return values[:true], slopes[0][:true], slopes[1][:true] if soft else slopes[0][:0]

    def _program(self, inputs: Any, soft: bool) -> Callable[..., Any]:
        """The vmapped function at first; from the `WARM_UP`th call with as many lanes on, its trace."""
        count = len(inputs[3])
        self._calls[count, soft] = self._calls.get((count, soft), 0) + 1
        if self._calls[count, soft] <= WARM_UP and not self.compiled:
            return self._vmapped(soft)
        leak = self.leak
        where = (count, leak.device, inputs[3].dtype)
        key = (leak.kind, leak.protocol, leak.stacked, self.misfit, self.extra, self.compiled, soft, where)
        programs = _PROGRAMS.setdefault(leak.network, {})
        if key not in programs:
            table = COMPILED_TABLE if self.compiled else TABLE
            trace = _without_repeats(make_fx(self._vmapped(soft), decomposition_table=table)(*inputs))
            programs[key] = torch.compile(trace, options=_options(leak.device)) if self.compiled else trace
        return programs[key]

    def _vmapped(self, soft: bool) -> Callable[..., Any]:
        respond, network, misfit, extra = answer(self.leak), self.leak.network, self.misfit, self.extra

        def lane(weights: Tensors, buffers: Tensors, leaked: Tensors, images: Tensor, target: Tensor) -> Any:
            def objective(images: Tensor, target: Tensor) -> Tensor:
                value = misfit(respond(weights, buffers, images, target), leaked)
                return value if extra is None else value + extra(network, weights, buffers, images)

            return grad_and_value(objective, argnums=(0, 1) if soft else (0,))(images, target)

        shared = 0 if self.leak.stacked else None
        return vmap(lane, in_dims=(shared, shared, 0, 0, 0))


def check_match(leak: Leak) -> None:
    """Refuse a model that no `Match` can work on, before an hour is spent: try it on one lane of random numbers.

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
    one = dataclasses.replace(
        leak[:1],
        protocol=dataclasses.replace(leak.protocol, local_steps=steps, batch=batch),
        observed=made_up(parameters, 1),
        weights=made_up(parameters),
        buffers=made_up(float_buffers(network)),
        stacked=False,
    )
    images = torch.rand(1, batch, *leak.protocol.shape, generator=draw)
    Match(one, squared_distance)(images, torch.zeros(1, batch, dtype=torch.long))
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
    """What a user's model needs, told from what became of its forward pass, and from the layers that it has."""
    recurrent = next((m for m in network.modules() if isinstance(m, nn.GRU | nn.RNN)), None) if network else None
    if recurrent is not None:
        return f"nn.{type(recurrent).__name__} is not written for that: use nn.LSTM, or write the recurrence out"
    if any(word in str(error) for word in ("meta", "same device", "expected device")):
        return "it keeps a tensor that is no parameter, so register it as a buffer of floating point numbers"
    return "write it without random numbers, operations in place and branches on data"


_PROGRAMS: WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]]] = WeakKeyDictionary()


class _Ready(torch.autograd.Function):
    """Values whose slopes are known already."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, target: Tensor, values: Tensor, slope: Tensor, soft: Tensor) -> Tensor:
        ctx.save_for_backward(slope, soft)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        slope, soft = ctx.saved_tensors
        return (
            weight.reshape(-1, 1, 1, 1, 1) * slope,
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
        twin = seen.setdefault((node.op, node.target, repr(node.args), repr(node.kwargs)), node)
        if twin is not node:
            node.replace_all_uses_with(twin)
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
    """On a CPU no Python between the kernels (its share counts at few lanes), and no channels-last convolutions."""
    return {"cpp_wrapper": True, "layout_optimization": False} if device.type == "cpu" else {}


def _in_a_row(lanes: Tensor) -> slice | Tensor:
    """A slice, which copies nothing, where the lanes follow each other."""
    first = int(lanes[0])
    row = torch.arange(first, first + len(lanes), device=lanes.device)
    return slice(first, first + len(lanes)) if torch.equal(lanes, row) else lanes


def _pixels(leak: Leak) -> int:
    channels, height, width = leak.protocol.shape
    return channels * height * width
