"""The tap: what nobody asked for goes no further, nobody speaks for another node, and nothing is kept for ever."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtap.clients.app import client_app
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import private_data
from fedtap.simulator.federation.rounds import play
from fedtap.simulator.leaks import Protocol
from fedtap.simulator.wire import limits, roll, wiretap
from fedtap.simulator.wire.grid import SERVER_NODE, LocalGrid
from fedtap.simulator.wire.messages import ask
from fedtap.simulator.wire.recorder import recorder
from fedtap.simulator.wire.wiretap import NONSENSE, UNPULLED, Wiretap
from tests.simulator.test_recorder import net, recorded
from tests.support.scenes import Scene

BASE = Scene(attack="", name="test", model="mlp", size=8, victims=3)


def echo(order: Message, context: Context) -> Message:
    """Which partition it is."""
    metrics = MetricRecord({"partition": int(context.node_config["partition-id"]), "num-examples": 1})
    return Message(RecordDict({"metrics": metrics}), reply_to=order)


def app_of(answer: Callable[[Message, Context], Message]) -> ClientApp:
    app = ClientApp()
    app.train()(answer)
    app.query()(answer)
    app.query("partition")(answer)
    app.query("posterior")(answer)
    return app


class Engine(LocalGrid):
    """As one of Flower's engines: it does not know who its nodes are, and answers come one at a time."""

    instant = False
    partitions = None  # type: ignore[assignment]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return super().pull_messages([name for name in message_ids if name in self._answers][:1])


class Twice(LocalGrid):
    """Every answer comes twice, the second one with other weights; and one comes to no order at all."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        answers = super().pull_messages(message_ids)
        seconds = []
        if not answers:
            return []
        for answer in answers:
            records = {name: ArrayRecord({key: Array(np.asarray(array.numpy() + 1)) for key, array in record.items()})
                       for name, record in answer.content.array_records.items()}  # fmt: skip
            seconds.append(Message(RecordDict(dict(answer.content) | records), reply_to=order_of(answer)))
        unasked = Message(answers[0].content, reply_to=order_of(answers[0]))
        unasked.metadata.__dict__["_reply_to_message_id"] = "never sent"
        return [unasked, *answers, *seconds]


def order_of(answer: Message) -> Message:
    """An order to which this would be the answer."""
    order = Message(RecordDict(), answer.metadata.src_node_id, answer.metadata.message_type)
    order.metadata.__dict__["_message_id"] = answer.metadata.reply_to_message_id
    return order


def orders(grid: LocalGrid, ttl: float | None = None) -> list[Message]:
    return [Message(RecordDict(), node, "train", ttl=ttl) for node in grid.get_node_ids()]


def test_unasked_and_second_answers_reach_neither_strategy_nor_tap() -> None:
    scenario = dataclasses.replace(BASE, victims=6, clients=3)  # the second round is at the first one's average
    private = private_data(scenario, Path("data"), 3)
    sound = client_app(lambda config: (scenario,))
    alone = play(scenario, LocalGrid(sound, 4), private)
    with pytest.warns(UserWarning, match="nobody had asked it for"):
        heard = play(scenario, Twice(sound, 4), private)
    assert heard.dropped == 2 * (4 + 1)
    assert heard.arrays == alone.arrays
    for name, leak in alone.leaks.items():
        assert all(torch.equal(heard.leaks[name].observed[key], leak.observed[key]) for key in leak.observed)
    assert "8 answers were dropped" in dataclasses.replace(heard, dropped=8).why_missing(1, 9)


def test_an_answer_in_the_place_of_another_nodes_is_dropped_and_the_right_one_is_heard() -> None:
    class Crossed(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            first, second = super().pull_messages(message_ids)
            forged = Message(second.content, reply_to=order_of(second))
            forged.metadata.__dict__["_reply_to_message_id"] = first.metadata.reply_to_message_id
            return [forged, first, second]

    heard = []
    tap = Wiretap(grid := Crossed(app_of(echo), 2), lambda order, answer: heard.append(answer))
    with pytest.warns(UserWarning, match="dropped"):
        answers = tap.send_and_receive(orders(grid))
    assert [answer.content["metrics"]["partition"] for answer in answers] == [0, 1]
    assert (len(heard), tap.dropped) == (2, 1)


def test_an_answer_of_another_type_is_an_error_and_the_engines_own_error_passes() -> None:
    class Odd(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            first, second = super().pull_messages(message_ids)
            first.metadata.__dict__["_message_type"] = "evaluate"
            lost = Message(Error(5, "the node went away"), reply_to=order_of(second))
            lost.metadata.__dict__["_src_node_id"] = SERVER_NODE
            return [first, lost]

    tap = Wiretap(grid := Odd(app_of(echo), 2), lambda order, answer: None)
    found = {answer.error.code: answer.error.reason for answer in tap.send_and_receive(orders(grid))}
    assert "'evaluate' when it was asked 'train'" in (found[NONSENSE] or "")
    assert found[5] == "the node went away"


@pytest.mark.parametrize("kind", [LocalGrid, Engine])
def test_what_nobody_pulls_is_forgotten(kind: type[LocalGrid]) -> None:
    grid = kind(app_of(echo), 2)
    tap = Wiretap(grid, lambda order, answer: None)
    pushed = [name for _ in range(50) for name in tap.push_messages(orders(grid))]
    assert len(tap._orders) == len(grid._answers) == 2 * UNPULLED
    assert tap.pull_messages(pushed[:4]) == []
    assert {answer.metadata.reply_to_message_id for answer in tap.pull_messages(pushed)} <= {*pushed[-2 * UNPULLED :]}
    tap.push_messages(orders(grid, ttl=1e-3))
    time.sleep(2e-3)
    tap.push_messages([])
    assert len(tap._orders) < 2 * UNPULLED


def test_a_push_of_many_messages_to_one_node_is_answered_whole() -> None:
    grid = LocalGrid(app_of(echo), 1)
    many = [order for _ in range(3 * UNPULLED) for order in orders(grid)]
    assert len(Wiretap(grid, lambda order, answer: None).send_and_receive(many)) == 3 * UNPULLED


def test_a_wait_ends_and_what_came_before_was_heard_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiretap, "PAUSE", 0.001)
    monkeypatch.setattr(limits, "REPLY_TIMEOUT", 0.05)
    heard: list[int] = []
    late: list[int] = []

    class Slow(Engine):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            left.append(len(heard))
            return super().pull_messages([name for name in message_ids if not name.endswith("never")])

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            first, *rest = super().push_messages(messages)
            self._answers[f"{first} never"] = self._answers.pop(first)
            return [first, *rest]

    left: list[int] = []
    grid = Slow(app_of(echo), 3)

    def ear(order: Message, answer: Message) -> None:
        (late if answer.has_error() else heard).append(answer.metadata.src_node_id)

    answers = Wiretap(grid, ear).send_and_receive(orders(grid))
    assert late == [2]
    assert [answer.metadata.src_node_id for answer in answers] == [3, 4]
    assert left[:3] == [0, 1, 2]  # each was heard before the next was looked for


def test_a_grid_without_nodes_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tap = Wiretap(Engine(app_of(echo), 0), lambda order, answer: None)
    monkeypatch.setattr(limits, "REPLY_TIMEOUT", 0.01)
    for _ in range(limits.LOOKS):
        assert tap.get_node_ids() == []
    time.sleep(0.02)
    with pytest.raises(FedtapError, match="for more nodes than the 0 that are connected"):
        tap.get_node_ids()


def says(claims: list[object]) -> LocalGrid:
    """An engine whose nodes say these of themselves; an exception is raised."""

    def answer(order: Message, context: Context) -> Message:
        claim = claims[int(context.node_config["partition-id"])]
        if isinstance(claim, Exception):
            raise claim
        return Message(RecordDict({"metrics": MetricRecord({"partition": claim})}), reply_to=order)  # type: ignore[dict-item]

    return Engine(app_of(answer), len(claims))


@pytest.mark.parametrize(
    ("claims", "believed"),
    [
        ([0, 1, 2], {0: 2, 1: 3, 2: 4}),
        ([2, 0, 1], {0: 3, 1: 4, 2: 2}),
        ([0, 0, 2], {2: 4}),
        ([0, 1, 0], {1: 3}),
        ([0, 0, 0], {}),
        ([0, 1, -1], {0: 2, 1: 3}),
        ([0, 1, 3], {0: 2, 1: 3}),
        ([0, 1, 2**40], {0: 2, 1: 3}),
        ([0, 1, 1.0], {0: 2, 1: 3}),
        ([0, 1, [1]], {0: 2, 1: 3}),
        ([0, 1, True], {0: 2, 1: 3}),
        ([0, 1, float("nan")], {0: 2, 1: 3}),
        ([0, 1, RuntimeError("no")], {0: 2, 1: 3}),
    ],
)
def test_a_node_is_the_client_that_it_alone_says_it_is(
    claims: list[object], believed: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wiretap, "PAUSE", 0.0)
    found = roll.call(says(claims))
    assert found.nodes == believed
    assert {*found.clients, *found.strangers} == {2, 3, 4}
    assert not {*found.clients} & {*found.strangers}
    assert all(f"Node {node}" in why and len(why) < 300 for node, why in found.strangers.items())


def test_in_process_the_grid_knows_who_its_nodes_are() -> None:
    grid = LocalGrid(app_of(lambda order, context: 1 / 0), 3)  # type: ignore[arg-type, return-value]
    assert roll.call(grid).nodes == {0: 2, 1: 3, 2: 4}


def test_of_two_nodes_with_one_number_neither_has_a_row_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an engine: client 1 says from the beginning that it is client 0, whose answers then are nobody's either."""
    monkeypatch.setattr(wiretap, "PAUSE", 0.0)
    sound = client_app(lambda config: (BASE,))

    def answer(order: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            context = dataclasses.replace(context, node_config=context.node_config | {"partition-id": 0})
        return sound(order, context)

    heard = play(BASE, Engine(app_of(answer), 4), private_data(BASE, Path("data"), 3))
    assert {*heard.leaks} == {(2, 1)}
    for client in (0, 1):
        assert "Node 2 says that it is client 0, and so does node 3" in heard.why_missing(client, 1)


def test_engines_hear_what_is_heard_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiretap, "PAUSE", 0.0)
    sound, private = client_app(lambda config: (BASE,)), private_data(BASE, Path("data"), 3)
    here, there = (play(BASE, grid(sound, 4), private) for grid in (LocalGrid, Engine))
    assert here.leaks.keys() == there.leaks.keys()
    for name, leak in here.leaks.items():
        assert all(torch.equal(there.leaks[name].observed[key], leak.observed[key]) for key in leak.observed)


def test_a_user_who_interrupts_is_obeyed() -> None:
    def answer(order: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalGrid(app_of(answer), 1).send_and_receive([Message(RecordDict(), 2, "train")])


def test_a_client_changes_neither_the_order_nor_what_it_has_sent() -> None:
    kept: list[Message] = []

    def answer(order: Message, context: Context) -> Message:
        reply = echo(order, context)
        kept.append(reply)
        order.metadata.__dict__["_dst_node_id"] = 3
        order.content["more"] = MetricRecord({"x": 1})
        return reply

    grid = LocalGrid(app_of(answer), 2)
    asked = orders(grid)
    answers = grid.send_and_receive(asked)
    kept[0].content["metrics"]["partition"] = 1
    assert [answer.content["metrics"]["partition"] for answer in answers] == [0, 1]
    assert [order.metadata.dst_node_id for order in asked] == [2, 3]
    assert not any(order.content for order in asked)


def test_a_study_hears_a_client_by_its_node_and_goes_on_without_one_that_lies() -> None:
    def answer(order: Message, context: Context) -> Message:
        reply = echo(order, context)
        if context.node_config["partition-id"] == 1:
            reply.content["metrics"]["partition"] = 0
        return reply

    grid, failed = LocalGrid(app_of(answer), 3), dict[int, str]()
    assert [one.client for one in ask(grid, "query.posterior", RecordDict(), 0, failed=failed)] == [0, 2]
    assert failed == {1: "Client 1 failed: Client 1 answered in the name of client 0, which it is not."}
    with pytest.raises(FedtapError, match="in the name of client 0"):
        ask(grid, "query.posterior", RecordDict(), 0)


def test_the_recorder_files_each_leak_under_the_node_that_was_asked(tmp_path: Path) -> None:
    """Both nodes say that they are client 0, and each answers twice."""
    model, protocol = net(), Protocol("mine:net", (3, 8, 8), 3, batch=2, learning_rate=0.05)

    def answer(order: Message, context: Context) -> Message:
        arrays = order.content.array_records["arrays"]
        drift_norm = {key: Array(np.asarray(array.numpy() + 0.01 * context.node_id)) for key, array in arrays.items()}
        metrics = MetricRecord({"num-examples": 2, "partition": 0})
        return Message(RecordDict({"arrays": ArrayRecord(drift_norm), "metrics": metrics}), reply_to=order)

    grid = Twice(app_of(answer), 2)
    tap = Wiretap(grid, recorder(tmp_path, protocol, model))
    sent = RecordDict({"arrays": ArrayRecord(model.state_dict())})
    with pytest.warns(UserWarning, match="nobody had asked it for"):
        tap.send_and_receive([Message(sent, node, "train") for node in grid.get_node_ids()])
    for node in grid.get_node_ids():
        leak = recorded(tmp_path, client=node)
        for change in leak.gradient.values():
            torch.testing.assert_close(change, torch.full_like(change, -0.01 * node / 0.05), rtol=1e-3, atol=1e-3)
