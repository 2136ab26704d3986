"""Leaks: stacks, files, and everything that is refused when one is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import (
    GradientLeak,
    Leak,
    Protocol,
    TrainedWeightsLeak,
    UpdateLeak,
    float_buffers,
    load,
    mean,
    stack,
)
from fedtap.simulator.models.registry import build

SHAPE = (3, 8, 8)


def leak(
    victims: int = 3, model: str = "mlp", kind: type[Leak] = GradientLeak, stacked: bool = False, seed: int = 0
) -> Leak:
    generator = torch.Generator().manual_seed(seed)
    network = build(model, SHAPE, 4)
    lead = (victims,) if stacked else ()

    def tensors(*axes: int, of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.randn(*axes, *tensor.shape, generator=generator) for name, tensor in of.items()}

    return kind(
        observed=tensors(victims, of=dict(network.named_parameters())),
        protocol=Protocol(model, SHAPE, 4, batch=1),
        network=network,
        weights=tensors(*lead, of=dict(network.named_parameters())),
        buffers=tensors(*lead, of=float_buffers(network)),
        clients=torch.arange(victims),
        rounds=torch.ones(victims, dtype=torch.long),
        restarts=torch.zeros(victims, dtype=torch.long),
        stacked=stacked,
    )


def same(one: Leak, other: Leak) -> bool:
    def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
        groups = [
            (one.observed, other.observed),
            (one.weights or {}, other.weights or {}),
            (one.buffers, other.buffers),
        ]
        return [(a[name], b[name]) for a, b in groups for name in a.keys() | b.keys()]

    names = (one.clients, other.clients), (one.rounds, other.rounds), (one.restarts, other.restarts)
    return one.protocol == other.protocol and all(torch.equal(a, b) for a, b in (*pairs(), *names))


@pytest.mark.parametrize("kind", [GradientLeak, UpdateLeak])
@pytest.mark.parametrize("model", ["mlp", "resnet20"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_saved_leak_comes_back(tmp_path: Path, kind: type[Leak], model: str, stacked: bool) -> None:
    saved = leak(model=model, kind=kind, stacked=stacked)
    saved.save(tmp_path / "leak.safetensors")
    loaded = load(tmp_path / "leak.safetensors", build)
    assert type(loaded) is kind
    assert same(saved, loaded)


@settings(max_examples=25, deadline=None)
@given(victims=st.integers(1, 4), restarts=st.integers(1, 4), stacked=st.booleans(), data=st.data())
def test_stacks_split_repeat_and_join(victims: int, restarts: int, stacked: bool, data: st.DataObject) -> None:
    whole = leak(victims, stacked=stacked)
    assert same(stack([whole[victim] for victim in range(victims)]), whole) or (stacked and victims == 1)
    repeated = whole.repeat(restarts)
    repeated.check()
    assert repeated.restarts.tolist() == list(range(restarts)) * victims
    victim = data.draw(st.integers(0, victims - 1))
    for name in whole.observed:
        assert torch.equal(repeated.observed[name][victim * restarts], whole.observed[name][victim])
    assert same(whole[-1], whole[victims - 1])


def test_weights_get_a_victims_axis_only_where_they_differ() -> None:
    one, other = leak(2, seed=0), leak(2, seed=1)
    assert not stack([one[0], one[1]]).stacked
    mixed = stack([one, other])
    assert mixed.stacked
    mixed.check()
    assert torch.equal(mixed.weights["1.weight"][3], other.weights["1.weight"])  # type: ignore[index]
    assert torch.equal(mixed[3:].weights["1.weight"][0], other.weights["1.weight"])  # type: ignore[index]


def test_a_mean_of_answers_is_as_precise_as_it_says() -> None:
    true, draw = leak(1), torch.Generator().manual_seed(0)
    answers = [
        dataclasses.replace(
            true,
            observed={name: t + 0.01 * torch.randn(t.shape, generator=draw) for name, t in true.observed.items()},
            resolution=0.01,
        )
        for _ in range(9)
    ]
    average = mean(answers, "none")
    wrong = torch.cat([(average.observed[name] - tensor).flatten() for name, tensor in true.observed.items()])
    assert float(wrong.square().mean().sqrt()) == pytest.approx(average.resolution, rel=0.05)
    with pytest.raises(FedtapError, match="different weights"):
        mean([true, leak(1, seed=1)], "none")
    with pytest.raises(FedtapError, match="different weights"):
        mean([true, dataclasses.replace(true, weights=None)], "none")


def test_leaks_of_unequal_protocol_are_not_stacked() -> None:
    with pytest.raises(FedtapError, match="group them by protocol"):
        stack([leak(model="mlp"), leak(model="convnet")])
    with pytest.raises(FedtapError, match="at least one victim"):
        stack([])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_gradient_captured_elsewhere_may_have_another_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "leak.safetensors"
    leak().save(path)
    whole = {name: t.clone() for name, t in load_file(path).items()}  # not the file itself, which is written anew
    save_file({name: t.to(dtype) if t.is_floating_point() else t for name, t in whole.items()}, path)
    loaded = load(path, build)
    assert all(
        tensor.dtype == torch.float32 for tensor in (*loaded.observed.values(), *(loaded.weights or {}).values())
    )
    torch.testing.assert_close(loaded.observed["1.weight"], whole["gradient/1.weight"], rtol=1e-2, atol=1e-2)


def broken(tmp_path: Path, change: str) -> Path:
    path = tmp_path / "leak.safetensors"
    leak().save(path)
    tensors, about = load_file(path), json.loads(path.with_suffix(".json").read_text())
    if change == "nan":
        tensors["gradient/1.bias"][1, 2] = float("nan")
    elif change == "missing":
        del tensors["gradient/1.bias"]
    elif change == "misshapen":
        tensors["gradient/1.bias"] = tensors["gradient/1.bias"][:, :-1].contiguous()
    elif change == "whole numbers":
        tensors["gradient/1.bias"] = tensors["gradient/1.bias"].long()
    elif change == "another model":
        about["protocol"]["model"] = "convnet"
    elif change == "unknown model":
        about["protocol"]["model"] = "lenett"
    elif change == "names code":
        about["protocol"]["model"] = "os:system"
    elif change == "no clients":
        del tensors["clients"]
    elif change == "batch 0":
        about["protocol"]["batch"] = 0
    elif change == "half an image":
        about["protocol"] |= {"batch": 3, "summed": 2}
    elif change == "strange kind":
        about["kind"] = "pickle"
    elif change == "format":
        about["format"] = 99
    elif change == "nobody":
        tensors = {name: tensor[:0] if "weights" not in name else tensor for name, tensor in tensors.items()}
    elif change == "fewer rounds":
        tensors["rounds"] = tensors["rounds"][1:]
    elif change == "float clients":
        tensors["clients"] = tensors["clients"].float()
    elif change == "a stray tensor":
        tensors["private/images"] = torch.zeros(1)
    elif change == "local_steps":
        about["protocol"]["local_steps"] = 3
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(about))
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "not safetensors":
        path.write_bytes(b"\x80\x04 a pickle, say")
    elif change == "no json":
        path.with_suffix(".json").unlink()
    elif change == "json is a list":
        path.with_suffix(".json").write_text("[]")
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nan", "NaN or infinity"),
        ("missing", r"missing 1\.bias"),
        ("misshapen", "has shape"),
        ("whole numbers", "floating point"),
        ("another model", "not those of model 'convnet'"),
        ("unknown model", "did you mean lenet"),
        ("names code", "may not name code"),
        ("no clients", "lacks the tensors clients"),
        ("nobody", "at least one"),
        ("fewer rounds", "one entry a victim"),
        ("float clients", "int64"),
        ("a stray tensor", "does not belong to a gradient leak"),
        ("local_steps", "several steps give an update"),
        ("batch 0", "whole numbers from 1"),
        ("half an image", "batch is a multiple of summed"),
        ("strange kind", "of the kind 'pickle'"),
        ("format", "format 99"),
        ("truncated", "truncated or of another format"),
        ("not safetensors", "cannot be read as safetensors"),
        ("no json", "does not exist"),
        ("json is a list", "holds no JSON object"),
    ],
)
def test_a_bad_leak_is_refused_with_its_reason(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(FedtapError, match=said):
        load(broken(tmp_path, change), build)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 2000), flip=st.integers(0, 2000), byte=st.integers(0, 255))
def test_no_damaged_header_does_anything_but_load_or_be_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("leak") / "leak.safetensors"
    leak(1).save(path)
    content = bytearray(path.read_bytes())
    content[flip % len(content)] = byte
    path.write_bytes(bytes(content[: len(content) - cut]))
    with contextlib.suppress(FedtapError):
        load(path, build).check()


@pytest.mark.parametrize("version", [1, 2])
def test_trained_weights_of_the_former_kind_are_read(tmp_path: Path, version: int) -> None:
    """They were called stationary, in the description and before the tensors' names."""
    trained = leak(kind=TrainedWeightsLeak)
    path = tmp_path / "leak.safetensors"
    trained.save(path)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["kind"] == "trained_weights"
    about |= {"kind": "stationary", "format": version}
    if version == 1:
        terms = about["protocol"]
        terms["steps"], terms["listener"] = terms.pop("local_steps"), terms.pop("threat_model")
    path.with_suffix(".json").write_text(json.dumps(about))
    tensors = {name.replace("trained_weights/", "stationary/"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    found = load(path, build)
    assert type(found) is TrainedWeightsLeak
    assert same(trained, found)
