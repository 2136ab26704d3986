"""What the recorder leaves on disk: read back to the bit, whole whatever happens, and refused where it is not."""

from __future__ import annotations

import inspect
import json
import tempfile
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import Leak, Protocol, load
from fedtap.simulator.wire import recorded_stack
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.recorded_stack import RecordedStack
from fedtap.simulator.wire.recorder import recorder
from fedtap.simulator.wire.records import tensors_of
from fedtap.simulator.wire.wiretap import Ear

RATE = 0.05


@pytest.fixture(autouse=True)
def run() -> None:
    """Flower makes no message outside a run."""
    LocalGrid(ClientApp(), 1)


def model(shapes: list[tuple[int, ...]]) -> nn.Module:
    return nn.ParameterDict({f"p{number}": torch.zeros(shape) for number, shape in enumerate(shapes)})


def ear_of(folder: Path, network: nn.Module, **more: Any) -> Ear:
    return recorder(folder, Protocol("mine:net", (1, 1, 2), 2, batch=1, learning_rate=RATE), network, **more)


def tell(ear: Ear, sent: ArrayRecord, after: dict[str, Tensor], client: int, rnd: int, **metrics: int) -> None:
    content = {"arrays": sent, "config": ConfigRecord({"server-round": rnd})}
    order = Message(RecordDict(content), client, "train")  # type: ignore[arg-type]
    back = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in after.items()})
    reply = Message(RecordDict({"arrays": back, "m": MetricRecord(dict(metrics))}), reply_to=order)
    ear(order, reply)


def read(folder: Path, network: nn.Module) -> dict[tuple[int, int], Leak]:
    """Each leak of the folder by its round and client."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        stack = load(path, lambda *_: network, "mine:net")
        for victim in range(len(stack)):
            name = int(stack.rounds[victim]), int(stack.clients[victim])
            assert name not in found
            found[name] = stack[victim]
    return found


def states(network: nn.Module, many: int, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(tensor.shape, generator=draw) for name, tensor in network.state_dict().items()}
        for _ in range(many)
    ]


def record_of(state: dict[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})


PLAIN = model([(3, 2), (3,)])

shapes_of = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4)
types_of = st.sampled_from([torch.float16, torch.float32, torch.float64])


@settings(max_examples=20, deadline=None)
@given(
    shapes=shapes_of,
    sent_as=types_of,
    back_as=st.lists(types_of, min_size=1, max_size=9),
    counted=st.booleans(),
    own=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_leak_that_is_read_is_the_one_that_was_observed_to_the_bit(
    shapes: list[tuple[int, ...]],
    sent_as: torch.dtype,
    back_as: list[torch.dtype],
    counted: bool,
    own: bool,
    seed: int,
) -> None:
    """Against the definition, tensor by tensor; with one broadcast for all, and with one for each client."""
    network = model(shapes)
    before = [{name: tensor.to(sent_as) for name, tensor in state.items()} for state in states(network, 9, seed)]
    moved = states(network, len(back_as), seed + 1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ear, expected = ear_of(Path(folder), network), {}
        one = record_of(before[0])
        for client, (step, kind) in enumerate(zip(moved, back_as, strict=True)):
            start = before[client if own else 0]
            after = {name: (start[name].double() * (1 + 0.1 * step[name].tanh())).to(kind) for name in start}
            tell(ear, record_of(start) if own else one, after, client, 1, **({"num-examples": 3} if counted else {}))
            expected[1, client] = (
                start,
                {name: ((after[name].double() - start[name].double()) * (-1 / RATE)).float() for name in start},
            )
        found = read(Path(folder), network)
        assert found.keys() == expected.keys()
        for name, (start, gradient) in expected.items():
            leak = found[name]
            assert leak.weights is not None
            broadcast = leak.broadcast(0)
            assert broadcast.keys() == start.keys() == leak.observed.keys()
            for key in start:
                assert torch.equal(broadcast[key], start[key].float())
                assert torch.equal(leak.observed[key][0], gradient[key])
            assert (None if leak.examples is None else leak.examples.tolist()) == ([3] if counted else None)
        weights = list(Path(folder).glob("weights/*"))
        assert len(weights) == 1


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    kind=st.sampled_from(["f2", "f4", "f8", "i8", "u1", "?", ">f4"]),
    fortran=st.booleans(),
)
def test_arrays_are_read_as_numpy_reads_them(shape: tuple[int, ...], kind: str, fortran: bool) -> None:
    values = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), kind, order="F" if fortran else "C")
    array = Array(values)
    if kind == ">f4":
        with pytest.raises(Exception, match="byte order"):
            tensors_of(ArrayRecord({"x": array}))
        return
    (read_back,) = tensors_of(ArrayRecord({"x": array})).values()
    assert np.array_equal(read_back.numpy(), array.numpy())
    assert read_back.numpy().dtype == array.numpy().dtype
    cut = Array(array.dtype, array.shape, array.stype, array.data[: len(array.data) - values.itemsize])
    if values.size:
        with pytest.raises(ValueError):  # noqa: PT011  (numpy's own, and it differs by what is cut)
            tensors_of(ArrayRecord({"x": cut}))


def test_objects_are_not_unpickled() -> None:
    plain = Array(np.zeros(1))
    with tempfile.TemporaryFile() as file:
        np.save(file, np.array([{}], object), allow_pickle=True)
        file.seek(0)
        pickled = Array(plain.dtype, plain.shape, plain.stype, file.read())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        tensors_of(ArrayRecord({"x": pickled}))


def play(folder: Path, many: int, until: int, **more: Any) -> None:
    """Record rounds 1 to `until` of so many clients."""
    ear = ear_of(folder, PLAIN, **more)
    for rnd in range(1, until + 1):
        start, *moved = states(PLAIN, many + 1, rnd)
        sent = record_of(start)
        for client, step in enumerate(moved):
            tell(ear, sent, {name: start[name] + 0.1 * step[name] for name in start}, client, rnd)


@pytest.mark.parametrize(
    ("rounds", "clients"),
    [(None, None), (range(2, 4), None), ({1}, [0, 5]), (None, {4, 2**63 + 3})],
)
def test_the_rounds_and_clients_asked_for_are_recorded(rounds: Any, clients: Any, tmp_path: Path) -> None:
    play(tmp_path, 6, 4, rounds=rounds, clients=clients)
    wanted = {client % 2**63 for client in clients or range(6)}
    assert read(tmp_path, PLAIN).keys() == {(rnd, client) for rnd in rounds or range(1, 5) for client in wanted}
    assert json.loads((tmp_path / "messages.json").read_text()) == {"train": 24}


@pytest.mark.parametrize("asked", [{"rounds": 3}, {"rounds": []}, {"rounds": "1"}, {"clients": []}, {"clients": 3}])
def test_to_record_none_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    protocol = Protocol("mine:net", (1, 1, 2), 2, batch=1)
    with pytest.raises(FedtapError, match="to record: give"):
        inspect.unwrap(recorder)(tmp_path, protocol, PLAIN, **asked)  # without the tests' own check of types


def test_files_are_few_and_hold_little_but_the_leaks(tmp_path: Path) -> None:
    clients, rounds = 60, 3
    play(tmp_path, clients, rounds)
    assert len(list(tmp_path.glob("weights/*.safetensors"))) == rounds
    assert len(list(tmp_path.glob("*.safetensors"))) == 7 + rounds - 1  # 1, 1, 2, 4, 8, 16, 32, then as many as before
    ids = 4 * 8  # client, round, restart, examples
    entries = 9 * 4
    full = tmp_path / "round_3.safetensors"
    assert full.stat().st_size < clients * (entries + ids) + 600
    assert len(load(full, lambda *_: PLAIN, "mine:net")) == clients


def test_a_file_is_no_larger_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_stack, "LARGEST_STACK", 300)  # of 60 bytes: two tensors and three numbers of 8
    play(tmp_path, 12, 2)
    assert len(read(tmp_path, PLAIN)) == 24
    held = {path.stem: path.stat().st_size for path in tmp_path.glob("round_2*.safetensors")}
    assert len(held) == 3
    assert held["round_2-3"] == held["round_2"] - 3 * 60


@pytest.mark.parametrize("after_writing", range(5))
def test_what_was_recorded_before_a_crash_is_kept(
    after_writing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends in the fourth leak of round 3, between any two of the writes of it."""
    put, leaks = RecordedStack._put, []

    def killed(self: RecordedStack, file: IO[bytes], entries: dict[str, Tensor]) -> None:
        leaks.append(entries)
        if len(leaks) == 2 * 5 + 4:
            put(self, file, {name: entries[name] for name in list(entries)[:after_writing]})
            raise KeyboardInterrupt
        put(self, file, entries)

    monkeypatch.setattr(RecordedStack, "_put", killed)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, 5, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = read(tmp_path, PLAIN)
    kept = {(rnd, client) for rnd in (1, 2) for client in range(5)} | {(3, client) for client in range(3)}
    assert found.keys() == kept
    assert [("1 more in part" in str(one.message)) for one in said] == ([True] if after_writing else [])


def test_an_earlier_runs_leaks_are_not_touched(tmp_path: Path) -> None:
    play(tmp_path, 2, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.warns(UserWarning, match="of an earlier run"):
        play(tmp_path, 2, 1)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_full_disk_is_a_warning_and_the_next_leak_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path / "whole", 4, 2)
    put, leaks = RecordedStack._put, []

    def full(self: RecordedStack, file: IO[bytes], entries: dict[str, Tensor]) -> None:
        leaks.append(entries)
        if len(leaks) == 4 + 3:
            put(self, file, {name: entries[name] for name in ("gradient/p0", "clients")})
            raise OSError(28, "No space left on device")
        put(self, file, entries)

    monkeypatch.setattr(RecordedStack, "_put", full)
    with pytest.warns(UserWarning, match="nothing of client 2.*No space left"):
        play(tmp_path / "full", 4, 2)
    expected = read(tmp_path / "whole", PLAIN)
    found = read(tmp_path / "full", PLAIN)
    assert expected.keys() - found.keys() == {(2, 2)}
    for name, leak in found.items():
        for key, tensor in leak.observed.items():
            assert torch.equal(tensor, expected[name].observed[key])


def test_a_folder_that_is_emptied_meanwhile_fills_again(tmp_path: Path) -> None:
    ear, (start, *moved) = ear_of(tmp_path, PLAIN), states(PLAIN, 5)
    sent = record_of(start)
    for client, step in enumerate(moved):
        tell(ear, sent, {name: start[name] + 0.1 * step[name] for name in start}, client, 1)
        if client == 2:
            for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
                path.unlink()
    assert read(tmp_path, PLAIN).keys() == {(1, 3)}
    assert json.loads((tmp_path / "messages.json").read_text()) == {"train": 4}


def test_a_leak_without_its_weights_is_refused_with_what_to_copy(tmp_path: Path) -> None:
    play(tmp_path / "a", 2, 1)
    (tmp_path / "b").mkdir()
    for name in ("round_1.safetensors", "round_1.json"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(FedtapError, match="copy the folder weights with it"):
        load(tmp_path / "b/round_1.safetensors", lambda *_: PLAIN, "mine:net")
    (weights,) = (tmp_path / "a/weights").iterdir()
    content = weights.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        with pytest.raises(FedtapError, match="is damaged, since its content"):
            load(tmp_path / "a/round_1.safetensors", lambda *_: PLAIN, "mine:net")


@pytest.mark.parametrize("named", ["../a", "", 7, ["x"], "g" * 32, "A" * 32, "0" * 31, "0" * 32 + "\n"])
def test_weights_are_named_by_a_digest_alone(named: object, tmp_path: Path) -> None:
    play(tmp_path, 1, 1)
    about = json.loads((tmp_path / "round_1.json").read_text())
    (tmp_path / "round_1.json").write_text(json.dumps(about | {"weights": named}))
    with pytest.raises(FedtapError, match="32 hexadecimal digits"):
        load(tmp_path / "round_1.safetensors", lambda *_: PLAIN, "mine:net")


def test_places_without_a_leak_are_no_leak(tmp_path: Path) -> None:
    play(tmp_path, 1, 1)
    path = tmp_path / "round_1.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    at = 8 + int.from_bytes(content[:8], "little") + header["rounds"]["data_offsets"][0]
    content[at : at + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(FedtapError, match="holds no leak, only places"):
        load(path, lambda *_: PLAIN, "mine:net")
