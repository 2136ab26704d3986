"""Play a scenario's rounds over a Flower Grid, with a tap on it: a stock strategy on one side, leaks on the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from jaxtyping import Int
from torch import Tensor, nn

from fedtap.simulator.attack import generator, numpy_seeded
from fedtap.simulator.auxiliary import Pairs, chunk_size, gradients, trainings
from fedtap.simulator.data.images import Side
from fedtap.simulator.defences.chained import check_model
from fedtap.simulator.defences.defence import HOW_TO_FIX, ServerDefence
from fedtap.simulator.defences.layers import in_training
from fedtap.simulator.defences.notation import averaged, described
from fedtap.simulator.errors import ClientError, FedtapError, short
from fedtap.simulator.federation.exchanges import METRICS, ExchangeReader, kind_of_array
from fedtap.simulator.federation.private_data import PrivateData
from fedtap.simulator.federation.settings import SECURE, Federation
from fedtap.simulator.leaks import ROUNDING, GradientLeak, Leak, float_buffers, mean
from fedtap.simulator.models.registry import build, with_weights
from fedtap.simulator.wire.records import reading, record_named, record_of, tensors_of
from fedtap.simulator.wire.roll import call
from fedtap.simulator.wire.threat_models import Masked, difference, isolated, threat_model
from fedtap.simulator.wire.wiretap import Wiretap

DRIFT_SHARE = 3
"""The compromised client trains on one public image in so many, drawn anew each time. Trainings on all of them end at
nearly the same weights; on a third they stray from there about as far as a client does with as many of its own."""

DRIFT_STEPS, DRIFT_STOPS = 6500, 40
"""Steps of such a training, a little more than the twenty epochs on 10,000 images after which GIT's paper looks, and
how often it stops for examples on the way: half the times log-uniform over it, half uniform."""

HELD_OUT = 2000
"""Public images by which the strength of a defence is chosen, at most."""

PRACTICE = "query.auxiliary"
"""Message type under which the compromised client is fed public examples."""

_LONGEST = 260
"""Characters of the reason that a row gives for a leak that is missing."""

HUGE = 1e18
"""Weight whose square is nearly the largest number of float32."""


@dataclass
class Heard:
    """What the tap brought in: leaks and failures by (client, round), and each client's node."""

    leaks: dict[tuple[int, int], Leak] = field(default_factory=dict)
    failures: dict[tuple[int, int], str] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    lost: dict[int, list[str]] = field(default_factory=dict)
    """Round -> why nodes were refused that are no client."""
    start: ArrayRecord = field(default_factory=ArrayRecord)
    """The weights before any training."""
    arrays: ArrayRecord = field(default_factory=ArrayRecord)
    """The weights of the last attacked round, before it."""
    drift_norm: dict[tuple[int, int], float] = field(default_factory=dict)
    """How far victims say that their weights had drifted, as a share of their length."""
    dropped: int = 0
    """Answers that nobody had asked for."""

    def auxiliary_weights(self, when: str) -> ArrayRecord:
        """The weights at which the auxiliary pairs are computed."""
        return self.start if when == "start" else self.arrays

    accuracy: float | None = None
    """Test accuracy, 0 to 1, of the weights that the first victims were sent; None where nothing was trained."""
    held_out: float | None = None
    """The same on public images, by which a defence's strength is chosen; None where none is."""

    def why_missing(self, client: int, rnd: int) -> str:
        """The reason there is no leak of this client in this round."""
        if (client, rnd) in self.failures:
            return self.failures[client, rnd]
        lost = " ".join(dict.fromkeys(self.lost.get(rnd, [])))
        if not lost and self.dropped:
            lost = f"Of what came, {self.dropped} answers were dropped, since nobody had asked for them."
        return f"client {client} did not answer{f': {short(lost, _LONGEST)}' if lost else ', or was not connected'}"


def clients_on(grid: Grid, scenario: Federation) -> int:
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
    scenario: Federation,
    grid: Grid,
    private: PrivateData,
    part: int = 0,
    strategy: Strategy | None = None,
    keep: Callable[[Leak], None] | None = None,
) -> Heard:
    """Train and listen: `rounds` of training, then as many attacked rounds as the victims need.

    Args:
        part: the scenario's place in the run's plan, by which clients know what is played.
        strategy: a Flower strategy; FedAvg over all clients where none is given.
        keep: is given each leak as it is observed, before the next reply is read.
    """
    dataset, clients = private.dataset, private.clients
    protocol = scenario.protocol(dataset)
    skeleton = build(scenario.architecture, dataset.shape, len(dataset.classes))
    net = build(scenario.architecture, dataset.shape, len(dataset.classes), seed=scenario.weights_seed)
    check_model(scenario.defence, net, dataset.shape)
    if scenario.summed > 1 and scenario.batchnorm == "train":
        check_summed(net)
    if scenario.weights:
        with_weights(net, Path(scenario.weights))
    hearing = threat_model(scenario.threat_model)
    server = servers(scenario.defence)
    exchanges = ExchangeReader(skeleton, protocol, metrics_of(scenario), server)
    who = call(grid)
    heard = Heard(nodes=who.nodes)
    masked: dict[int, dict[int, Masked]] = {}

    def ear(order: Message, answer: Message) -> None:
        if order.metadata.message_type != MessageType.TRAIN:
            return
        rnd = int(order.content["config"]["server-round"])  # type: ignore[arg-type]
        try:
            client = who.client(order)
        except FedtapError as error:
            heard.lost.setdefault(rnd, []).append(str(error))
            raise
        if answer.has_error():
            heard.failures[client, rnd] = f"client {client} failed: {short(answer.error.reason, _LONGEST)}"
            return
        attacked = private.victim(client, rnd) is not None
        summed = scenario.threat_model == SECURE and rnd > scenario.rounds
        try:
            with reading(client):
                leak = None
                if attacked or summed:
                    leak = exchanges.leak(order.content, answer.content, client, rnd)
                else:
                    exchanges.check(order.content, answer.content, client)
        except FedtapError as error:
            heard.failures[client, rnd] = f"the client answered nonsense: {short(error, _LONGEST)}"
            raise
        metrics = record_named("metrics", answer.content, MetricRecord)
        if attacked:
            heard.drift_norm[client, rnd] = float(metrics.get("drift_norm", 0.0))  # type: ignore[arg-type]
        if leak is None:
            return
        if summed:
            masked.setdefault(rnd, {})[client] = Masked(leak, float(metrics["num-examples"]))  # type: ignore[arg-type]
        else:
            observed(client, rnd, hearing(leak))

    def observed(client: int, rnd: int, leak: Leak) -> None:
        heard.leaks[client, rnd] = leak
        if keep is not None:
            keep(leak)

    def unmask(rnd: int) -> None:
        failed = [why for (_, at), why in heard.failures.items() if at == rnd] + heard.lost.get(rnd, [])
        answers = dict(sorted(masked.pop(rnd, {}).items()))  # a sum should not depend on who answers first
        try:
            observed(0, rnd, hearing(isolated(answers, clients, scenario.others)))
        except FedtapError as error:
            why = f"{short(' '.join(failed), _LONGEST)}; so: " if failed else ""
            heard.failures[0, rnd] = f"{why}{error}"

    def evaluate(rnd: int, arrays: ArrayRecord) -> MetricRecord | None:
        if scenario.threat_model == SECURE and rnd > scenario.rounds:
            unmask(rnd)
        if rnd == 0:
            heard.start = arrays
        if rnd < scenario.rounds + scenario.attacked_rounds(clients):
            heard.arrays = arrays
        foreign = bool(scenario.target_dataset)  # the victims' labels are then another dataset's
        if scenario.rounds and rnd == scenario.rounds and not foreign:
            heard.accuracy = accuracy(net, arrays, dataset.target)
            if scenario.accuracy_loss:
                heard.held_out = accuracy(net, arrays, dataset.auxiliary, HELD_OUT)
            return MetricRecord({"accuracy": heard.accuracy})
        return None

    if strategy is None:
        still = scenario.rounds if scenario.repeats > 1 else None
        # all nodes that are there: a strategy that waits for one that went away waits for ever
        strategy = Still(still, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    for defence in server:
        strategy = defence.around(strategy, scenario.learning_rate, clients + 1)
    tensors = dict(net.named_parameters()) | float_buffers(net)
    tap = Wiretap(grid, ear)
    with numpy_seeded(generator(scenario.seed, "central_dp").initial_seed()):
        strategy.start(
            tap,
            record_of(tensors),
            num_rounds=scenario.rounds + scenario.attacked_rounds(clients),
            train_config=ConfigRecord({"part": part}),
            evaluate_fn=evaluate,
        )
    heard.dropped = tap.dropped
    if scenario.repeats > 1:
        _means(heard, private)
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


def _means(heard: Heard, private: PrivateData) -> None:
    """Each victim's mean over the rounds in which it was heard, under the name of the first it was to answer in."""
    means = {}
    for client, first in private.names():
        rounds = range(first, first + private.scenario.repeats)
        if names := [(client, rnd) for rnd in rounds if (client, rnd) in heard.leaks]:
            defence = averaged(private.scenario.defence, len(names))
            kept = mean([heard.leaks[name] for name in names], defence)
            means[client, first] = dataclasses.replace(kept, rounds=torch.tensor([first]))
            heard.drift_norm[client, first] = heard.drift_norm[names[0]]
    heard.leaks = means


def servers(defence: str) -> tuple[ServerDefence, ...]:
    """What the server does to what it receives, of the defences as written."""
    return tuple(part for part in described(defence) if isinstance(part, ServerDefence))


def check_summed(network: nn.Module) -> None:
    """Refuse a network of which a mean of several clients' gradients is not the gradient of their images together.

    Raises:
        FedtapError: it has BatchNorm.
    """
    if name := next(iter(float_buffers(network)), None):
        raise FedtapError(
            f"Each client's BatchNorm ({name.rpartition('.')[0]}) normalises its own images alone, so a sum of clients "
            f"is not the gradient of one batch, which attacks look for: use --batchnorm eval, or {HOW_TO_FIX}."
        )


def metrics_of(scenario: Federation) -> tuple[str, ...]:
    """Names of the numbers that clients report: of all the same, as FedAvg demands."""
    return (*METRICS, "drift_norm") if scenario.local_samples else METRICS


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


def auxiliary(
    grid: Grid,
    scenario: Federation,
    private: PrivateData,
    heard: Heard,
    images: Tensor,
    labels: Tensor,
    part: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Pairs]:
    """Feed public examples to the compromised client, and hear the weights it sends back, one chunk at a time.

    The gradient is in their difference to the weights it was sent, rounded as a victim's is. Where the scenario's
    source is the server, it computes those weights itself.
    Pairs carry the weights that it sent, also where the client has trained since: so does a drifted victim's leak, and
    an attack that takes them for the client's own is as wrong of the one as of the other.

    Args:
        heard: what `play` returned: it names the compromised client's node and the weights in force.
        images: `pairs batch channel height width`, in [0, 1]; labels: `pairs batch`.
        device: where gradients are computed; on the CPU where the compromised client has no GPU.

    Raises:
        FedtapError: the compromised client's node is not known.
        ClientError: it does not answer, or with something else than gradients.
    """
    skeleton = build(scenario.architecture, private.dataset.shape, len(private.dataset.classes))
    chunk, arrays = chunk_size(skeleton, device), tensors_of(heard.auxiliary_weights(scenario.auxiliary_at))
    chunks = [
        (number, which)
        for number, rows in enumerate(trainings(len(images), scenario.auxiliary_trainings))
        for which in torch.split(rows, chunk)
    ]
    for number, which in chunks:
        some, named = images[which], labels[which]
        if scenario.auxiliary_source == "server":
            network = build(scenario.architecture, private.dataset.shape, len(private.dataset.classes), seed=0)
            in_training(network, scenario.batchnorm).load_state_dict(arrays, strict=False)
            found = gradients(network, some, named, device)
            rate = scenario.learning_rate
            sent = {name: torch.sub(arrays[name], gradient, alpha=rate) for name, gradient in found.items()}
        else:
            sent = _fed(grid, private, heard, some, named, number, ConfigRecord({"part": part, "device": str(device)}))
            _as_fed(sent, skeleton, len(some), private.clients)
        scale = -1 / scenario.learning_rate
        leak = GradientLeak(
            observed={name: difference(arrays[name], after, scale) for name, after in sent.items()},
            protocol=dataclasses.replace(scenario.protocol(private.dataset), local_steps=1, batch=some.shape[1]),
            network=skeleton,
            weights={name: arrays[name] for name, _ in skeleton.named_parameters()},
            buffers={name: arrays[name] for name in float_buffers(skeleton)},
            clients=torch.full((len(some),), private.clients),
            rounds=torch.zeros(len(some), dtype=torch.long),
            restarts=which,
            resolution=ROUNDING * -scale,
        )
        yield Pairs(threat_model(scenario.threat_model)(leak), some, named)  # type: ignore[arg-type]


def _fed(
    grid: Grid, private: PrivateData, heard: Heard, images: Tensor, labels: Tensor, number: int, config: ConfigRecord
) -> dict[str, Tensor]:
    """The weights with which the compromised client answers each of these examples; it may be told to train first."""
    if private.clients not in heard.nodes:
        raise FedtapError(
            "The compromised client has not answered a round yet, so its node is unknown: play one first."
        )
    content = RecordDict(
        {
            "arrays": heard.auxiliary_weights(private.scenario.auxiliary_at),
            "examples": record_of({"images": images, "labels": labels}),
            "config": config,
        }
    )
    if private.scenario.auxiliary_trainings:
        draw, public = generator(private.scenario.seed, "drift", number), private.dataset.auxiliary
        which = torch.randperm(len(public), generator=draw)[: -(-len(public) // DRIFT_SHARE)]
        steps = stops(draw).repeat(-(-len(images) // DRIFT_STOPS))[: len(images)].sort().values
        content["drift"] = record_of({"images": public.images[which], "labels": public.labels[which], "steps": steps})
    order = Message(content, heard.nodes[private.clients], PRACTICE)
    answers = Wiretap(grid, lambda order, answer: None).send_and_receive([order])
    if not answers or answers[0].has_error():
        why = short(answers[0].error.reason, _LONGEST // 2) if answers else "no answer"
        raise ClientError(
            f"The compromised client, number {private.clients}, gave no auxiliary pairs ({why}): check that its "
            f"ClientApp is "
            "fedtap's."
        )
    try:
        return tensors_of(answers[0].content.array_records["weights"])
    except Exception as error:  # the bytes are a client's, and numpy raises what it likes about them
        raise ClientError(
            f"The compromised client, number {private.clients}, replied, and sent what cannot be read "
            f"({type(error).__name__}): check that its ClientApp is fedtap's."
        ) from error


def _as_fed(found: dict[str, Tensor], skeleton: nn.Module, pairs: int, client: int) -> None:
    """Refuse what is not a float32 tensor of weights for each pair, of finite length.

    Raises:
        ClientError: with the first parameter that is not, or the first tensor of no parameter.
    """
    wanted = {name: (pairs, *parameter.shape) for name, parameter in skeleton.named_parameters()}
    for name in dict.fromkeys([*wanted, *found]):
        tensor, shape = found.get(name), wanted.get(name)
        if tensor is None or (tensor.shape, tensor.dtype) != (shape, torch.float32):
            got = "nothing" if tensor is None else kind_of_array(tensor)
        elif not -HUGE < (ends := tensor.aminmax()).min <= ends.max < HUGE:  # NaN is neither
            got = "NaN, infinity, or numbers without a square,"
        else:
            continue
        raise ClientError(
            f"The compromised client, number {client}, replied, and sent {got} in the place of the weights of "
            f"{short(name)}: check that its ClientApp is fedtap's."
        )


def stops(draw: torch.Generator) -> Int[Tensor, " stops"]:
    """After how many steps a training stops for examples, shuffled."""
    drawn = torch.rand(DRIFT_STOPS, generator=draw)
    half = DRIFT_STOPS // 2
    steps = torch.cat([DRIFT_STEPS ** drawn[:half], DRIFT_STEPS * drawn[half:]]).round().long()
    return steps[torch.randperm(DRIFT_STOPS, generator=draw)]
