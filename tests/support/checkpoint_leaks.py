"""Leaks of checkpoints for the attacks' tests: tiny models of texts that are tuned on made-up documents."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fedtap.simulator.attack import generator
from fedtap.simulator.corpus import Corpus
from fedtap.simulator.data.documents import Documents, concatenated, encoded
from fedtap.simulator.data.texts import WordPieces
from fedtap.simulator.data.topics import TOPICS, documents
from fedtap.simulator.leaks import CheckpointLeak, Protocol, float_buffers
from fedtap.simulator.models.adapters import Lora, adapter_of, inject
from fedtap.simulator.models.fine_tuning import FineTuning
from fedtap.simulator.models.language import LanguageModel, build_language

TOKENS, CLASSES = 14, 4
PUBLIC, PRIVATE = 20, 24
"""Documents on a topic in the corpus, and of a client."""

SEED = 5
"""Of the topics' habits."""

HOW = FineTuning(epochs=4, batch=8, learning_rate=5e-3)
LORA, LONGER = "lora(rank=4, alpha=32)", FineTuning(epochs=8, batch=8, learning_rate=2e-2)


@cache
def vocabulary() -> WordPieces:
    return WordPieces.learned((text for topic in TOPICS for text in documents(topic, PUBLIC, SEED, 0)), 4096)


def on_topic(topic: int, many: int, *names: int) -> Documents:
    """Documents on one of the eight topics, of whose classes there are four."""
    texts = documents(list(TOPICS)[topic], many, SEED, *names)
    return Documents(encoded(texts, vocabulary(), TOKENS), torch.full((many,), topic % CLASSES))


@cache
def public() -> tuple[Tensor, Tensor]:
    """Documents to choose from, and the topic of each."""
    ids = torch.cat([on_topic(topic, PUBLIC, 0).ids for topic in range(len(TOPICS))])
    return ids, torch.arange(len(TOPICS)).repeat_interleave(PUBLIC)


def corpus(selected: int = PUBLIC, candidates: Tensor | None = None) -> Corpus:
    ids, _ = public()
    return Corpus(ids, ids[:0] if candidates is None else candidates, selected)


def name_of(kind: str) -> str:
    """`decoder`, of the next token, or `bert`, a classifier."""
    size = "" if kind == "decoder" else f"vocabulary={len(vocabulary())}, "
    return f"{kind}({size}width=16, layers=1, heads=2)"


def architecture(kind: str, seed: int | None = None) -> LanguageModel:
    return build_language(name_of(kind), TOKENS, len(vocabulary()) if kind == "decoder" else CLASSES, seed)


@cache
def broadcast(kind: str, adapter: bool = False) -> LanguageModel:
    """A model that has seen a little of every topic; more, where clients train an adapter alone."""
    net = architecture(kind, 0)
    some = concatenated([on_topic(topic, 24 if adapter else 12, 1) for topic in range(len(TOPICS))])
    how = FineTuning(10, 16, learning_rate=1e-2) if adapter else FineTuning(3, 16, learning_rate=5e-3)
    how(net, some.ids, some.labels, generator(0))
    return net


def tuned(
    private: Documents, kind: str = "decoder", how: FineTuning = HOW, adapter: str = "", seed: int = 0
) -> dict[str, Tensor]:
    """What a client sends that follows the protocol."""
    net = copy.deepcopy(broadcast(kind, bool(adapter)))
    if adapter:
        net = inject(net, Lora.parse(adapter), 3)
    how(net, private.ids, private.labels, generator(seed, "client"))
    sent = adapter_of(net) if adapter else dict(net.named_parameters())
    return {name: tensor.detach() for name, tensor in sent.items()}


def leak_of(
    private: Sequence[Documents],
    kind: str = "decoder",
    how: FineTuning = HOW,
    adapter: str = "",
) -> CheckpointLeak:
    """The checkpoints of clients with these documents, as many each."""
    sent = [tuned(one, kind, how, adapter, seed) for seed, one in enumerate(private)]
    net, names, many = broadcast(kind, bool(adapter)), torch.arange(len(private)), len(private[0])
    return CheckpointLeak(
        observed={name: torch.stack([one[name] for one in sent]) for name in sent[0]},
        protocol=Protocol(
            model=name_of(kind),
            shape=(TOKENS,),
            classes=len(vocabulary()) if kind == "decoder" else CLASSES,
            batch=how.batch,
            local_steps=how.epochs * -(-many // how.batch),
            learning_rate=how.learning_rate,
            optimiser=how.optimiser,
            adapter=adapter,
        ),
        network=architecture(kind),
        weights={name: tensor.detach() for name, tensor in net.named_parameters()},
        buffers=float_buffers(net),
        clients=names,
        rounds=torch.ones_like(names),
        restarts=torch.zeros_like(names),
        examples=torch.full_like(names, many),
    )


@cache
def leak_on(topics: tuple[int, ...], kind: str = "decoder", adapter: str = "") -> CheckpointLeak:
    """Of clients that each have documents on one of these topics."""
    return leak_of([on_topic(topic, PRIVATE, 2, topic) for topic in topics], kind, LONGER if adapter else HOW, adapter)


def precision(chosen: Tensor, topics: Sequence[int]) -> float:
    """Share of the chosen documents that are on their victim's topic."""
    _, on = public()
    return float((on[chosen] == torch.tensor(topics)[:, None]).double().mean())


def unmoved(leak: CheckpointLeak) -> CheckpointLeak:
    """The leak of clients that send back what they were sent."""
    weights = leak.weights or {}
    return dataclasses.replace(leak, observed={name: weights[name].expand_as(leak.observed[name]) for name in weights})
