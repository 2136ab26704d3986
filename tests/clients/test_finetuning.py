"""Clients that fine-tune: the steps by the plain formula, what travels, and what a defence acts on."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedtap.clients.finetuning import adapter_reply, checkpoint_reply
from fedtap.clients.training import carried
from fedtap.simulator.attack import generator
from fedtap.simulator.data.documents import Documents
from fedtap.simulator.leaks import Protocol
from fedtap.simulator.models.adapters import Lora, adapter_of, inject
from fedtap.simulator.models.diffusion import denoiser
from fedtap.simulator.models.diffusion_training import DiffusionTraining
from fedtap.simulator.models.fine_tuning import FineTuning
from fedtap.simulator.models.language import LanguageModel, build_language
from fedtap.simulator.models.text_model import PAD
from fedtap.simulator.wire.grid import LocalGrid
from fedtap.simulator.wire.records import tensors_of
from tests.support import diffusion

PIECES, TOKENS, LORA = 11, 5, Lora(rank=2, alpha=4)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, PAD, PAD], [5, 3, 5, 8, PAD], [7, 9, 3, 2, 3], [8, 4, 6, 2, 6]])


@cache
def server(kind: str = "decoder") -> LanguageModel:
    vocabulary = "" if kind == "decoder" else f"vocabulary={PIECES}, "
    name = f"{kind}({vocabulary}width=8, layers=1, heads=2)"
    return build_language(name, TOKENS, PIECES if kind == "decoder" else 3, 0)


def documents(kind: str = "decoder") -> Documents:
    return Documents(IDS, None if kind == "decoder" else torch.tensor([0, 1, 2, 0, 1]))


def held(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("kind", ["decoder", "bert"])
def test_a_step_of_sgd_is_the_formula(kind: str) -> None:
    net, known = copy.deepcopy(server(kind)), documents(kind)
    FineTuning(1, 8, "sgd", 0.5)(net, known.ids, known.labels, generator(0))
    plain = copy.deepcopy(server(kind))
    rows = range(len(IDS))
    labels = [None if known.labels is None else known.labels[n : n + 1] for n in rows]
    loss = sum(plain.losses(IDS[n : n + 1], labels[n])[0] for n in rows) / len(IDS)
    names = dict(plain.named_parameters())
    for (name, weight), gradient in zip(names.items(), torch.autograd.grad(loss, [*names.values()]), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(held(net)[name], (weight - 0.5 * gradient).detach(), rtol=1e-4, atol=1e-6)
    assert not torch.equal(held(net)["head.weight"], held(plain)["head.weight"])
    assert not net.training


def test_epochs_are_batches_in_the_generators_order() -> None:
    how = FineTuning(epochs=3, batch=2, learning_rate=1e-2)
    net, plain = copy.deepcopy(server()), copy.deepcopy(server())
    how(net, IDS, None, generator(4))
    adam, draw, steps = torch.optim.AdamW(plain.parameters(), lr=1e-2), generator(4), 0
    for _ in range(3):
        order = torch.randperm(len(IDS), generator=draw).tolist()
        for first in range(0, len(IDS), 2):
            adam.zero_grad()
            plain.losses(IDS[order[first : first + 2]], None).mean().backward()  # type: ignore[no-untyped-call]
            adam.step()
            steps += 1
    assert steps == 9
    for name, tensor in held(net).items():
        torch.testing.assert_close(tensor, held(plain)[name], rtol=1e-4, atol=1e-6)
    other = copy.deepcopy(server())
    how(other, IDS, None, generator(5))
    assert not torch.equal(held(other)["head.weight"], held(net)["head.weight"])


@given(
    epochs=st.integers(1, 20),
    batch=st.integers(1, 64),
    documents=st.integers(1, 500),
    summed=st.integers(1, 10),
    optimiser=st.sampled_from(["sgd", "adamw"]),
)
def test_the_protocol_says_how_clients_tune(
    epochs: int, batch: int, documents: int, summed: int, optimiser: str
) -> None:
    how = FineTuning(epochs, batch, optimiser, 0.25)
    protocol = Protocol(
        model="decoder",
        shape=(TOKENS,),
        classes=PIECES,
        batch=batch * summed,
        local_steps=epochs * math.ceil(documents / batch),
        learning_rate=0.25,
        optimiser=optimiser,
        summed=summed,
    )
    assert FineTuning.of(protocol, documents * summed) == how


@pytest.mark.parametrize(("steps", "examples"), [(1, 500), (0, 3), (1, 1)])
def test_a_protocol_without_epochs_is_one_epoch(steps: int, examples: int) -> None:
    protocol = Protocol("decoder", (TOKENS,), PIECES, batch=1, local_steps=steps)
    assert FineTuning.of(protocol, examples).epochs == 1


def order(arrays: ArrayRecord) -> Message:
    LocalGrid(ClientApp(), 1)  # a message is of a run
    return Message(RecordDict({"arrays": arrays}), 2, "train.checkpoint")


HOW, TRAINING = FineTuning(epochs=2, batch=2, learning_rate=1e-2), DiffusionTraining(3, 2, 1e-2)

KINDS = ("decoder", "bert", "diffusion")


def broadcast(kind: str = "decoder") -> nn.Module:
    """A copy of what the server sends."""
    if kind == "diffusion":
        diffusion.installed()
        return denoiser(diffusion.tiny(), 0)
    return copy.deepcopy(server(kind))


def tune(net: Any, kind: str, draw: torch.Generator) -> None:
    """As a client does."""
    if kind == "diffusion":
        around = diffusion.around()
        TRAINING(net, around, diffusion.pictures(5, 0), around.condition([diffusion.CAPTION]), draw)
    else:
        HOW(net, documents(kind).ids, documents(kind).labels, draw)


def replied(defence: str = "none", lora: Lora | None = None, kind: str = "decoder", seed: int = 0) -> Message:
    return reply(order(carried(broadcast(kind))), defence, lora, kind, seed)


def reply(
    message: Message, defence: str = "none", lora: Lora | None = None, kind: str = "decoder", seed: int = 0
) -> Message:
    net, draw = broadcast(kind), generator(seed, "client")

    def tuning(net: nn.Module) -> None:
        tune(net, kind, draw)

    if lora is None:
        return checkpoint_reply(message, net, tuning, 5, 3, defence, draw)
    return adapter_reply(message, net, lora, tuning, 5, 3, defence, draw, 7)


def sent(defence: str = "none", lora: Lora | None = None, kind: str = "decoder", seed: int = 0) -> dict[str, Tensor]:
    return tensors_of(replied(defence, lora, kind, seed).content.array_records["arrays"])


def change(after: dict[str, Tensor], before: dict[str, Tensor]) -> Tensor:
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_is_the_tuned_model(kind: str) -> None:
    net = broadcast(kind)
    tune(net, kind, generator(0, "client"))
    found = sent(kind=kind)
    assert found.keys() == tensors_of(carried(net)).keys()
    for name, tensor in held(net).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(found[name], buffer) for name, buffer in net.named_buffers())
    assert dict(replied(kind=kind).content.metric_records["metrics"]) == {"num-examples": 5, "partition": 3}


ADAPTED = {
    "decoder": {"query", "value"},
    "diffusion": {"to_q", "to_k", "to_v", "0"},
}
"""Kind -> last names of the layers that get an adapter."""


@pytest.mark.parametrize("kind", ADAPTED)
def test_an_adapter_travels_alone(kind: str) -> None:
    net, before = inject(broadcast(kind), LORA, 7), held(broadcast(kind))
    begun = {name: tensor.detach().clone() for name, tensor in adapter_of(net).items()}
    tune(net, kind, generator(0, "client"))
    found = sent(lora=LORA, kind=kind)
    layers = {name.rpartition(".lora_")[0] for name in found}
    assert {layer.rpartition(".")[2] for layer in layers} == ADAPTED[kind]
    assert len(found) == 2 * len(layers)
    for name, tensor in adapter_of(net).items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[name], begun[name], atol=1e-4)
    kept = dict(net.named_parameters())
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items() if name in kept)
    metrics = dict(replied(lora=LORA, kind=kind).content.metric_records["metrics"])
    assert metrics == {"num-examples": 5, "partition": 3}


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
def test_a_defence_acts_on_the_change(lora: Lora | None, kind: str) -> None:
    if lora is None:
        before = held(broadcast(kind))
    else:
        before = {name: tensor.detach() for name, tensor in adapter_of(inject(broadcast(kind), LORA, 7)).items()}
    plain, clipped = (change(sent(defence, lora, kind), before) for defence in ("none", "clip(0.01)"))
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(torch.cosine_similarity(plain, clipped, 0)) > 0.999
    assert float(plain.norm()) > 0.02
    noise = change(sent("noise(0.5)", lora, kind), before) - plain
    assert float(noise.std()) == pytest.approx(0.5, rel=0.2)
    assert torch.equal(change(sent("noise(0.5)", lora, kind), before) - plain, noise)
    assert not torch.allclose(change(sent("noise(0.5)", lora, kind, seed=1), before) - plain, noise, atol=0.1)


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
def test_another_models_weights_are_not_taken(lora: Lora | None, kind: str) -> None:
    other = order(carried(server("bert")))
    with pytest.raises(KeyError, match="not those of this client's model"):
        reply(other, lora=lora, kind=kind)
    small = {name: tensor[:1].contiguous() for name, tensor in tensors_of(carried(broadcast(kind))).items()}
    cut = order(ArrayRecord(small))
    with pytest.raises(RuntimeError, match="size mismatch"):
        reply(cut, lora=lora, kind=kind)
