"""What a client does while it answers a message, seen through torch's own hooks: no line of the app is changed.

Global hooks of nn.Module show the model and its inputs, a TorchFunctionMode shows losses (as modules or as functions)
and on what `backward` is called, and a global hook of torch.optim shows each step. What is not torch, or runs in
another process of the client's, is not seen.
"""

from __future__ import annotations

import copy
import gc
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimisers
from torch.overrides import TorchFunctionMode

from fedtap.simulator.wire.captured import unwrapped

LOSSES: Mapping[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "nll",
    F.binary_cross_entropy_with_logits: "bce",
    F.binary_cross_entropy: "bce_of_probabilities",
    F.mse_loss: "mse",
    F.l1_loss: "l1",
    F.smooth_l1_loss: "smooth_l1",
    F.huber_loss: "huber",
    F.kl_div: "kl_div",
}
"""Loss functions that are seen, also inside the modules that call them, and their names in an audit."""

ROOM = 2**30
"""Bytes of inputs that are kept of one answer; a client's further batches are counted only."""


@dataclass
class LossCall:
    """One call of a loss function."""

    function: Callable[..., Tensor]
    """One of LOSSES."""
    value: Tensor | None
    """What it returned, by which `backward` is told to be of this loss alone; None afterwards, as it holds a graph."""
    scores: torch.Size
    """Shape of its first argument, the model's output."""
    rest: tuple[Any, ...]
    """Its further arguments, the targets first."""
    options: Mapping[str, Any]
    """Its named arguments."""

    @property
    def name(self) -> str:
        """As an audit names it."""
        return LOSSES[self.function]

    @property
    def target(self) -> Any:
        """What the scores are compared with."""
        return self.rest[0] if self.rest else self.options.get("target")


@dataclass
class LocalBatch:
    """One forward pass in training."""

    inputs: tuple[Any, ...]
    """Copies of what the model was given; empty where there was no room for them."""
    count: int
    """Of examples: rows of the first input that is a tensor, 0 where there is none."""
    random: Tensor
    """State of torch's generator before it, from which dropout draws."""
    losses: list[LossCall] = field(default_factory=list)
    """Losses computed on its output."""
    minimised: bool = False
    """Whether `backward` was called on one loss function's value, and nothing was added to it."""

    def forget(self) -> None:
        """Let go of the graphs behind the losses."""
        for call in self.losses:
            call.value = None

    @property
    def examples(self) -> Tensor | None:
        """The model's first input that is a tensor, one example a row."""
        return next((one for one in self.inputs if isinstance(one, Tensor) and one.ndim), None)


@dataclass
class LocalStep:
    """One step of an optimiser."""

    optimiser: type[torch.optim.Optimizer]
    """Its class."""
    groups: list[dict[str, Any]]
    """Its parameter groups: hyper-parameters, and under `names` the parameters."""
    norm: float
    """Length of the gradient, over all groups, as the optimiser found it."""
    batches: list[LocalBatch] = field(default_factory=list)
    """Forward passes since the step before."""


@dataclass(frozen=True)
class SeenDPSGD:
    """What Opacus's optimiser says of itself."""

    noise_multiplier: float
    """Standard deviation of the noise on the sum of clipped gradients, over `max_grad_norm`."""
    max_grad_norm: float
    """L2 norm to which each example's gradient is clipped."""
    sample_rate: float | None
    """Probability with which an example is in a batch, as the accountant is told; None where none is attached."""


@dataclass
class LocalTraining:
    """What one client was seen to do while it answered one message."""

    start: nn.Module | None = None
    """A copy of the trained model before its first forward pass in training; None where none was seen."""
    wrapper: str = ""
    """Class of what the model was wrapped in, such as Opacus' GradSampleModule."""
    steps: list[LocalStep] = field(default_factory=list)
    """The optimiser's steps."""
    whole: bool = True
    """Whether all batches are kept."""
    dp_sgd: SeenDPSGD | None = None
    """The mechanism of Opacus's optimiser, where the client trains with it."""

    @property
    def size(self) -> int:
        """Bytes of the inputs that are kept."""
        kept = [one for batch in self.batches for one in batch.inputs if isinstance(one, Tensor)]
        return sum(one.numel() * one.element_size() for one in kept)

    @property
    def learning_rate(self) -> float:
        """That of the first step's first group of parameters."""
        return float(self.steps[0].groups[0]["lr"])

    @property
    def batches(self) -> list[LocalBatch]:
        """All batches, in order."""
        return [batch for step in self.steps for batch in step.batches]


class Observer(TorchFunctionMode):
    """Sees what is done inside `with observer.watching() as training`, in this thread; see `installed`."""

    def __init__(self) -> None:
        super().__init__()
        self._now: LocalTraining | None = None
        self._open: list[LocalBatch] = []
        self._depth = 0
        self._kept = 0
        self._model: nn.Module | None = None
        self._loaded: dict[int, tuple[nn.Module, nn.Module]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks, for as long as an app is played."""
        load = nn.Module.load_state_dict

        def load_state_dict(module: nn.Module, *given: Any, **options: Any) -> Any:
            result = load(module, *given, **options)
            self._note_loaded(module)
            return result

        with ExitStack() as stack:
            for handle in (
                modules.register_module_forward_pre_hook(self._before),
                modules.register_module_forward_hook(self._after, always_call=True),
                optimisers.register_optimizer_step_pre_hook(self._step),
            ):
                stack.callback(handle.remove)
            stack.callback(setattr, nn.Module, "load_state_dict", load)
            nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign,assignment]
            yield

    @contextmanager
    def watching(self) -> Iterator[LocalTraining]:
        """What is done in here is one client's."""
        self._now, self._open, self._depth, self._kept = LocalTraining(), [], 0, 0
        self._model, self._loaded = None, {}
        try:
            with self:
                yield self._now
        finally:
            self._now, self._open, self._model, self._loaded = None, [], None, {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        value = func(*args, **(kwargs or {}))
        if self._open and args:
            if func in LOSSES and isinstance(value, Tensor) and value.requires_grad:
                rest = tuple(_copied(one) for one in args[1:])
                options = {name: _copied(one) for name, one in (kwargs or {}).items()}
                self._open[-1].losses.append(LossCall(func, value, args[0].shape, rest, options))
            elif func is Tensor.backward:
                batch = self._open[-1]
                batch.minimised = len(batch.losses) == 1 and args[0] is batch.losses[0].value
                batch.forget()
        return value

    def _note_loaded(self, module: nn.Module) -> None:
        """Keep a copy of the model as it is when its weights are loaded, before anything wraps it."""
        if self._now is not None and not self._depth and id(module) not in self._loaded:
            self._loaded[id(module)] = module, _copy_of(module)

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if self._now is None:
            return
        self._depth += 1
        moving = module.training and any(parameter.requires_grad for parameter in module.parameters())
        if self._depth > 1 or not moving or not torch.is_grad_enabled():
            return
        if self._model is None:
            self._begin(module)
        if self._model is not module:  # a second model is counted with no batch of the first
            return
        for batch in self._open[-1:]:
            batch.forget()
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        size = sum(one.numel() * one.element_size() for one in given if isinstance(one, Tensor))
        self._kept += size
        if self._kept > ROOM:
            self._now.whole = False
        kept = tuple(_copied(one) for one in given) if self._now.whole else ()
        count = next((len(one) for one in given if isinstance(one, Tensor) and one.ndim), 0)
        self._open.append(LocalBatch(kept, count, torch.get_rng_state()))

    def _begin(self, module: nn.Module) -> None:
        assert self._now is not None
        own = unwrapped(module)
        copied = self._loaded[id(own)][1] if id(own) in self._loaded else _copy_of(own)
        copied.load_state_dict(own.state_dict())
        frozen = {name: parameter.requires_grad for name, parameter in own.named_parameters()}
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(frozen[name])
        for there, here in zip(copied.modules(), own.modules(), strict=True):
            there.training = here.training
        self._model, self._now.start = module, copied
        self._now.wrapper = "" if own is module else f"{type(module).__module__}.{type(module).__name__}"

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._now is not None and self._depth:
            self._depth -= 1

    def _step(self, optimiser: torch.optim.Optimizer, args: Any, options: Any) -> None:
        if self._now is None or self._model is None:
            return
        names = {id(parameter): name for name, parameter in unwrapped(self._model).named_parameters()}
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            | {"names": [names[id(one)] for one in group["params"] if id(one) in names]}
            for group in optimiser.param_groups
        ]
        gradients = [one.grad for group in optimiser.param_groups for one in group["params"] if one.grad is not None]
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        if not self._now.steps and self._now.wrapper.startswith("opacus."):
            self._now.dp_sgd = _dp_sgd(optimiser)
        self._now.steps.append(LocalStep(type(optimiser), groups, norm, self._open))
        self._open = []


def _dp_sgd(optimiser: torch.optim.Optimizer) -> SeenDPSGD | None:
    """What wraps this optimiser, if it is Opacus's: the wrapper itself calls no hook of torch."""
    for one in gc.get_objects():
        opacus = type(one).__module__.startswith("opacus.")
        if opacus and getattr(one, "original_optimizer", None) is optimiser:
            norms = one.max_grad_norm if isinstance(one.max_grad_norm, list) else [one.max_grad_norm]
            hook = getattr(one, "step_hook", None)
            rate = inspect.getclosurevars(hook).nonlocals.get("sample_rate") if inspect.isfunction(hook) else None
            return SeenDPSGD(float(one.noise_multiplier), math.hypot(*norms), rate and float(rate))
    return None


def _copied(value: Any) -> Any:
    """A tensor's own copy on the CPU; all else as it is."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _copy_of(module: nn.Module) -> nn.Module:
    """The module without gradients, on the CPU."""
    return copy.deepcopy(module).cpu()
