"""Leaks of checkpoints: saved and loaded again, all weights or a LoRA, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fedtap.attackers import parse, suited
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak, Leak, load, stack
from fedtap.simulator.models.adapters import Lora, inject
from fedtap.simulator.models.attention import architecture
from fedtap.simulator.models.text_model import filled
from tests.simulator.test_leaks import leak as of_pictures
from tests.simulator.test_leaks import same
from tests.support.checkpoint_leaks import LORA, PRIVATE, broadcast, leak_on, on_topic, public, tuned

TOPICS = (0, 1)


def again(leak: Leak, folder: Path) -> CheckpointLeak:
    """From a file."""
    leak.save(folder / "leak.safetensors")
    found = load(folder / "leak.safetensors", architecture)
    assert isinstance(found, CheckpointLeak)
    return found


@pytest.mark.parametrize(("kind", "adapter"), [("decoder", ""), ("decoder", LORA), ("bert", "")])
def test_a_saved_checkpoint_comes_back(kind: str, adapter: str, tmp_path: Path) -> None:
    leak = leak_on(TOPICS, kind, adapter)
    found = again(leak, tmp_path)
    assert same(leak, found)
    assert torch.equal(found.examples, leak.examples)  # type: ignore[arg-type]
    for victim in range(2):
        one, other = leak.tuned(victim), found.tuned(victim)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adapter", ["", LORA])
def test_rounds_from_other_weights_stack_and_come_back(adapter: str, tmp_path: Path) -> None:
    first = leak_on(TOPICS, adapter=adapter)
    moved = {name: tensor + 1 for name, tensor in (first.weights or {}).items()}
    leak = stack([first, dataclasses.replace(first, weights=moved, rounds=first.rounds + 1)])
    found = again(leak, tmp_path)
    assert same(leak, found)
    assert found.stacked
    name = "blocks.0.query.weight"
    torch.testing.assert_close(found.broadcast(2)[name], found.broadcast(0)[name] + 1)
    if adapter:
        torch.testing.assert_close(found.tuned(2)[name] - found.tuned(0)[name], torch.ones(16, 16))


def test_tuned_weights_are_the_ones_that_came_back() -> None:
    leak = leak_on(TOPICS)
    assert leak.broadcast(0).keys() == leak.tuned(0).keys() == (leak.weights or {}).keys()
    for name, tensor in leak.tuned(1).items():
        assert torch.equal(tensor, leak.observed[name][1])
        assert torch.equal(leak.broadcast(1)[name], (leak.weights or {})[name])


def test_a_tuned_lora_computes_what_its_client_did() -> None:
    leak = leak_on((2,), adapter=LORA)
    theirs = inject(broadcast("decoder", adapter=True), Lora.parse(LORA), 0)
    held = dict(theirs.named_parameters())
    for name, tensor in leak.observed.items():
        held[name.replace("_A.", "_A.default.").replace("_B.", "_B.default.")].data.copy_(tensor[0])
    ours = filled(leak.network, leak.tuned(0))
    ids, _ = public()
    with torch.no_grad():
        wanted = theirs.losses(ids[:9], None)
        torch.testing.assert_close(ours.losses(ids[:9], None), wanted, rtol=1e-4, atol=1e-4)  # type: ignore[operator]
        assert not torch.allclose(broadcast("decoder", adapter=True).losses(ids[:9], None), wanted, atol=1e-2)


def damaged(leak: Leak, **change: torch.Tensor | None) -> Leak:
    """Of other tensors; None for none."""
    kept = {**leak.observed, **change}
    return dataclasses.replace(leak, observed={name: tensor for name, tensor in kept.items() if tensor is not None})


def test_layers_that_differ_are_refused() -> None:
    leak = leak_on(TOPICS)
    head = leak.observed["head.weight"]
    for name, change in {
        "one row less": {"head.weight": head[:, :-1]},
        "one victim's": {"head.weight": head[0]},
        "another number of victims": {"head.weight": head[:1]},
        "a layer less": {"head.weight": None},
        "a layer more": {"tail.weight": head},
        "not a number": {"head.weight": head * torch.nan},
    }.items():
        with pytest.raises(FedtapError, match=r"head|tail") as caught:
            damaged(leak, **change).check()
        assert len(str(caught.value)) < 500, name


def test_an_adapter_for_another_base_is_refused() -> None:
    leak = leak_on(TOPICS, adapter=LORA)
    name = "blocks.0.query.lora_A.weight"
    a = leak.observed[name]
    for change in ({name: a[:, :, :-1]}, {name: a[:, :-1]}, {name: None}, {"blocks.1.query.lora_A.weight": a}):
        with pytest.raises(FedtapError, match="lora_A"):
            damaged(leak, **change).check()
    other = dataclasses.replace(leak, protocol=dataclasses.replace(leak.protocol, adapter="lora(rank=3, alpha=32)"))
    with pytest.raises(FedtapError, match="lora_"):
        other.check()


def test_an_adapter_is_no_whole_checkpoint_and_the_reverse() -> None:
    whole, adapted = leak_on(TOPICS), leak_on(TOPICS, adapter=LORA)
    for observed, protocol in ((whole.observed, adapted.protocol), (adapted.observed, whole.protocol)):
        with pytest.raises(FedtapError):
            dataclasses.replace(whole, observed=observed, protocol=protocol).check()


@pytest.mark.parametrize(
    ("term", "value"), [("adapter", "lora(rank=0)"), ("adapter", 7), ("adapter", "dora"), ("optimiser", "lion")]
)
def test_a_file_with_terms_that_are_none_is_refused(term: str, value: object, tmp_path: Path) -> None:
    leak_on(TOPICS, adapter=LORA).save(tmp_path / "leak.safetensors")
    about = json.loads((tmp_path / "leak.json").read_text())
    about["protocol"][term] = value
    (tmp_path / "leak.json").write_text(json.dumps(about))
    with pytest.raises(FedtapError) as caught:
        load(tmp_path / "leak.safetensors", architecture)
    assert len(str(caught.value)) < 400


def test_no_attack_is_tried_on_its_own() -> None:
    with pytest.raises(FedtapError, match="No attack is tried on its own on a CheckpointLeak"):
        suited(leak_on(TOPICS))


@pytest.mark.parametrize("attack", ["select", "random_selection", "lexical"])
def test_a_model_that_reads_no_texts_is_refused(attack: str) -> None:
    with pytest.raises(FedtapError, match="reads documents by the leak's own model, and 'mlp' is fed none"):
        parse(attack)[0].accepts(of_pictures(model="mlp", kind=CheckpointLeak))


def test_clients_that_send_what_the_protocol_says_are_stacked() -> None:
    leak, sent = leak_on((3,)), tuned(on_topic(3, PRIVATE, 2, 3))
    assert leak.observed.keys() == sent.keys()
    assert all(torch.equal(leak.observed[name][0], sent[name]) for name in sent)
