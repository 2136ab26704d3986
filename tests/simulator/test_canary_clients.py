"""Canary clients in a federation that trains anyway: what they send, what they change, and the bound on ε they show."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedtap
from fedtap.scenarios.bench.canary_clients import WithoutCanaries
from fedtap.simulator.auditing.epsilon_bounds import UNBOUNDED
from fedtap.simulator.auditing.one_run import bound_of_canaries
from fedtap.simulator.defences import gaussian
from fedtap.simulator.defences.accountant import noise_for
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.wire.canary_clients import CanaryTap
from fedtap.simulator.wire.grid import LocalGrid

CLIENTS, ENTRIES, CLIP, DELTA = 20, 3000, 1.0, 1e-5


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch's and numpy's global generators, from which Flower draws its noise, begin at the same place."""
    np.random.seed(1)
    random.seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def start() -> ArrayRecord:
    arrays = {"w": Array(np.zeros(ENTRIES - 100, np.float32)), "b": Array(np.ones((10, 10), np.float16))}
    return ArrayRecord(arrays | {"counter": Array(np.zeros(1, np.int64))})


def federation() -> LocalGrid:
    """Clients whose updates point to where each has its own optimum; two metrics, and a counter."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        arrays = message.content.array_records["arrays"]
        draw = np.random.default_rng(client)
        after = {
            name: Array((a + 0.01 * draw.normal(size=a.shape)).astype(a.dtype)) if name != "counter" else Array(a + 1)
            for name, a in ((name, array.numpy()) for name, array in arrays.items())
        }
        metrics = MetricRecord({"num-examples": 10 + client, "loss": float(client), "list": [1.0, 2.0]})
        return Message(RecordDict({"weights": ArrayRecord(after), "m": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 5, "accuracy": 0.5 + 0.01 * int(context.node_config["partition-id"])})
        return Message(RecordDict({"m": metrics}), reply_to=message)

    return LocalGrid(app, CLIENTS)


def trained(grid: Grid, epsilon: float, rounds: int = 5) -> ArrayRecord:
    """The final model under Flower's fixed clipping, with noise for ε of all rounds."""
    multiplier = 0.0 if math.isinf(epsilon) else noise_for(epsilon, DELTA, math.sqrt(rounds))
    nodes = len(list(grid.get_node_ids()))
    strategy = DifferentialPrivacyServerSideFixedClipping(FedAvg(), multiplier, CLIP, nodes)
    arrays = {name: array for name, array in start().items() if name != "counter"}  # to which Flower adds no noise
    return strategy.start(grid, ArrayRecord(arrays), num_rounds=rounds).arrays


def messages(tap: CanaryTap) -> list[Message]:
    content = RecordDict({"arrays": start(), "config": ConfigRecord({"server-round": 1})})
    return [Message(content, node, MessageType.TRAIN) for node in tap.get_node_ids()]


def test_canaries_reply_as_the_others_do_but_for_their_direction() -> None:
    tap = CanaryTap(federation(), 16, CLIP, seed=3)
    replies = tap.send_and_receive(messages(tap))
    assert len(replies) == CLIENTS + tap.included.sum() == len(list(tap.get_node_ids()))
    other, ours = replies[0], replies[CLIENTS:]
    updates = []
    for reply in ours:
        assert list(reply.content) == list(other.content)
        assert dict(reply.content["m"]) == {"num-examples": 20, "loss": 9.5, "list": [1.0, 2.0]}
        arrays = reply.content.array_records["weights"]
        assert {name: (a.dtype, a.shape) for name, a in arrays.items()} == {
            name: (a.dtype, a.shape) for name, a in start().items()
        }
        assert arrays["counter"].numpy() == 1  # as another client counts
        updates.append(np.concatenate([(arrays[n].numpy() - start()[n].numpy()).reshape(-1) for n in ("w", "b")]))
    products = np.stack(updates).astype(float) @ np.stack(updates).astype(float).T
    np.testing.assert_allclose(products, np.eye(len(ours)) * CLIP**2, atol=0.02)  # float16 rounds some of the entries
    assert tap.seconds > 0


def test_without_a_clip_a_canary_is_as_long_as_the_others() -> None:
    tap = CanaryTap(federation(), 8, seed=3)
    reply = tap.send_and_receive(messages(tap))[-1].content.array_records["weights"]
    length = float(np.linalg.norm(reply["w"].numpy()))
    assert length == pytest.approx(0.01 * math.sqrt(ENTRIES), rel=0.05)


def test_where_clients_send_changes_canaries_do() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        changes = ArrayRecord({"b": Array(np.full((10, 10), 0.1, np.float32))})
        return Message(RecordDict({"weights": changes, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    tap = CanaryTap(LocalGrid(app, 2), 8, seed=3)
    reply = tap.send_and_receive(messages(tap))[-1].content.array_records["weights"]
    assert np.linalg.norm(reply["b"].numpy()) == pytest.approx(1.0, rel=0.1)
    assert abs(float(reply["b"].numpy().mean())) < 0.5


def test_the_bound_is_near_epsilon_and_not_above() -> None:
    tap = CanaryTap(federation(), 256, CLIP, seed=5)
    bound = tap.bound(trained(tap, 8.0), DELTA)
    assert 0.4 * 8.0 < bound.epsilon <= 8.0
    assert (bound.canaries, bound.included) == (256, int(tap.included.sum()))
    assert "canary clients took part" in str(bound)


def test_canaries_that_are_drawn_in_some_rounds_show_less() -> None:
    bounds = []
    for fraction in (1.0, 0.5):
        tap = CanaryTap(federation(), 128, CLIP, seed=5)
        arrays = ArrayRecord({name: array for name, array in start().items() if name != "counter"})
        nodes = int(len(tap.get_node_ids()) * fraction)
        inner = FedAvg(fraction_train=fraction, fraction_evaluate=0.0)
        strategy = DifferentialPrivacyServerSideFixedClipping(inner, 0.5, CLIP, nodes)
        bounds.append(tap.bound(strategy.start(tap, arrays, num_rounds=6).arrays, DELTA).epsilon)
    assert 0 < bounds[1] < bounds[0]


def test_without_noise_epsilon_is_large() -> None:
    tap = CanaryTap(federation(), 32, CLIP, seed=5)
    assert tap.bound(trained(tap, math.inf), DELTA).epsilon > 100


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_canaries_that_take_no_part_show_nothing(epsilon: float) -> None:
    grid = federation()
    tap = CanaryTap(grid, 64, CLIP, seed=6)
    arrays = trained(WithoutCanaries(tap, grid.get_node_ids()), epsilon)
    assert tap.bound(arrays, DELTA).epsilon == 0


def test_metrics_that_are_averaged_stay_what_they_were() -> None:
    results = []
    for grid in (federation(), CanaryTap(federation(), 16, CLIP, seed=4)):
        results.append(FedAvg().start(grid, start(), num_rounds=1))
    for kind in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        one, other = (getattr(result, kind)[1] for result in results)
        assert one.keys() == other.keys()
        assert all(one[name] == pytest.approx(other[name], rel=0.05) for name in one)
    for name in ("w", "b"):  # 8 updates of length 1 in the average of about 28
        one, other = (result.arrays[name].numpy().astype(float) for result in results)
        assert 0 < np.linalg.norm(one - other) < math.sqrt(16) / CLIENTS


def test_an_app_that_pushes_and_pulls_gets_the_canaries_replies_too() -> None:
    tap = CanaryTap(federation(), 8, CLIP, seed=3)
    nodes = list(tap.get_node_ids())
    names = tap.push_messages(messages(tap)[::-1])[::-1]  # ids are in the messages' order
    assert len(names) == len(nodes)
    ours = names[CLIENTS:]
    assert not tap.pull_messages(ours)  # no other client has replied
    assert {reply.metadata.src_node_id for reply in tap.pull_messages(names)} == set(nodes)
    assert not tap.pull_messages(names)


def test_where_no_client_replies_no_canary_does() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("no")

    tap = CanaryTap(LocalGrid(app, 2), 8, CLIP, seed=3)
    assert all(reply.has_error() for reply in tap.send_and_receive(messages(tap)))
    with pytest.raises(FedtapError, match="nothing is known of its canaries"):
        tap.bound(start())


@pytest.mark.parametrize(
    "broken",
    [{}, {"w": Array("float32", (2900,), "numpy.ndarray", b"no")}, {"w": Array(np.full(2900, np.nan, np.float32))}],
    ids=["no arrays", "no numbers", "not finite"],
)
def test_a_faulty_client_is_no_model_for_canaries(broken: dict[str, Array]) -> None:
    honest = federation()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = int(context.node_id)
        reply = honest._app(message, context)
        if node % 2 == 0:
            reply.content["weights"] = ArrayRecord(broken)
        return reply

    tap = CanaryTap(LocalGrid(app, 6), 8, CLIP, seed=3)
    assert tap.get_node_ids()[0] % 2 == 0
    ours = tap.send_and_receive(messages(tap))[6:]
    assert len(ours) == tap.included.sum()
    for reply in ours:
        assert np.linalg.norm(reply.content.array_records["weights"]["w"].numpy()) == pytest.approx(CLIP, rel=0.1)


def test_the_tap_records_clients_and_no_canaries(tmp_path: Path) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict()
        moved = {name: value + 0.01 for name, value in state.items()}
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"a": ArrayRecord(moved), "m": metrics}), reply_to=message)

    net = nn.Linear(16, 4)
    tap = fedtap.tap(LocalGrid(app, 3), tmp_path, net, name="m:net", shape=(16,), classes=4, canaries=8, clip=1.0)
    FedAvg(fraction_evaluate=0.0).start(tap, ArrayRecord(net.state_dict()), num_rounds=1)
    assert (tmp_path / "messages.json").read_text().strip() == '{"train": 3}'


@pytest.mark.parametrize(
    ("canaries", "clip", "said"), [(1, 1.0, "show nothing"), (8, 0.0, "no length"), (8, math.inf, "no length")]
)
def test_canaries_that_cannot_be_are_refused(canaries: int, clip: float, said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        CanaryTap(federation(), canaries, clip)


def test_a_model_too_small_for_the_canaries_is_refused() -> None:
    tap = CanaryTap(federation(), ENTRIES + 1, CLIP, seed=0)
    with pytest.raises(FedtapError, match="plant fewer"):
        tap.send_and_receive(messages(tap))
    tap = CanaryTap(federation(), 2049, CLIP, seed=0)
    with pytest.raises(FedtapError, match="plant 2048 at most"):
        tap.send_and_receive(messages(tap))


def test_arrays_of_another_model_are_refused() -> None:
    tap = CanaryTap(federation(), 8, CLIP, seed=3)
    tap.send_and_receive(messages(tap))
    with pytest.raises(FedtapError, match="have no w of shape"):
        tap.bound(ArrayRecord({"w": Array(np.zeros(3))}))
    with pytest.raises(FedtapError, match="not finite"):
        tap.bound(ArrayRecord({**start(), "w": Array(np.full(ENTRIES - 100, np.inf, np.float32))}))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.floats(0, 10), st.integers(0, 2**32))
def test_a_bound_is_a_number_from_0_whatever_the_scores(canaries: int, apart: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    included = draw.random(canaries) < 0.5
    bound = bound_of_canaries(draw.normal(size=canaries) + apart * included, included, np.zeros(0), 1e-3, DELTA)
    assert 0 <= max(bound.gaussian, bound.guessed) == bound.epsilon <= UNBOUNDED


def test_the_bound_is_seldom_above_epsilon() -> None:
    draw, wrong = np.random.default_rng(0), 0
    distance = gaussian.distance_for(2.0, DELTA)
    for _ in range(300):
        included = draw.random(64) < 0.5
        scores = draw.normal(size=64) + distance * included
        wrong += bound_of_canaries(scores, included, draw.normal(size=192), 0.05, DELTA).epsilon > 2.0
    assert wrong <= 25  # of 300, 15 are expected at most
