"""The honest client: trains on its own data when told to, and answers nothing else."""

from __future__ import annotations

import torch
from flwr.app import ConfigRecord, Context, Message

from clients.defences import parse
from clients.training import answer, network, receive, sgd
from simulator.attack import generator
from simulator.records import tensors_of
from simulator.scenario import PrivateData


def train(order: Message, context: Context, private: PrivateData) -> Message:
    """One round of local training, defended as the scenario says.

    Raises:
        KeyError, RuntimeError: the order carries another model's weights.
    """
    scenario, world = private.scenario, private.world
    client = int(context.node_config["partition-id"])
    config: ConfigRecord = order.content.config_records["config"]
    rnd = int(config["server-round"])  # type: ignore[arg-type]
    images, labels = private(client, rnd)
    net = network(scenario.model, world.shape, len(world.classes))
    receive(net, order.content.array_records["arrays"])
    batch = min(scenario.batch, len(images))
    with torch.random.fork_rng(devices=[]):  # what a model draws (dropout) depends on the client and round alone
        torch.manual_seed(generator(scenario.seed, "training", client, rnd).initial_seed())
        loss = sgd(net, images, labels, scenario.steps, batch, scenario.learning_rate)
    if (defence := parse(scenario.defence)) is not None:
        before, after = tensors_of(order.content.array_records["arrays"]), dict(net.named_parameters())
        summed = {name: (before[name] - after[name].detach()) / scenario.learning_rate for name in after}
        sent = defence(summed, generator(scenario.seed, "defence", client, rnd))
        net.load_state_dict({name: before[name] - scenario.learning_rate * sent[name] for name in after}, strict=False)
    return answer(order, net, len(images), client, loss)
