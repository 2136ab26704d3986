"""The compromised client: an honest one whose channel the adversary can feed with examples of its own.

It replies to `query.auxiliary` with the weights that it would send after one step on each example of the message, in
the precision of an honest client's reply. Where the message also holds images to train on, the steps are taken at the
weights along that training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fedtap.clients.mod import defended
from fedtap.clients.training import UNSHARED_BATCH, UNSHARED_RATE, network, receive, seeded, sgd
from fedtap.simulator.attack import generator
from fedtap.simulator.auxiliary import digest, gradients
from fedtap.simulator.defences.chained import parse
from fedtap.simulator.federation.private_data import PrivateData
from fedtap.simulator.wire.records import record_of, tensors_of


def compute_auxiliary(message: Message, private: PrivateData) -> Message:
    """Auxiliary examples in (`pairs batch channel height width`, in [0, 1]), weights out (`pairs *parameter`).

    The weights are what an honest client would send after one local step on each example: on the wire, pairs are
    rounded as victims' replies are.
    """
    dataset, rate = private.dataset, private.scenario.learning_rate
    net = network(private.scenario.architecture, dataset.shape, len(dataset.classes), private.scenario.batchnorm)
    received = receive(net, message.content.array_records["arrays"])
    before = {name: received[name] for name, _ in net.named_parameters()}
    examples = tensors_of(message.content.array_records["examples"])
    seed, images, labels = private.scenario.seed, examples["images"], examples["labels"]
    defences = parse(private.scenario.defence)
    guarded = defences.step is not None or bool(defences.update)
    # what is drawn differs from message to message; where no pair draws for itself, not all pixels need to be read
    fed = digest(examples if guarded else {"images": images[:1], "labels": labels})
    asked = str(message.content.config_records["config"].get("device", "cpu"))
    device = asked if torch.cuda.is_available() else "cpu"  # the adversary's own machine may have no GPU
    with seeded(seed, "auxiliary", fed):
        pairs = range(len(images) if guarded else 0)  # each is an exchange, and draws for itself
        draws = [generator(seed, "defence", fed, pair) for pair in pairs]
        stops: Iterable[slice] = [slice(None)]
        drifts = "drift" in message.content.array_records
        if drifts:
            stops = stops_along(net, tensors_of(message.content.array_records["drift"]))
        step, parts = defences.step, []
        for due in stops:
            some = images[due], labels[due]
            gradient = step.stacked(net, *some, draws[due]) if step else gradients(net, *some, device)
            here = {name: parameter.detach() for name, parameter in net.named_parameters()}
            after = {name: torch.sub(here[name], gradient[name], alpha=rate) for name in before}
            if drifts:  # as a drifted victim: the server's weights, and the change on top of them
                after = {name: before[name] - (here[name] - after[name]) for name in before}
            parts.append(after)
        sent = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in before}
        if defences.update:
            sent = defended(defences.update.stacked, before, sent, rate, draws)
    content = RecordDict(
        {"weights": record_of(sent), "metrics": MetricRecord({"num-examples": len(examples["images"])})}
    )
    return Message(content, reply_to=message)


def stops_along(net: nn.Module, drift: dict[str, Tensor]) -> Iterator[slice]:
    """Train on the images fed, as a victim does by itself, and stop on the way for the examples that are due.

    Args:
        drift: `images` as bytes, `labels`, and `steps`, of each example, in rising order: after how many it is due.
    """
    images, taken = drift["images"].float() / 255, 0
    for due, count in zip(*torch.unique_consecutive(drift["steps"], return_counts=True), strict=True):
        sgd(net, images, drift["labels"], int(due) - taken, UNSHARED_BATCH, UNSHARED_RATE, before=taken)
        first, taken = int((drift["steps"] < due).sum()), int(due)
        yield slice(first, first + int(count))
