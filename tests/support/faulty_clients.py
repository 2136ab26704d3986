"""What clients may do wrong: a table of faults, each of which is played in several federations by a test."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict


@dataclass
class Reply:
    """A sound answer, for a fault to spoil: its parts may be changed, and `send` gives the message."""

    order: Message
    answer: Message

    def __post_init__(self) -> None:
        content = self.answer.content
        (self.array_name,), (self.metric_name,) = content.array_records, content.metric_records
        self.arrays = content.array_records[self.array_name]
        self.metrics = content.metric_records[self.metric_name]
        self.content = RecordDict({self.array_name: self.arrays, self.metric_name: self.metrics})
        self.first = next(iter(self.arrays))

    @property
    def array(self) -> np.ndarray:
        """The first array."""
        return self.arrays[self.first].numpy()

    def send(self) -> Message:
        """The message with what the parts are now."""
        return Message(self.content, reply_to=self.order)


Fault = Callable[[Reply], Any]
"""What the client returns in the place of a sound reply."""

FAULTS: dict[str, Fault] = {}


class Rude(BaseException):
    """Not an Exception."""


class Mute(Exception):
    """Raises as it is told."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Sealed(Array):
    """Raises as it is copied or read."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise RuntimeError("not to be copied")

    def numpy(self) -> NoReturn:
        raise Rude


class Armed:
    """Says that it was unpickled."""

    fired = False

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return exec, ("import tests.support.faulty_clients as t; t.Armed.fired = True",)


def raising(error: BaseException | type[BaseException]) -> Fault:
    def fault(reply: Reply) -> NoReturn:
        raise error

    return fault


def endless(reply: Reply) -> Any:
    return endless(reply)


def metadata(**said: object) -> Fault:
    """Metadata that the message did not have."""

    def fault(reply: Reply) -> Message:
        answer = reply.send()
        for name, value in said.items():
            answer.metadata.__dict__[f"_{name}"] = value
        return answer

    return fault


def neither(reply: Reply) -> Message:
    answer = reply.send()
    answer.__dict__["_content"] = None
    return answer


def records(change: Callable[[Reply], object]) -> Fault:
    def fault(reply: Reply) -> Message:
        change(reply)
        return reply.send()

    return fault


def content(make: Callable[[Reply], dict[str, Any]]) -> Fault:
    def fault(reply: Reply) -> Message:
        return Message(RecordDict(make(reply)), reply_to=reply.order)

    return fault


def array(make: Callable[[np.ndarray], np.ndarray | Array | bytes]) -> Fault:
    """The first array in another form."""

    def fault(reply: Reply) -> Message:
        made = make(reply.array)
        if isinstance(made, bytes):
            made = Array("float32", reply.array.shape, "numpy.ndarray", made)
        reply.arrays[reply.first] = made if isinstance(made, Array) else Array(made)
        return reply.send()

    return fault


def filled(value: float, dtype: str = "float32") -> Fault:
    return array(lambda sound: np.full(sound.shape, value, dtype))


def metric(name: str, value: object) -> Fault:
    """A metric that is this, whether Flower's record takes it or not; None for none."""

    def fault(reply: Reply) -> Message:
        data = reply.metrics.__dict__["_data"]
        data.pop(name, None)
        if value is not None:
            data[name] = value
        return reply.send()

    return fault


def pickled(sound: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Armed()], dtype=object), allow_pickle=True)
    return file.getvalue()


def zipped(sound: np.ndarray) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(2**20))
    return file.getvalue()


def boundless(sound: np.ndarray) -> bytes:
    """A header of an array that no memory holds."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)})
    return file.getvalue() + bytes(16)


def halved(sound: np.ndarray) -> bytes:
    data = Array(sound).data
    return data[: len(data) // 2]


def reordered(reply: Reply) -> None:
    reply.content[reply.array_name] = ArrayRecord(dict(reversed(list(reply.arrays.items()))))


def resealed(reply: Reply) -> None:
    sound = reply.arrays[reply.first]
    reply.arrays[reply.first] = Sealed(sound.dtype, sound.shape, sound.stype, sound.data)
    reply.arrays[reply.first].__dict__["data"] = None


HUGE = 2**1000

FAULTS |= {
    "raises": raising(RuntimeError("out of battery")),
    "raises and cannot say why": raising(Mute()),
    "raises a whole page": raising(ValueError("why " * 10**5)),
    "raises several lines": raising(ValueError("why\nand\n\nhow")),
    "raises what is no Exception": raising(Rude()),
    "exits": raising(SystemExit(0)),
    "exits with words": raising(SystemExit("good bye")),
    "is closed": raising(GeneratorExit()),
    "is cancelled": raising(asyncio.CancelledError()),
    "stops iterating": raising(StopIteration()),
    "is out of memory": raising(MemoryError()),
    "recurses for ever": endless,
    "returns nothing": lambda reply: None,
    "returns a number": lambda reply: 5,
    "returns text": lambda reply: "done",
    "returns a dictionary": lambda reply: {"arrays": {}},
    "returns the records alone": lambda reply: reply.content,
    "returns the order": lambda reply: reply.order,
    "returns the order's records": lambda reply: Message(reply.order.content, reply_to=reply.order),
    "returns neither content nor error": neither,
    "replies to another message": metadata(reply_to_message_id="another"),
    "replies to no message": metadata(reply_to_message_id=""),
    "replies from another node": metadata(src_node_id=2),
    "replies from the server": metadata(src_node_id=1),
    "replies to another node": metadata(dst_node_id=2),
    "replies with another type": metadata(message_type="evaluate"),
    "replies with a type that is none": metadata(message_type=7),
    "says why at length": lambda reply: Message(Error(3, "x" * 10**6), reply_to=reply.order),
    "fails without a reason": lambda reply: Message(Error(3), reply_to=reply.order),
    "sends no records": content(lambda reply: {}),
    "sends no arrays": content(lambda reply: {reply.metric_name: reply.metrics}),
    "sends no metrics in training": content(lambda reply: {reply.array_name: reply.arrays}),
    "sends an empty ArrayRecord": content(lambda reply: {reply.array_name: ArrayRecord(), "metrics": reply.metrics}),
    "sends an empty MetricRecord": content(
        lambda reply: {reply.array_name: reply.arrays, reply.metric_name: MetricRecord()}
    ),
    "sends a second ArrayRecord": records(
        lambda reply: reply.content.update(more=ArrayRecord({"x": Array(np.zeros(2, np.float32))}))
    ),
    "sends a second MetricRecord": records(lambda reply: reply.content.update(more=MetricRecord({"x": 1}))),
    "renames the ArrayRecord": content(lambda reply: {"weights": reply.arrays, reply.metric_name: reply.metrics}),
    "renames the MetricRecord": content(lambda reply: {reply.array_name: reply.arrays, "said": reply.metrics}),
    "leaves out an array": records(lambda reply: reply.arrays.pop(reply.first)),
    "adds an array": records(lambda reply: reply.arrays.update(more=reply.arrays[reply.first])),
    "sends arrays in another order": records(reordered),
    "sends what cannot be copied": records(resealed),
    "sends nonsense": array(lambda sound: b"nonsense"),
    "sends no bytes": array(lambda sound: b""),
    "sends half an array": array(halved),
    "sends half a zip": array(lambda sound: b"PK\x03\x04 and no more"),
    "sends a zip": array(zipped),
    "sends a pickle": array(lambda sound: b"\x80\x04K\x01."),
    "sends a pickled array": array(pickled),
    "sends a header alone": array(lambda sound: b"\x93NUMPY\x01\x00"),
    "sends the header of a petabyte": array(boundless),
    "sends another serialisation": array(lambda sound: Array("float32", sound.shape, "torch", Array(sound).data)),
    "sends one entry less": array(lambda sound: sound.reshape(-1)[:-1].copy()),
    "sends a flat array": array(lambda sound: sound.reshape(-1)),
    "sends one axis more": array(lambda sound: sound[..., None]),
    "sends an array of no entries": array(lambda sound: sound[:0]),
    "sends a number for an array": array(lambda sound: np.float32(1).reshape(())),
    "sends float64": array(lambda sound: sound.astype(np.float64)),
    "sends float16": array(lambda sound: sound.astype(np.float16)),
    "sends bfloat16": array(lambda sound: sound.view("V2")[..., ::2].copy()),
    "sends big-endian numbers": array(lambda sound: sound.astype(">f4")),
    "sends whole numbers": array(lambda sound: sound.astype(np.int32)),
    "sends truth values": array(lambda sound: sound > 0),
    "sends complex numbers": array(lambda sound: sound.astype(np.complex64)),
    "sends text for numbers": array(lambda sound: sound.astype("U8")),
    "sends dates": array(lambda sound: np.zeros(sound.shape, "datetime64[s]")),
    "sends tuples": array(lambda sound: np.zeros(sound.shape, [("a", "f4"), ("b", "f4")])),
    "sends NaN": filled(float("nan")),
    "sends infinity": filled(float("inf")),
    "sends minus infinity": filled(float("-inf")),
    "sends the largest number": filled(3e38),
    "sends more than float32 holds": filled(1e200, "float64"),
    **{
        f"says {name} is {said}": metric(name, value)
        for name in ("num-examples", "partition")
        for said, value in {
            "nothing": None,
            "NaN": float("nan"),
            "infinity": float("inf"),
            "2**63": 2**63,
            "2**1000": HUGE,
            "a list": [1.0, 2.0],
            "no numbers": [],
            "text": "many",
            "true": True,
        }.items()
    },
    "says num-examples is 0": metric("num-examples", 0),
    "says num-examples is -1": metric("num-examples", -1),
    "says num-examples is 1.5": metric("num-examples", 1.5),
    "says partition is -1": metric("partition", -1),
    "says partition is 1.0": metric("partition", 1.0),
    "says partition is 2**40": metric("partition", 2**40),
    "says it is client 0": metric("partition", 0),
    "says it is client 9": metric("partition", 9),
    "says moved is minus infinity": metric("drift_norm", float("-inf")),
    "says one thing more": metric("mood", 1.0),
}

UNCHANGED = "sends back the weights that it was sent"
"""A fault only where the server clips: Flower's wrapper divides by the length of the change."""


def unchanged(reply: Reply) -> Message:
    reply.content[reply.array_name] = reply.order.content.array_records["arrays"]
    return reply.send()


FAULTS[UNCHANGED] = unchanged


def of_another_model(reply: Reply) -> Message:
    """As many numbers, under the names of a model that nobody asked for."""
    reply.content[reply.array_name] = ArrayRecord({f"net.{name}": array for name, array in reply.arrays.items()})
    return reply.send()


FAULTS["sends another model's arrays"] = of_another_model
