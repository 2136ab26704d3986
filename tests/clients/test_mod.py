"""A defence as a mod of somebody's own ClientApp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtap.clients.mod import mod_of
from fedtap.simulator.defences.clip import Clip
from fedtap.simulator.defences.defence import Update
from fedtap.simulator.defences.noise import Noise
from fedtap.simulator.defences.sign import Sign
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import tensors_of
from tests.support.defences import drawn

RECEIVED = {"weight": torch.randn(4, 3, generator=drawn(7)), "running_mean": torch.zeros(3), "seen": torch.tensor(5)}


MOVED = {"weight": torch.full((4, 3), 0.1), "running_mean": torch.ones(3), "seen": torch.tensor(1)}


def own_app(defence: Update, answer: Callable[[dict[str, Tensor]], RecordDict], **options: object) -> Message:
    """The answer of somebody's own ClientApp that has the mod."""
    app = ClientApp(mods=[mod_of(defence, **options)])  # type: ignore[arg-type]

    @app.train()
    def train(order: Message, context: Context) -> Message:
        received = tensors_of(order.content.array_records["arrays"])
        return Message(answer({name: tensor + MOVED[name] for name, tensor in received.items()}), reply_to=order)

    @app.evaluate()
    def evaluate(order: Message, context: Context) -> Message:
        return Message(order.content, reply_to=order)

    kind = MessageType.EVALUATE if options == {"learning_rate": 7} else MessageType.TRAIN
    (reply,) = LocalGrid(app, 1).send_and_receive([Message(RecordDict({"arrays": ArrayRecord(RECEIVED)}), 2, kind)])
    return reply


def both(after: dict[str, Tensor]) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord(after), "metrics": MetricRecord({"num-examples": 3})})


def test_any_update_defence_is_a_mod_of_a_users_own_app() -> None:
    reply = own_app(Clip(0.2), both, parameters={"weight"})
    sent = tensors_of(reply.content.array_records["arrays"])
    assert list(sent) == list(RECEIVED)
    torch.testing.assert_close(sent["weight"] - RECEIVED["weight"], MOVED["weight"] * 0.2 / MOVED["weight"].norm())
    assert torch.equal(sent["running_mean"], MOVED["running_mean"]), "no parameter: it travels as it is"
    assert sent["seen"] == 6
    assert reply.content.metric_records["metrics"]["num-examples"] == 3

    sent = tensors_of(own_app(Sign(), both, learning_rate=0.5).content.array_records["arrays"])
    torch.testing.assert_close(sent["weight"] - RECEIVED["weight"], torch.full((4, 3), 0.5))
    torch.testing.assert_close(sent["running_mean"], torch.full((3,), 0.5))
    one, two = (
        tensors_of(own_app(Noise(1.0), both, **options).content.array_records["arrays"])["weight"]  # type: ignore[arg-type]
        for options in ({}, {})
    )
    assert not torch.isclose(one, two).any(), "noise that repeats can be taken off"


def test_a_mod_that_cannot_tell_what_to_defend_sends_nothing() -> None:
    def two(after: dict[str, Tensor]) -> RecordDict:
        return RecordDict({"arrays": ArrayRecord(after), "more": ArrayRecord(after)})

    def other(after: dict[str, Tensor]) -> RecordDict:
        return RecordDict({"arrays": ArrayRecord(after | {"new": torch.ones(2)})})

    for answer, said in ((two, "holds 2 ArrayRecords"), (other, "sends new, and was sent no array of that name")):
        reply = own_app(Clip(1.0), answer)
        assert reply.has_error()
        assert said in reply.error.reason
    untouched = own_app(Sign(), both, learning_rate=7)  # a message of another kind
    assert torch.equal(tensors_of(untouched.content.array_records["arrays"])["weight"], RECEIVED["weight"])
