"""The honest client: trains on its own data when asked to, and replies to nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from flwr.app import ConfigRecord, Context, Message
from torch import Tensor, nn

from fedtap.clients.mod import defended
from fedtap.clients.training import (
    Backward,
    carried,
    drifted,
    network,
    plain_backward,
    receive,
    seeded,
    sgd,
    weights_reply,
)
from fedtap.simulator.attack import generator
from fedtap.simulator.auxiliary import gradients
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.defences.layers import batchnorms, inserted
from fedtap.simulator.federation.private_data import PrivateData
from fedtap.simulator.leaks import float_buffers
from fedtap.simulator.wire.records import rows_as_records


def train_on_images(message: Message, context: Context, private: PrivateData) -> Message:
    """One round of local training, defended as the scenario says.

    Raises:
        KeyError, RuntimeError: the message carries another model's weights.
    """
    scenario, dataset = private.scenario, private.dataset
    client = int(context.node_config["partition-id"])
    config: ConfigRecord = message.content.config_records["config"]
    rnd = int(config["server-round"])  # type: ignore[arg-type]
    images, labels = private(client, rnd)
    defences = parse(scenario.defence)
    net = network(scenario.architecture, dataset.shape, len(dataset.classes), scenario.batchnorm)
    before = receive(net, message.content.array_records["arrays"])
    drift_norm = 0.0 if scenario.local_samples else None
    if private.conduct(client, rnd) == "silent":  # it takes part, and sends the weights that it was sent
        return weights_reply(message, carried(net), len(images), client, drift_norm)
    here = before
    victim = private.victim(client, rnd)
    if scenario.local_samples and victim is not None:
        here = drifted(before, private, private.drift(victim))
        net.load_state_dict(here, strict=False)
        drift_norm = _distance(here, before)
    batch = min(scenario.batch_in(rnd), len(images))
    backward: Backward = plain_backward
    if defences.step is not None:
        backward = partial(defences.step.backward, draw=generator(scenario.seed, "step", client, rnd))
    with seeded(scenario.seed, "training", client, rnd):
        sgd(net, images, labels, scenario.local_steps, batch, scenario.learning_rate, backward)
    after = {name: parameter.detach() for name, parameter in net.named_parameters()}
    if here is not before:  # what is sent is the server's weights, and the change on top of them
        after = {name: before[name] - (here[name] - after[name]) for name in after}
    if defences.update:
        draw = generator(scenario.seed, "defence", client, rnd)
        after = defended(defences.update, before, after, scenario.learning_rate, draw)
    if defences.update or here is not before:
        net.load_state_dict(after, strict=False)
    return weights_reply(message, carried(net), len(images), client, drift_norm)


LANES = 128
"""Clients whose gradients are computed at once, at most."""


def train_at_once(orders: Sequence[tuple[Message, Context]], private: PrivateData) -> dict[int, Message]:
    """Replies to those of the orders, by their places, that are one plain step from the same weights.

    Each client is a lane of one batched gradient, and replies as `train_on_images` would, to the last digits of
    float32. Left to that are local steps that follow each other, defences, drift, networks that draw (dropout) or that
    keep statistics of what they see, and an order that differs from the first.
    """
    scenario, dataset = private.scenario, private.dataset
    net = network(scenario.architecture, dataset.shape, len(dataset.classes), scenario.batchnorm)
    defences = parse(scenario.defence)
    guarded = defences.step is not None or bool(defences.update) or bool(inserted(net))
    if scenario.local_steps > 1 or scenario.local_samples or guarded or _draws_or_keeps(net):
        return {}
    content = orders[0][0].content
    arrays = content.array_records["arrays"]
    rnd = int(content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    lanes: dict[tuple[int, ...], list[tuple[int, Tensor, Tensor]]] = {}
    for place, (message, context) in enumerate(orders):
        client = int(context.node_config["partition-id"])
        same = message.content is content or (
            message.content["arrays"] is arrays and message.content["config"]["server-round"] == rnd
        )
        if same and private.conduct(client, rnd) != "silent":
            images, labels = private(client, rnd)
            lanes.setdefault(tuple(images.shape), []).append((place, images, labels))
    receive(net, arrays)
    here, kept = {name: weight.detach() for name, weight in net.named_parameters()}, float_buffers(net)
    replies = {}
    for group in lanes.values():
        for first in range(0, len(group), LANES):
            some = group[first : first + LANES]
            found = gradients(net, torch.stack([own for _, own, _ in some]), torch.stack([own for *_, own in some]))
            after = {name: torch.sub(here[name], found[name], alpha=scenario.learning_rate) for name in found}
            after |= {name: buffer.expand(len(some), *buffer.shape) for name, buffer in kept.items()}
            for (place, images, _), record in zip(some, rows_as_records(after), strict=True):
                message, context = orders[place]
                client = int(context.node_config["partition-id"])
                replies[place] = weights_reply(message, record, len(images), client)
    return replies


def _draws_or_keeps(net: nn.Module) -> bool:
    """Whether two passes of the network in training mode may differ."""
    return any(layer.training for layer in batchnorms(net)) or any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in net.modules()
    )


def _distance(here: dict[str, Tensor], there: dict[str, Tensor]) -> float:
    """``|here - there| / |there|`` over all tensors."""
    apart = sum(float((here[name] - there[name]).double().square().sum()) for name in there)
    return math.sqrt(apart / sum(float(there[name].double().square().sum()) for name in there))
