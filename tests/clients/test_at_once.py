"""Clients of one step, computed together, reply as they would one by one; the others are left to themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from torch import nn

from fedtap.clients.honest import train_at_once, train_on_images
from fedtap.simulator.federation.private_data import PrivateData, private_data
from fedtap.simulator.federation.rounds import play
from fedtap.simulator.leaks import float_buffers
from fedtap.simulator.models.registry import build
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import record_of, rows_as_records, tensors_of
from tests.support.scenes import Scene

BASE = Scene(attack="", name="test", victims=3, size=16)
CLIENTS = 5


def orders_for(scene: Scene, rnd: int = 1) -> tuple[list[tuple[Message, Context]], PrivateData]:
    """What a strategy sends to each node: one RecordDict for all."""
    private = private_data(scene, Path("data"), CLIENTS - 1)
    net = build(scene.architecture, private.dataset.shape, len(private.dataset.classes), seed=3)
    tensors = dict(net.named_parameters()) | float_buffers(net)
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: tensor.detach() for name, tensor in tensors.items()}),
            "config": ConfigRecord({"server-round": rnd, "part": 0}),
        }
    )
    grid = LocalGrid(lambda message, context: message, CLIENTS)
    return [(Message(content, node, "train"), grid.context(node)) for node in grid.get_node_ids()], private


def weights(reply: Message) -> dict[str, torch.Tensor]:
    return tensors_of(reply.content.array_records["arrays"])


@pytest.mark.parametrize(
    "scene",
    [
        BASE,
        dataclasses.replace(BASE, batch=3),
        dataclasses.replace(BASE, rounds=2, training_batch=4),
        dataclasses.replace(BASE, model="mlp"),
        dataclasses.replace(BASE, model="vit"),
        dataclasses.replace(BASE, model="resnet20", batchnorm="eval"),
    ],
    ids=["lenet", "batch 3", "training batch 4", "mlp", "vit", "frozen BatchNorm"],
)
def test_clients_reply_together_as_they_do_one_by_one(scene: Scene) -> None:
    orders, private = orders_for(scene)
    together = train_at_once(orders, private)
    assert sorted(together) == list(range(CLIENTS))
    for place, (message, context) in enumerate(orders):
        alone = train_on_images(message, context, private)
        assert together[place].content["metrics"] == alone.content["metrics"]
        assert weights(together[place]).keys() == weights(alone).keys()
        for name, wanted in weights(alone).items():
            torch.testing.assert_close(weights(together[place])[name], wanted, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"local_steps": 2},
        {"defence": "noise(0.1)"},
        {"defence": "dp_sgd(1.0, 1.0)"},
        {"defence": "precode(8)"},
        {"model": "resnet20"},
        {"local_samples": 4},
    ],
    ids=str,
)
def test_what_is_no_plain_step_is_left_to_each_client(changes: Mapping[str, Any]) -> None:
    assert train_at_once(*orders_for(dataclasses.replace(BASE, **changes))) == {}


def test_dropout_is_left_to_each_client(monkeypatch: pytest.MonkeyPatch) -> None:
    orders, private = orders_for(BASE)
    net = nn.Sequential(build("lenet", (3, 16, 16), len(private.dataset.classes), seed=0), nn.Dropout(0.1)).train()
    monkeypatch.setattr("fedtap.clients.honest.network", lambda *_: net)
    assert train_at_once(orders, private) == {}


def test_an_order_of_its_own_is_left_to_its_client() -> None:
    orders, private = orders_for(BASE)
    other = orders_for(BASE)[0][0][0].content
    orders[2] = (Message(other, orders[2][0].metadata.dst_node_id, "train"), orders[2][1])
    assert sorted(train_at_once(orders, private)) == [0, 1, 3, 4]


class Together:
    """An app whose clients answer with their number, some of them together."""

    def __init__(self, places: Sequence[int] = (), fails: bool = False, to: int | None = None) -> None:
        self.places, self.fails, self.to = places, fails, to
        self.alone: list[int] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.alone.append(int(context.node_config["partition-id"]))
        return Message(RecordDict(), reply_to=message)

    def at_once(self, orders: Sequence[tuple[Message, Context]]) -> Mapping[int, Message]:
        if self.fails:
            raise RuntimeError("no memory")
        return {
            place: Message(RecordDict(), reply_to=orders[place if self.to is None else self.to][0])
            for place in self.places
        }


def exchanged(app: Together) -> list[Message]:
    grid = LocalGrid(app, 3)
    return grid.send_and_receive(
        [grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()]
    )


def test_a_grid_asks_those_alone_that_did_not_answer_together() -> None:
    app = Together(places=[0, 2])
    assert not any(answer.has_error() for answer in exchanged(app))
    assert app.alone == [1]


def test_where_clients_cannot_be_computed_together_each_is_asked() -> None:
    app = Together(fails=True)
    assert not any(answer.has_error() for answer in exchanged(app))
    assert app.alone == [0, 1, 2]


def test_a_reply_to_another_clients_message_is_an_error() -> None:
    errors = [answer.has_error() for answer in exchanged(Together(places=[0, 1, 2], to=1))]
    assert errors == [True, False, True]


def test_the_federation_hears_the_same_from_clients_together(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = dataclasses.replace(BASE, rounds=2)
    heard = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(Scene, "at_once", lambda self, orders, data_root: {})
        from tests.simulator.test_federation import federation

        grid, private = federation(scene)
        heard.append(play(scene, grid, private))
    for name, leak in heard[0].leaks.items():
        for key, tensor in leak.observed.items():
            torch.testing.assert_close(tensor, heard[1].leaks[name].observed[key], rtol=1e-4, atol=3e-6)


@settings(max_examples=40, deadline=None)
@given(
    stack=arrays_of.arrays(
        st.sampled_from([np.float32, np.float64, np.int64]),
        arrays_of.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4).filter(lambda shape: shape[0]),
    )
)
def test_rows_become_the_records_that_flower_makes_of_them(stack: np.ndarray) -> None:
    stacks = {"a": torch.from_numpy(stack), "b": torch.from_numpy(stack).flip(0)}
    made = [(record_of(stacks), stacks)]
    for client, record in enumerate(rows_as_records(stacks)):
        made.append((record, {name: tensor[client].clone() for name, tensor in stacks.items()}))
    for record, tensors in made:
        wanted = ArrayRecord(tensors)
        assert record.keys() == wanted.keys()
        for name, array in record.items():
            assert (array.dtype, tuple(array.shape), array.stype) == (
                wanted[name].dtype,
                tuple(wanted[name].shape),
                wanted[name].stype,
            )
            assert array.data == wanted[name].data
