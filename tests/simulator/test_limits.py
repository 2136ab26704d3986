"""No wait is without a limit: a late reply is nobody's, a strategy that waits is told, and an engine that stopped ends
the run with what was observed on disk."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, strategy_utils
from safetensors.torch import load_file

from fedtap.clients.app import client_app
from fedtap.scenarios.app import _play, reply_timeout
from fedtap.scenarios.command.plan import plan_of
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.private_data import private_data
from fedtap.simulator.federation.rounds import Heard, play
from fedtap.simulator.leaks import load
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire import limits, wiretap
from fedtap.simulator.wire.limits import LOOKS, Limited
from fedtap.simulator.wire.messages import ask
from fedtap.simulator.wire.wiretap import LATE, Wiretap
from tests.simulator.test_wiretap import Engine, app_of, echo, orders
from tests.support.scenes import Scene

BASE = Scene(attack="", name="test", model="mlp", size=8, victims=6, clients=2)  # three rounds of two victims


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiretap, "PAUSE", 0.001)


class Tardy(Engine):
    """Client 1's reply to round 2 is not there in that round; with `unasked`, it comes with the replies to round 3."""

    def __init__(self, app: ClientApp, nodes: int, unasked: bool = False) -> None:
        super().__init__(app, nodes)
        self.unasked = unasked
        self.late: dict[str, Message] = {}
        self.pulled: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        asked = list(messages)
        names = super().push_messages(asked)
        for order, name in zip(asked, names, strict=True):
            if (round_of(order), order.metadata.dst_node_id) == (2, 3):
                self.late[name] = self._answers.pop(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        names = list(message_ids)
        self.pulled += names
        again = list(self.late.values()) if self.unasked and not {*names} & {*self.late} else []
        return again + super().pull_messages(names)


def round_of(order: Message) -> int:
    return int(order.content.config_records.get("config", {}).get("server-round", 0))  # type: ignore[arg-type]


def heard_by(grid: Any) -> Heard:
    return play(BASE, grid, private_data(BASE, Path("data"), 2))


@pytest.mark.parametrize("unasked", [False, True])
@pytest.mark.filterwarnings("ignore:A node sent an answer")
def test_a_late_reply_is_heard_in_no_round_and_the_others_go_on(unasked: bool) -> None:
    """The rounds are those of a federation whose client 1 fails in round 2 and does no harm."""
    sound = client_app(lambda config: (BASE,))

    def failing(order: Message, context: Context) -> Message:
        if (round_of(order), context.node_config["partition-id"]) == (2, 1):
            raise RuntimeError("no reply")
        return sound(order, context)

    expected = heard_by(Engine(app_of(failing), 3))
    tardy = Tardy(app_of(sound), 3, unasked)  # whose clients are computed one by one, as those that fail are
    heard = heard_by(Limited(tardy, 1.0))
    assert len(tardy.late) == 1
    assert {*heard.leaks} == {*expected.leaks} == {(0, 1), (1, 1), (0, 2), (0, 3), (1, 3)}
    assert heard.arrays == expected.arrays
    for name, leak in heard.leaks.items():
        assert all(torch.equal(expected.leaks[name].observed[key], leak.observed[key]) for key in leak.observed)
    assert "No reply came within 1 s" in heard.why_missing(1, 2)
    assert (heard.dropped > 0) == unasked


def test_the_ear_is_told_who_is_late_and_the_strategy_goes_on_with_the_others() -> None:
    class Silent(Engine):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # type: ignore[override]
            first, second, third = super().push_messages(messages)
            del self._answers[first], self._answers[second]
            return [None, second, third]  # type: ignore[list-item]

    told = {}
    grid = Limited(Silent(app_of(echo), 3), 0.5)
    tap = Wiretap(grid, lambda order, answer: told.update({order.metadata.dst_node_id: answer}))
    answers = tap.send_and_receive(orders(grid._grid), timeout=50.0)  # type: ignore[arg-type]
    assert [answer.metadata.src_node_id for answer in answers] == [4]
    assert {node: answer.error.code for node, answer in told.items() if answer.has_error()} == {2: LATE, 3: LATE}
    assert "took no message" in (told[2].error.reason or "")
    assert "within 0.5 s" in (told[3].error.reason or "")


def test_a_setting_that_needs_all_clients_ends_in_a_sentence() -> None:
    class Deaf(Engine):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            names = super().push_messages(messages)
            if len(names) == 2 and self.asked:
                self._answers.pop(names[1])
            self.asked = True
            return names

        asked = False

    with pytest.raises(FedtapError, match=r"No reply came within 0.5 s"):
        ask(Limited(Deaf(app_of(echo), 2), 0.5), "query.posterior", RecordDict(), 0)
    failed: dict[int, str] = {}
    left = ask(Limited(Deaf(app_of(echo), 2), 0.5), "query.posterior", RecordDict(), 0, failed=failed)
    assert [one.client for one in left] == [0]
    assert "No reply came" in failed[1]


def test_a_strategy_that_waits_for_nodes_is_told_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own FedAvg waits for ever."""
    monkeypatch.setattr(strategy_utils, "sleep", lambda seconds: time.sleep(0.01))
    tap = Wiretap(Limited(Engine(app_of(echo), 3), 0.1), lambda order, answer: None)
    sent = RecordDict({"arrays": _arrays()})["arrays"]
    with pytest.raises(FedtapError, match=r"waited 0.1 s for more nodes than the 3 that are connected"):
        FedAvg(min_available_nodes=4, fraction_evaluate=0.0).start(tap, sent, num_rounds=1)  # type: ignore[arg-type]


def test_a_server_that_is_busy_between_two_looks_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONGEST_LOOK", 0.01)
    grid = Limited(Engine(app_of(echo), 2), 0.1)
    for look in range(4 * LOOKS):
        assert list(grid.get_node_ids()) == [2, 3]
        time.sleep(0.015)
        if look % LOOKS == 0:
            grid.push_messages([])


def _arrays() -> Any:
    from flwr.app import ArrayRecord

    return ArrayRecord(build("mlp", (3, 8, 8), 10, seed=0).state_dict())


@pytest.mark.parametrize("call", ["get_node_ids", "push_messages", "pull_messages"])
def test_an_engine_that_stopped_is_not_waited_for(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHORTEST_CALL", 0.05)
    never = threading.Event()

    engine = Engine(app_of(echo), 2)
    monkeypatch.setattr(engine, call, lambda *words: never.wait(60))
    grid = Limited(engine, 0.05)
    began = time.monotonic()
    with pytest.raises(FedtapError, match=r"The SuperLink has not replied for 0.05 s"):
        getattr(grid, call)(*[[]] * (call != "get_node_ids"))
    assert time.monotonic() - began < 5
    never.set()


def test_what_an_engine_raises_is_raised() -> None:
    class Broken(Engine):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        Limited(Broken(app_of(echo), 1), 5.0).pull_messages([])


def test_leaks_are_on_disk_as_they_are_observed_and_one_stack_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SuperLink stops in round 3; the same run, played to its end, then leaves no single leaks."""
    config = {"scenario": "first_leak", "options": "--victims=6 --model=mlp --attack=linear --size=16"}
    run_config: Any = {**config, "out": str(tmp_path / "out"), "data-root": str(tmp_path), "device": "cpu"}
    settings = plan_of(run_config)
    sound = client_app(lambda config: settings)

    stopped = threading.Event()

    class Stops(Engine):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            asked = list(messages)
            if any(round_of(order) == 3 for order in asked):
                monkeypatch.setattr(limits, "SHORTEST_CALL", 0.05)
                stopped.wait(60)
            return super().push_messages(asked)

    def play_over(grid: Limited) -> None:
        _play(run_config, lambda setting: grid)

    with pytest.raises(FedtapError, match=r"The SuperLink has not replied for 1 s.*in the run's folder"):
        play_over(Limited(Stops(sound, 3), 1.0))
    stopped.set()
    leaks = tmp_path / "out/leaks"
    singles = {f"part_0-round_{rnd}-client_{client}" for rnd in (1, 2) for client in (0, 1)}
    assert {file.stem for file in leaks.iterdir()} == singles
    assert json.loads((tmp_path / "out/run.json").read_text()).get("finished") is False
    first = {name: load(leaks / f"{name}.safetensors", build) for name in singles}
    for name, leak in first.items():
        assert f"part_0-round_{leak.rounds.item()}-client_{leak.clients.item()}" == name

    play_over(Limited(Engine(sound, 3)))
    assert {file.name for file in leaks.iterdir()} == {"part_0.safetensors", "part_0.json"}
    stack = load_file(leaks / "part_0.safetensors")
    assert len(stack["clients"]) == 6
    assert len((tmp_path / "out/rows.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(("said", "seconds"), [("", None), (20, 20.0), ("2.5", 2.5), (1e3, 1000.0)])
def test_the_run_config_says_how_long_replies_are_waited_for(said: Any, seconds: float | None) -> None:
    assert reply_timeout({"reply-timeout": said}) == seconds


@pytest.mark.parametrize("said", ["soon", 0, -1, "nan", "inf", True])
def test_a_limit_that_is_none_is_one_sentence(said: Any) -> None:
    if said is True:
        assert reply_timeout({"reply-timeout": said}) == 1.0
        return
    with pytest.raises(FedtapError, match=r"reply-timeout=.* above 0"):
        reply_timeout({"reply-timeout": said})


def test_the_callers_own_limit_holds_where_the_run_has_none() -> None:
    assert Limited(Engine(app_of(echo), 1)).limit() == limits.REPLY_TIMEOUT
    assert Limited(Engine(app_of(echo), 1)).limit(7200.0) == 7200.0
    assert Limited(Engine(app_of(echo), 1), 20.0).limit(7200.0) == 20.0
    assert Limited(Engine(app_of(echo), 1), 20.0).limit(5.0) == 5.0
