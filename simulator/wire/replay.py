"""What a client of a protocol would have sent for given images: its loss, its optimiser, its steps.

It serves to measure how much of a leak a reconstruction explains, and as the inner loop of gradient matching.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from fedtap.simulator.defences.defence import Exchange
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Protocol, Tensors, UpdateLeak
from fedtap.simulator.models.registry import logits_layer

Reply = Callable[[Tensors, Tensors, Tensor, Tensor], dict[str, Tensor]]
"""Of (weights, buffers, images `batch channel height width`, targets `batch classes`): a tensor a trained parameter."""


def trained(network: nn.Module) -> list[str]:
    """Names of the parameters that training moves: of frozen ones (`requires_grad=False`) the wire shows only zeros."""
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def local_steps(leak: Leak) -> int:
    """Local steps behind what was sent; 1 for a gradient."""
    return leak.protocol.local_steps if isinstance(leak, UpdateLeak) else 1


def turns(protocol: Protocol) -> int:
    """Batches that the local steps take in turn; 1 where each step is on all examples."""
    return -(-protocol.batch // protocol.step_batch) if protocol.step_batch else 1


def exchange_of(leak: Leak, softness: float = Exchange.softness) -> Exchange:
    """What the protocol tells of the exchange, for defences that are replayed on `mean_gradient`."""
    try:
        layer = logits_layer(leak.network, leak.protocol.shape)
    except FedtapError:  # a model that cannot be tried out shows nothing
        layer = None
    steps = local_steps(leak)
    last = "" if layer is None else f"{layer}.weight".removeprefix(".")
    return Exchange(steps, alone=leak.protocol.batch == steps == 1, last=last, softness=softness)


def mean_gradient(leak: Leak) -> dict[str, Tensor]:
    """The leaked gradient of what is trained, as it was sent; of an update, its mean along the local steps:
    ``-update / (learning rate x steps)``.
    """
    observed = {name: leak.observed[name] for name in trained(leak.network)}
    if not isinstance(leak, UpdateLeak):
        return observed
    protocol = leak.protocol
    return {name: -tensor / (protocol.learning_rate * protocol.local_steps) for name, tensor in observed.items()}


def undecayed(leak: Leak) -> dict[str, Tensor]:
    """`mean_gradient` without the contribution of weight decay; unchanged for Adam, and where the weights are unknown.

    The rest is a sum of the loss's own gradients, also after several steps with momentum: the optimiser is linear.
    """
    gradient, protocol = mean_gradient(leak), leak.protocol
    if not protocol.weight_decay or leak.weights is None or protocol.optimiser == "adam":
        return gradient
    decay = _linear_response(leak, gradient=0.0, start=1.0)
    return {name: tensor - decay * leak.weights[name] for name, tensor in gradient.items()}


def loss_gradient(leak: Leak) -> dict[str, Tensor]:
    """`undecayed` in units of one gradient of the mean loss; of several steps, a mean along them."""
    gain = (
        1.0
        if leak.protocol.optimiser == "adam"
        else _linear_response(leak, gradient=1.0, start=0.0) * summands(leak.protocol)
    )
    return undecayed(leak) if gain == 1 else {name: tensor / gain for name, tensor in undecayed(leak).items()}


def _linear_response(leak: Leak, gradient: float, start: float) -> float:
    """What `descended` gives for one weight that begins at `start`, under a constant gradient of the loss."""
    fixed, begun = ({"": torch.tensor(value, dtype=torch.float64)} for value in (gradient, start))
    return float(descended(leak.protocol, local_steps(leak), begun, lambda here: fixed)[""])


def summands(protocol: Protocol) -> int:
    """Factor between a client's loss and the mean loss: 1, or the number of terms where the loss is a sum."""
    if protocol.reduction == "mean":
        return 1
    own = max(1, protocol.batch // protocol.summed)
    return own if protocol.loss == "cross_entropy" else own * protocol.classes


def targets(labels: Int[Tensor, "*batch"], classes: int) -> Float[Tensor, "*batch classes"]:
    """One-hot labels; of a single logit the label itself, 0 or 1."""
    if classes == 1:
        return labels[..., None].float()
    # F.one_hot looks whether there are such classes, for which a GPU has to be waited
    return (labels[..., None] == torch.arange(classes, device=labels.device)).float()


def mean_loss(protocol: Protocol, logits: Tensor, target: Tensor) -> Tensor:
    """The protocol's loss, as a mean; a target may be any distribution over the classes."""
    if protocol.loss == "bce":  # -y log s(z) - (1 - y) log (1 - s(z))
        return (F.softplus(logits) - target * logits).mean()
    if protocol.loss == "mse":
        return (logits - target).square().mean()
    each: Tensor = -(target * logits.log_softmax(dim=-1)).sum(dim=-1)
    return each.mean()


def descended(
    protocol: Protocol,
    steps: int,
    start: dict[str, Tensor],
    gradients: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """``(start - end) / (learning rate x steps)`` of torch.optim.SGD from empty state, with g the gradient at w.

    A step is ``g + decay w``; with momentum m it is ``v <- m v + g + decay w``, and with Nesterov's ``g + decay w + m
    v``.
    """
    here, velocity, total = start, dict[str, Tensor](), dict[str, Tensor]()
    for step in range(steps):
        move = gradients(here)
        if protocol.weight_decay:
            move = {name: tensor + protocol.weight_decay * here[name] for name, tensor in move.items()}
        if protocol.momentum:
            m = protocol.momentum
            velocity = {name: m * velocity[name] + tensor if velocity else tensor for name, tensor in move.items()}
            move = {name: move[name] + m * velocity[name] for name in move} if protocol.nesterov else velocity
        total = {name: total[name] + tensor if total else tensor for name, tensor in move.items()}
        if step < steps - 1:
            here = {name: here[name] - protocol.learning_rate * tensor for name, tensor in move.items()}
    return {name: tensor / steps for name, tensor in total.items()} if steps > 1 else total


def client_reply(leak: Leak) -> Reply:
    """The function from images to one victim's reply, in units of `mean_gradient`; for Adam, before the signs."""
    protocol, steps = leak.protocol, local_steps(leak)
    network, names, times = stateless(leak.network, protocol.batchnorm), trained(leak.network), summands(protocol)
    batches = turns(protocol)

    def respond(weights: Tensors, buffers: Tensors, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        fixed, turn = {**weights, **buffers}, itertools.cycle(range(batches))

        def gradients(here: Tensors) -> dict[str, Tensor]:
            # nobody knows which example was in which batch, and they are unknown: every so many-th is in one, so that
            # labels in rising order are dealt to all batches alike
            own = slice(next(turn), None, batches)

            def loss(moving: Tensors) -> Tensor:
                value = mean_loss(protocol, functional_call(network, {**fixed, **moving}, (images[own],)), target[own])
                return value if times == 1 else times * value

            found: dict[str, Tensor] = grad(loss)(here)
            return found

        start = {name: weights[name] for name in names}
        return descended(protocol, steps, start, gradients)

    return respond


def weights_along(leak: Leak, images: Tensor, target: Tensor) -> list[dict[str, Tensor]]:
    """Trained weights before each local step of SGD on these images, and after the last, of a stack of one victim.

    Args:
        target: `images classes`; each any distribution over the classes.
    """
    protocol, steps = leak.protocol, local_steps(leak)
    network, times, fixed = stateless(leak.network, protocol.batchnorm), summands(protocol), leak.broadcast(0)
    path: list[dict[str, Tensor]] = []

    def loss(moving: Tensors) -> Tensor:
        return times * mean_loss(protocol, functional_call(network, {**fixed, **moving}, (images,)), target)

    def recorded(here: dict[str, Tensor]) -> dict[str, Tensor]:
        path.append(here)
        gradients: dict[str, Tensor] = grad(loss)(here)
        return gradients

    start = {name: fixed[name] for name in trained(leak.network)}
    moved, scale = descended(protocol, steps, start, recorded), protocol.learning_rate * steps
    return [*path, {name: tensor - scale * moved[name] for name, tensor in start.items()}]


class BatchStatistics(nn.Module):
    """BatchNorm by the batch's own mean and variance, as in training, written out: it keeps no statistics."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, hidden: Tensor) -> Tensor:
        over = [0, *range(2, hidden.ndim)]
        centred = hidden - hidden.mean(over, keepdim=True)
        scaled = centred * (centred.square().mean(over, keepdim=True) + self.eps).rsqrt()
        if self.weight is None:
            return scaled
        shape = (-1, *(1 for _ in range(hidden.ndim - 2)))
        return scaled * self.weight.reshape(shape) + self.bias.reshape(shape)


def stateless(network: nn.Module, batchnorm: str = "train") -> nn.Module:
    """The network with BatchNorm made functional and without dropout, since a victim's dropped units are unknown.

    Args:
        batchnorm: as in the protocol.
    """
    if batchnorm in _STATELESS.setdefault(network, {}):
        return _STATELESS[network][batchnorm]
    copied = copy.deepcopy(network)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.train(child.training and batchnorm == "train")
                if child.training or child.running_mean is None:
                    setattr(parent, name, BatchStatistics(child))
            elif isinstance(child, nn.modules.dropout._DropoutNd):
                child.eval()
            elif isinstance(child, nn.MultiheadAttention):
                child.dropout = 0.0
    _STATELESS[network][batchnorm] = copied
    return copied


_STATELESS: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()
