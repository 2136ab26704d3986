"""The honest client: trains on its own data when asked to, and replies to nothing else."""

from __future__ import annotations

import math
from functools import partial

from flwr.app import ConfigRecord, Context, Message
from torch import Tensor

from fedtap.clients.mod import defended
from fedtap.clients.training import Backward, drifted, network, plain_backward, receive, seeded, sgd, weights_reply
from fedtap.simulator.attack import generator
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.federation.private_data import PrivateData


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
        return weights_reply(message, net, len(images), client, drift_norm)
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
    return weights_reply(message, net, len(images), client, drift_norm)


def _distance(here: dict[str, Tensor], there: dict[str, Tensor]) -> float:
    """``|here - there| / |there|`` over all tensors."""
    apart = sum(float((here[name] - there[name]).double().square().sum()) for name in there)
    return math.sqrt(apart / sum(float(there[name].double().square().sum()) for name in there))
