"""The honest client: trains on its own data when told to, and answers nothing else."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message

from clients.training import answer, network, receive, sgd
from simulator.scenario import PrivateData


def train(order: Message, context: Context, private: PrivateData) -> Message:
    """One round of local training.

    Raises:
        KeyError, RuntimeError: the order carries another model's weights.
    """
    scenario, world = private.scenario, private.world
    client = int(context.node_config["partition-id"])
    config: ConfigRecord = order.content.config_records["config"]
    images, labels = private(client, int(config["server-round"]))  # type: ignore[arg-type]
    net = network(scenario.model, world.shape, len(world.classes))
    receive(net, order.content.array_records["arrays"])
    batch = min(scenario.batch, len(images))
    loss = sgd(net, images, labels, scenario.steps, batch, scenario.learning_rate)
    return answer(order, net, len(images), client, loss)
