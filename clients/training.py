"""What every client does at a train message: plain SGD from the broadcast weights, and weights back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fedtap.simulator.attack import generator
from fedtap.simulator.auxiliary import digest
from fedtap.simulator.defences.layers import in_training, inserted, training_loss
from fedtap.simulator.federation.private_data import PrivateData
from fedtap.simulator.leaks import float_buffers
from fedtap.simulator.models.registry import Shape, build
from fedtap.simulator.wire.records import record_of, tensors_of


@lru_cache(maxsize=4)
def network(model: str, shape: Shape, classes: int, batchnorm: str = "train") -> nn.Module:
    """A network in training mode to fill with weights, kept between rounds: building one costs as much as a step.

    Args:
        batchnorm: `train`, or `eval` for BatchNorm by the running statistics.
    """
    net = in_training(build(model, shape, classes, seed=0), batchnorm)
    for layer in inserted(net):
        layer.draws = True
    return net


@contextmanager
def seeded(*names: int | str) -> Iterator[None]:
    """What a model draws (dropout) depends on these names alone, and leaves torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would remember for a GPU where it was called from, which takes longer than a small step
        torch.default_generator.manual_seed(generator(*names).initial_seed())
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Clients share the cores, and small tensors gain nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def receive(net: nn.Module, arrays: ArrayRecord) -> dict[str, Tensor]:
    """Set the network's parameters and buffers to the server's, and return those.

    Raises:
        KeyError, RuntimeError: the server sent another model's.
    """
    sent = tensors_of(arrays)
    wanted = dict(net.named_parameters()) | float_buffers(net)
    if sent.keys() != wanted.keys():
        raise KeyError(f"the server sent {len(sent)} tensors that are not those of this client's model")
    net.load_state_dict(sent, strict=False)
    return sent


def carried(net: nn.Module) -> ArrayRecord:
    """What is sent: parameters and floating point buffers."""
    tensors = dict(net.named_parameters()) | float_buffers(net)
    return record_of(tensors)


Backward = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain_backward(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the loss."""
    loss = training_loss(net, images, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def sgd(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    batch: int,
    learning_rate: float,
    backward: Backward = plain_backward,
    before: int = 0,
) -> None:
    """`steps` steps of plain SGD on the mean cross-entropy, batch after batch, round and round.

    Args:
        images: `images channel height width`, in [0, 1].
        labels: `images`.
        backward: what leaves a gradient behind; the loss that it returns is sent to nobody.
        before: steps already taken, after which it goes on.
        net: in training mode, but for BatchNorm where that is frozen.
    """
    optimiser = torch.optim.SGD(net.parameters(), lr=learning_rate)
    for step in range(before, before + steps):
        at = step * batch % len(images)
        optimiser.zero_grad()
        backward(net, images[at : at + batch], labels[at : at + batch])
        optimiser.step()


UNSHARED_RATE, UNSHARED_BATCH = 0.01, 32
"""Learning rate and batch of the training that a victim does by itself; GIT's, https://arxiv.org/abs/2505.20026."""


def drifted(before: dict[str, Tensor], private: PrivateData, drift: int = 0) -> dict[str, Tensor]:
    """The weights after a victim's own, unshared training from these; remembered, since many victims share it.

    Args:
        drift: number of the training.
    """
    where = (digest(before), private.scenario, private.dataset.name)
    if _DRIFTED.keys() != {where}:  # another federation's, or another round's
        _DRIFTED.clear()
    kept = _DRIFTED.setdefault(where, {})
    if drift not in kept:
        scenario, dataset = private.scenario, private.dataset
        net = network(scenario.architecture, dataset.shape, len(dataset.classes), scenario.batchnorm)
        net.load_state_dict(before, strict=False)
        images, labels = private.unshared(drift)
        names = ("unshared", drift) if drift else ("unshared",)
        draw = generator(scenario.seed, *names)
        with seeded(scenario.seed, *names):
            for _ in range(scenario.local_epochs):
                shuffled = torch.randperm(len(images), generator=draw)
                steps = -(-len(shuffled) // UNSHARED_BATCH)
                sgd(net, images[shuffled], labels[shuffled], steps, UNSHARED_BATCH, UNSHARED_RATE)
        kept[drift] = {name: tensor.detach().clone() for name, tensor in tensors_of(carried(net)).items()}
    return kept[drift]


_DRIFTED: dict[object, dict[int, dict[str, Tensor]]] = {}
"""Federation and weights -> training -> weights after it: clients reply in any order."""


def weights_reply(
    message: Message, arrays: ArrayRecord, examples: int, partition: int, drift_norm: float | None = None
) -> Message:
    """The reply FedAvg expects: one ArrayRecord, one MetricRecord, with no more than the server needs.

    Args:
        drift_norm: where victims drift, distance of the client's weights from the server's before the step, as a share
            of their norm: for the scorer alone. None is not sent.
    """
    metrics = MetricRecord({"num-examples": examples, "partition": partition})
    if drift_norm is not None:
        metrics["drift_norm"] = drift_norm
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
