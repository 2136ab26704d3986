"""Play a scenario's rounds over a Flower Grid, with a tap on it: a stock strategy on one side, leaks on the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy
from jaxtyping import Int
from torch import Tensor, nn

from simulator.attack import generator, numpy_seeded
from simulator.defence import described
from simulator.errors import FedtapError
from simulator.leaks import ROUNDING, GradientLeak, Leak, float_buffers, mean
from simulator.listeners import SECURE, Masked, difference, hear, isolated, listener
from simulator.models import build, with_weights
from simulator.practice import Pairs, chunk_size, gradients, trainings
from simulator.records import tensors_of
from simulator.scenario import PrivateData, Scenario
from simulator.suited import check_model, check_summed
from simulator.wiretap import Wiretap, partition_of
from simulator.worlds import Side

METRICS = ("num-examples", "partition")
"""What fedtap's clients report beside their update; where victims drift, `moved` too."""

DRIFT_SHARE = 3
"""The compromised client trains on one public image in so many, drawn anew each time. Trainings on all of them end at
nearly the same weights; on a third they stray from there about as far as a client does with as many of its own."""

DRIFT_STEPS, DRIFT_STOPS = 6500, 40
"""Steps of such a training, a little more than the twenty epochs on 10,000 images after which GIT's paper looks, and
how often it stops for examples on the way: half the times log-uniform over it, half uniform."""

HELD_OUT = 2000
"""Public images by which the strength of a defence is chosen, at most."""

PRACTICE = "query.practice"
"""Message type under which the compromised client is fed public examples."""


@dataclass
class Heard:
    """What the tap brought in: leaks and failures by (client, round), and each client's node."""

    leaks: dict[tuple[int, int], Leak] = field(default_factory=dict)
    failures: dict[tuple[int, int], str] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    lost: dict[int, list[str]] = field(default_factory=dict)
    """Round -> why answers failed that named no client."""
    start: ArrayRecord = field(default_factory=ArrayRecord)
    """The weights before any training."""
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    """The weights of the last attacked round, before it."""
    moved: dict[tuple[int, int], float] = field(default_factory=dict)
    """How far victims say that their weights had drifted, as a share of their length."""

    def practised_at(self, when: str) -> ArrayRecord:
        """The weights at which the adversary practises."""
        return self.start if when == "start" else self.arrays

    accuracy: float | None = None
    """Test accuracy, 0 to 1, of the weights that the first victims were sent; None where nothing was trained."""
    held_out: float | None = None
    """The same on public images, by which a defence's strength is chosen; None where none is."""

    def why_missing(self, client: int, rnd: int) -> str:
        """The reason there is no leak of this client in this round."""
        return self.failures.get((client, rnd)) or "; ".join(self.lost.get(rnd, [])) or "the client did not answer"


def clients_on(grid: Grid, scenario: Scenario) -> int:
    """How many honest clients this grid has for the scenario: all nodes but the compromised one.

    Raises:
        FedtapError: the scenario names another number.
    """
    nodes = len(list(grid.get_node_ids()))
    clients = scenario.clients or nodes - 1
    if clients < 1 or nodes != clients + 1:
        raise FedtapError(
            f"The federation has {nodes} nodes, and {scenario.name} needs {max(clients, 1) + 1} of them "
            "(its honest clients and the compromised one): start as many SuperNodes, or name --clients."
        )
    return clients


def play(
    scenario: Scenario, grid: Grid, private: PrivateData, part: int = 0, strategy: Strategy | None = None
) -> Heard:
    """Train and listen: `rounds` of training, then as many attacked rounds as the victims need.

    Args:
        part: the scenario's place in the run's plan, by which clients know what is played.
        strategy: a Flower strategy; FedAvg over all clients where none is given.
    """
    world, clients = private.world, private.clients
    protocol = scenario.protocol(world)
    skeleton = build(scenario.architecture, world.shape, len(world.classes))
    net = build(scenario.architecture, world.shape, len(world.classes), seed=scenario.weights_seed)
    check_model(described(scenario.defence), net, world.shape)
    if scenario.summed > 1:
        check_summed(net)
    if scenario.weights:
        with_weights(net, Path(scenario.weights))
    hearing = listener(scenario.listener)
    heard = Heard()
    masked: dict[int, dict[int, Masked]] = {}

    def ear(order: Message, answer: Message) -> None:
        if order.metadata.message_type != MessageType.TRAIN:
            return
        rnd = int(order.content["config"]["server-round"])  # type: ignore[arg-type]
        if answer.has_error():
            heard.lost.setdefault(rnd, []).append(f"a client failed: {answer.error.reason}")
            return
        client, node = partition_of(answer), answer.metadata.src_node_id
        again = (client, rnd) in heard.leaks or client in masked.get(rnd, {})
        if heard.nodes.setdefault(client, node) != node or again:
            heard.lost.setdefault(rnd, []).append(f"a client answered in the name of client {client}")
            raise FedtapError(f"Node {node} answers in the name of client {client}, which is another node's.")
        if scenario.listener == SECURE and client > clients:
            heard.lost.setdefault(rnd, []).append(f"a client answered as number {client}")
            raise FedtapError(f"Node {node} answers as client {client}, and the sum is of clients 0 to {clients}.")
        try:
            _as_expected(order.content, answer.content, client, metrics_of(scenario))
            leak = hear(order.content, answer.content, protocol, skeleton, client, rnd)
        except FedtapError as error:
            heard.failures[client, rnd] = f"the client answered nonsense: {error}"
            raise
        metrics = answer.content.metric_records["metrics"]
        if private.victim(client, rnd) is not None:
            heard.moved[client, rnd] = float(metrics.get("moved", 0.0))  # type: ignore[arg-type]
        if scenario.listener == SECURE:
            if rnd > scenario.rounds:
                masked.setdefault(rnd, {})[client] = Masked(leak, float(metrics["num-examples"]))  # type: ignore[arg-type]
        elif private.victim(client, rnd) is not None:
            heard.leaks[client, rnd] = hearing(leak)

    def unmask(rnd: int) -> None:
        try:
            heard.leaks[0, rnd] = hearing(isolated(masked.pop(rnd), clients, scenario.others))
        except FedtapError as error:
            heard.failures[0, rnd] = "; ".join([str(error), *heard.lost.get(rnd, [])])

    def evaluate(rnd: int, arrays: ArrayRecord) -> MetricRecord | None:
        if rnd in masked:
            unmask(rnd)
        if rnd == 0:
            heard.start = arrays
        if rnd < scenario.rounds + scenario.attacked_rounds(clients):
            heard.arrays = arrays
        foreign = bool(scenario.victims_world)  # the victims' labels are then another world's
        if scenario.rounds and rnd == scenario.rounds and not foreign:
            heard.accuracy = accuracy(net, arrays, world.victims)
            if scenario.accuracy_loss:
                heard.held_out = accuracy(net, arrays, world.public, HELD_OUT)
            return MetricRecord({"accuracy": heard.accuracy})
        return None

    if strategy is None:
        nodes: Any = {"min_train_nodes": clients + 1, "min_available_nodes": clients + 1}
        still = scenario.rounds if scenario.repeats > 1 else None
        strategy = Still(still, fraction_evaluate=0.0, **nodes)
    strategy = _with_central_dp(strategy, scenario, clients + 1)
    tensors = dict(net.named_parameters()) | float_buffers(net)
    with numpy_seeded(generator(scenario.seed, "central_dp").initial_seed()):
        strategy.start(
            Wiretap(grid, ear),
            ArrayRecord({name: tensor.detach() for name, tensor in tensors.items()}),
            num_rounds=scenario.rounds + scenario.attacked_rounds(clients),
            train_config=ConfigRecord({"part": part}),
            evaluate_fn=evaluate,
        )
    if scenario.repeats > 1:
        heard.leaks = _means(heard.leaks, private)
    return heard


class Still(FedAvg):
    """FedAvg that from round `last` on sends the same weights again; None for never."""

    def __init__(self, last: int | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.last = last

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        return (None if self.last is not None and server_round > self.last else arrays), metrics


def _means(leaks: dict[tuple[int, int], Leak], private: PrivateData) -> dict[tuple[int, int], Leak]:
    """Each victim's mean over the rounds in which it was heard, under the name of the first it was to answer in."""
    means = {}
    for client, first in private.names():
        rounds = range(first, first + private.scenario.repeats)
        if heard := [leaks[client, rnd] for rnd in rounds if (client, rnd) in leaks]:
            kept = dataclasses.replace(mean(heard), rounds=torch.tensor([first]))
            means[client, first] = kept
    return means


def _with_central_dp(strategy: Strategy, scenario: Scenario, nodes: int) -> Strategy:
    """The strategy in Flower's wrapper, if the server is to clip what it hears and to add noise to the average.

    McMahan, Ramage, Talwar and Zhang 2018, https://arxiv.org/abs/1710.06963. The noise on an entry of the average has
    ``noise_multiplier clip / nodes``; `clip` is in the gradient's units, as the clients' are. It protects the model
    from those who are sent it, and nobody from the server, which hears what it clips. Where one client fails, Flower's
    wrapper leaves the weights as they are.
    """
    for part in described(scenario.defence):
        if part.name == "central_dp":
            clip = part["clip"] * scenario.learning_rate
            return DifferentialPrivacyServerSideFixedClipping(strategy, part["noise_multiplier"], clip, nodes)
    return strategy


def metrics_of(scenario: Scenario) -> tuple[str, ...]:
    """Names of the numbers that clients report: of all the same, as FedAvg demands."""
    return (*METRICS, "moved") if scenario.local_samples else METRICS


def _as_expected(order: RecordDict, answer: RecordDict, client: int, reported: Sequence[str]) -> None:
    """Refuse what FedAvg could not average with the others' answers: it would end the run for all of them."""
    for kind, mine, theirs in (
        ("arrays", answer.array_records, {"arrays": order["arrays"].keys()}),
        ("metrics", answer.metric_records, {"metrics": reported}),
    ):
        if {name: set(record) for name, record in mine.items()} != {name: set(keys) for name, keys in theirs.items()}:
            raise FedtapError(
                f"Client {client} sent other {kind} than the rest, so they cannot be averaged: "
                f"send one record named {kind!r} with the keys that fedtap's clients send."
            )
    if any(isinstance(value, list) for value in answer.metric_records["metrics"].values()):
        raise FedtapError(f"Client {client} sent a list where a metric is one number: send numbers.")


def accuracy(net: nn.Module, arrays: ArrayRecord, side: Side, most: int = 0) -> float:
    """Share of a side's images, or of its first `most`, that these weights classify right; BatchNorm in eval mode."""
    net.load_state_dict(tensors_of(arrays), strict=False)
    net.eval()
    count, right = min(len(side), most or len(side)), 0
    with torch.no_grad():
        for chunk in torch.split(torch.arange(count), 256):
            images, labels = side.batch(chunk)
            right += int((net(images).argmax(1) == labels).sum())
    return right / count


def practice(
    grid: Grid, scenario: Scenario, private: PrivateData, heard: Heard, images: Tensor, labels: Tensor, part: int = 0
) -> Iterator[Pairs]:
    """Feed public examples to the compromised client, and hear the weights it sends back, one chunk at a time.

    The gradient is in their difference to the weights it was sent, rounded as a victim's is. Where the scenario's
    source is the server, it computes those weights itself.
    Pairs carry the weights that it sent, also where the client has trained since: so does a drifted victim's leak, and
    an attack that takes them for the client's own is as wrong of the one as of the other.

    Args:
        heard: what `play` returned: it names the compromised client's node and the weights in force.
        images: `pairs batch channel height width`, in [0, 1]; labels: `pairs batch`.

    Raises:
        FedtapError: the compromised client has not been heard, or does not answer.
    """
    skeleton = build(scenario.architecture, private.world.shape, len(private.world.classes))
    chunk, arrays = chunk_size(skeleton), tensors_of(heard.practised_at(scenario.practised))
    chunks = [
        (number, which)
        for number, rows in enumerate(trainings(len(images), scenario.drifts))
        for which in torch.split(rows, chunk)
    ]
    for number, which in chunks:
        some, named = images[which], labels[which]
        if scenario.source == "server":
            network = build(scenario.architecture, private.world.shape, len(private.world.classes), seed=0)
            network.load_state_dict(arrays, strict=False)
            found = gradients(network, some, named)
            sent = {name: arrays[name] - scenario.learning_rate * gradient for name, gradient in found.items()}
        else:
            sent = _fed(grid, private, heard, some, named, part, number)
        scale = -1 / scenario.learning_rate
        leak = GradientLeak(
            observed={name: difference(arrays[name], after, scale) for name, after in sent.items()},
            protocol=dataclasses.replace(scenario.protocol(private.world), steps=1, batch=some.shape[1]),
            network=skeleton,
            weights={name: arrays[name] for name, _ in skeleton.named_parameters()},
            buffers={name: arrays[name] for name in float_buffers(skeleton)},
            clients=torch.full((len(some),), private.clients),
            rounds=torch.zeros(len(some), dtype=torch.long),
            restarts=which,
            resolution=ROUNDING * -scale,
        )
        yield Pairs(listener(scenario.listener)(leak), some, named)  # type: ignore[arg-type]


def _fed(
    grid: Grid, private: PrivateData, heard: Heard, images: Tensor, labels: Tensor, part: int, number: int
) -> dict[str, Tensor]:
    """The weights with which the compromised client answers each of these examples; it may be told to train first."""
    if private.clients not in heard.nodes:
        raise FedtapError(
            "The compromised client has not answered a round yet, so its node is unknown: play one first."
        )
    content = RecordDict(
        {
            "arrays": heard.practised_at(private.scenario.practised),
            "examples": ArrayRecord({"images": images, "labels": labels}),
            "config": ConfigRecord({"part": part}),
        }
    )
    if private.scenario.drifts:
        draw, public = generator(private.scenario.seed, "drift", number), private.world.public
        which = torch.randperm(len(public), generator=draw)[: -(-len(public) // DRIFT_SHARE)]
        steps = stops(draw).repeat(-(-len(images) // DRIFT_STOPS))[: len(images)].sort().values
        content["drift"] = ArrayRecord({"images": public.images[which], "labels": public.labels[which], "steps": steps})
    order = Message(content, heard.nodes[private.clients], PRACTICE)
    answers = list(grid.send_and_receive([order]))
    if not answers or answers[0].has_error():
        why = answers[0].error.reason if answers else "no answer"
        raise FedtapError(f"The compromised client did not practise ({why}): check that its ClientApp is fedtap's.")
    return tensors_of(answers[0].content.array_records["weights"])


def stops(draw: torch.Generator) -> Int[Tensor, " stops"]:
    """After how many steps a training stops for examples, shuffled."""
    drawn = torch.rand(DRIFT_STOPS, generator=draw)
    half = DRIFT_STOPS // 2
    steps = torch.cat([DRIFT_STEPS ** drawn[:half], DRIFT_STEPS * drawn[half:]]).round().long()
    return steps[torch.randperm(DRIFT_STOPS, generator=draw)]
