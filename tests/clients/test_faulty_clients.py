"""Every fault of the table in five federations: the round goes on, the client's row says why, nobody else's changes."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtap.clients.app import client_app
from fedtap.simulator.auxiliary import Pairs
from fedtap.simulator.errors import ClientError
from fedtap.simulator.federation.private_data import PrivateData, private_data
from fedtap.simulator.federation.rounds import PRACTICE, Heard, auxiliary, play
from fedtap.simulator.wire.grid import LocalGrid
from tests.support.faulty_clients import FAULTS, UNCHANGED, Armed, Fault, Reply, raising
from tests.support.scenes import Scene

CLIENTS, FAULTY = 2, 1

BASE = Scene(attack="", name="test", model="mlp", size=8, victims=4, clients=CLIENTS)

MODES = {
    "plain": BASE,
    "secure_aggregation": dataclasses.replace(BASE, threat_model="secure_aggregation", victims=2),
    "central_dp": dataclasses.replace(BASE, defence="central_dp(1.0, 0.5)"),
    "trained": dataclasses.replace(BASE, rounds=1, victims=2, batch=2),
    "auxiliary": dataclasses.replace(BASE, threat_model="eavesdropper"),
}
"""Two rounds each, the second at the first one's average. In `auxiliary` it is the compromised client that is
faulty."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Flower logs a page for each round."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


_SOUND: dict[object, RecordDict] = {}


def sound(scenario: Scene, order: Message, context: Context) -> Message:
    """The honest answer, remembered: it depends on the order alone."""
    rnd = order.content.config_records["config"].get("server-round")
    sent = [hash(array.data) for record in order.content.array_records.values() for array in record.values()]
    key = scenario, context.node_id, order.metadata.message_type, rnd, *sent
    if key not in _SOUND:
        _SOUND[key] = client_app(lambda config: (scenario,))(order, context).content
    content = RecordDict()
    for name, record in _SOUND[key].items():
        content[name] = ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else MetricRecord(dict(record))  # type: ignore[arg-type]
    return Message(content, reply_to=order)


Practised = list[Pairs] | ClientError


def played(scenario: Scene, faults: Sequence[Fault], faulty: int) -> tuple[Heard, PrivateData, list[Practised]]:
    """What is heard where this client does these in turn, one a round, and what it then practises, one for each.

    It practises in an eavesdropper's federation alone.
    """
    app, turn = ClientApp(), itertools.cycle(faults)

    @app.train()
    @app.query("auxiliary")
    def answer(order: Message, context: Context) -> Message:
        honest = sound(scenario, order, context)
        return next(turn)(Reply(order, honest)) if context.node_config["partition-id"] == faulty else honest  # type: ignore[no-any-return]

    grid, private = LocalGrid(app, CLIENTS + 1), private_data(scenario, Path("data"), CLIENTS)
    heard = play(scenario, grid, private)
    auxiliary_at: list[Practised] = []
    images, labels = private.dataset.auxiliary.batch(torch.arange(2))
    for _ in faults if scenario.threat_model == "eavesdropper" else ():
        try:
            auxiliary_at.append(list(auxiliary(grid, scenario, private, heard, images[:, None], labels[:, None])))
        except ClientError as error:
            auxiliary_at.append(error)
    return heard, private, auxiliary_at


def culprit(mode: str) -> int:
    return CLIENTS if mode == "auxiliary" else FAULTY


@cache
def failed(mode: str) -> Heard:
    """What is heard where the client only fails."""
    return played(MODES[mode], [raising(RuntimeError("out of battery"))], culprit(mode))[0]


@cache
def paired() -> list[Pairs]:
    """The pairs of a sound compromised client, after rounds in which it failed."""
    spoil: Fault = lambda reply: reply.send() if reply.order.metadata.message_type == PRACTICE else None  # noqa: E731
    (pairs,) = played(MODES["auxiliary"], [spoil], CLIENTS)[2]
    assert isinstance(pairs, list)
    return pairs


def check_row(row: str, client: int) -> None:
    """It says who failed and why, in a line."""
    assert f"client {client}" in row.lower()
    assert "did not answer" not in row
    assert "\n" not in row
    assert len(row) < 600
    assert not Armed.fired


def check(fault: str, mode: str) -> None:
    """Play one fault in two rounds, and hold it against a client that only fails."""
    heard, private, auxiliary_at = played(MODES[mode], [FAULTS[fault]], culprit(mode))
    if fault == UNCHANGED and mode != "central_dp":  # an honest answer, unless its length divides
        assert {*private.names()} == {*heard.leaks}
        return
    alone = failed(mode)
    assert heard.leaks.keys() == alone.leaks.keys()
    for name, leak in alone.leaks.items():  # nobody else's leak is touched, and none is another's
        assert heard.leaks[name].clients.tolist() == [name[0]] != [culprit(mode)]
        assert all(torch.equal(heard.leaks[name].observed[key], leak.observed[key]) for key in leak.observed)
    assert heard.arrays == alone.arrays  # nor is the average
    for rnd in (1, 2):
        check_row(heard.why_missing(culprit(mode), rnd), culprit(mode))
        if mode == "secure_aggregation":
            check_row(heard.why_missing(0, 2), culprit(mode))
    for pairs in auxiliary_at:
        if isinstance(pairs, ClientError):
            assert f"number {CLIENTS}" in str(pairs)
            assert len(str(pairs)) < 300
            continue
        for one, other in zip(pairs, paired(), strict=True):  # the fault is in what pairs do not use
            assert one.leak.observed.keys() == other.leak.observed.keys()
            assert all(torch.equal(one.leak.observed[key], other.leak.observed[key]) for key in other.leak.observed)


CASES = [(fault, mode) for fault in FAULTS for mode in MODES]


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_is_its_clients_alone(mode: str) -> None:
    check("says it is client 0", mode)


@pytest.mark.parametrize("number", range(len(MODES)))
def test_each_fault_is_a_row_that_names_the_client(number: int) -> None:
    """Every other fault, in one of the federations by its place in the table, one a round."""
    mode = list(MODES)[number]
    names = [name for name in [*FAULTS][2 * number :: 2 * len(MODES)] if name != UNCHANGED or mode == "central_dp"]
    rounds = {"victims": len(names) * (1 if mode == "secure_aggregation" else CLIENTS)}
    scenario = dataclasses.replace(MODES[mode], **({"rounds": len(names)} if mode == "trained" else rounds))
    heard, private, auxiliary_at = played(scenario, [FAULTS[name] for name in names], culprit(mode))
    for rnd in range(1, len(names) + 1):
        check_row(heard.why_missing(culprit(mode), rnd), culprit(mode))
    others = {name for name in private.names() if name[0] != culprit(mode) and mode != "secure_aggregation"}
    assert {*heard.leaks} >= others
    assert all(leak.clients.tolist() == [client] for (client, _), leak in heard.leaks.items())
    assert len(auxiliary_at) == (len(names) if mode == "auxiliary" else 0)


@pytest.mark.slow
def test_every_fault_in_every_federation_is_its_clients_alone() -> None:
    raised, strayed = [], []
    for case in CASES:
        try:
            check(*case)
        except AssertionError:
            strayed.append(case)
        except Exception as error:
            raised.append((*case, repr(error)))
    print(f"\n{len(raised)} tracebacks of {len(CASES)}, {len(strayed)} that touch another client or do not say why")
    assert len(FAULTS) >= 65
    assert not raised
    assert not strayed
