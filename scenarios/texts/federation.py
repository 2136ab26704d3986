"""The federation that trains a language model on texts: what is public of it, what clients hold, and one round of
it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from jaxtyping import Int
from torch import Tensor

from fedtap.simulator.attack import generator
from fedtap.simulator.data.texts import Cut, WordPieces, cut, open_texts
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.exchanges import ExchangeReader
from fedtap.simulator.leaks import Leak, Protocol, float_buffers, stack
from fedtap.simulator.models.language import LanguageModel, build_language, minilm_folder
from fedtap.simulator.wire.messages import without
from fedtap.simulator.wire.records import reading
from fedtap.simulator.wire.roll import call
from fedtap.simulator.wire.wiretap import Wiretap

if TYPE_CHECKING:
    from fedtap.scenarios.texts.text_gradients import TextGradients

VOCABULARY = 16384
"""Pieces learned from the public texts, at most, for a model that has no vocabulary of its own."""


@dataclass(frozen=True, eq=False)
class FederatedTexts:
    """A dataset's texts, in the model's vocabulary."""

    vocabulary: WordPieces
    classes: int
    public: Cut
    victims: Cut


def corpus_of(setting: TextGradients, data_root: Path) -> FederatedTexts:
    """The setting's texts.

    Raises:
        FedtapError: they cannot be used.
    """
    return _corpus(setting.dataset, setting.model == "minilm", setting.tokens, data_root)


@lru_cache(maxsize=4)
def _corpus(name: str, pretrained: bool, tokens: int, data_root: Path) -> FederatedTexts:
    dataset = open_texts(name, data_root)
    if pretrained:
        vocabulary = WordPieces.read(minilm_folder() / "vocab.txt")
    else:
        vocabulary = WordPieces.learned(dataset.auxiliary.texts, VOCABULARY)
    return FederatedTexts(
        vocabulary, dataset.classes, cut(dataset.auxiliary, vocabulary, tokens), cut(dataset.target, vocabulary, tokens)
    )


def private(
    setting: TextGradients, corpus: FederatedTexts, client: int
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch"]]:
    """The texts that this client holds, and their classes: those of a shuffle, in turns.

    Raises:
        FedtapError: there are too few.
    """
    side, victims, batch = corpus.victims, setting.victims, setting.batch
    if victims * batch > len(side):
        raise FedtapError(
            f"{victims} victims with {batch} texts each need {victims * batch}, and {setting.dataset} has {len(side)} "
            f"of {setting.tokens} tokens or more: lower --victims, --batch or --tokens."
        )
    order = torch.randperm(len(side), generator=generator(setting.seed, "texts"))
    mine = order[client * batch : (client + 1) * batch]
    return side.ids[mine], side.labels[mine]


def _protocol_of(setting: TextGradients, corpus: FederatedTexts) -> Protocol:
    """The public terms."""
    pieces = len(corpus.vocabulary)
    sizes = {"gpt": f"(width={setting.width})", "bert": f"(vocabulary={pieces}, width={setting.width})", "minilm": ""}
    return Protocol(
        model=setting.model + sizes[setting.model],
        shape=(setting.tokens,),
        classes=pieces if setting.model == "gpt" else corpus.classes,
        batch=setting.batch,
        learning_rate=setting.learning_rate,
        defence=setting.defence,
    )


def network_of(setting: TextGradients, corpus: FederatedTexts) -> LanguageModel:
    """The model with its initial weights."""
    protocol = _protocol_of(setting, corpus)
    return build_language(protocol.model, setting.tokens, protocol.classes, setting.weights_seed)


def play_texts(setting: TextGradients, grid: Grid, number: int, corpus: FederatedTexts) -> tuple[Leak, dict[int, str]]:
    """A round of Flower's FedAvg with a tap on it: the clients' gradients in one stack, and client -> why it sent none.

    Args:
        number: the setting's place in the run's plan.

    Raises:
        ClientError: no client sent one.
    """
    net, protocol = network_of(setting, corpus), _protocol_of(setting, corpus)
    skeleton = build_language(protocol.model, setting.tokens, protocol.classes)
    who, exchanges = call(grid), ExchangeReader(skeleton, protocol)
    leaks: dict[int, Leak] = {}
    failed: dict[int, str] = {}
    reasons: dict[int, object] = dict.fromkeys(
        range(setting.victims), " ".join(who.strangers.values()) or "it did not answer"
    )

    def ear(order: Message, answer: Message) -> None:
        client = who.client(order)
        if answer.has_error():
            reasons[client] = answer.error.reason
            return
        try:
            with reading(client):
                leaks[client] = exchanges.leak(order.content, answer.content, client, 1)
        except FedtapError as error:
            reasons[client] = f"FedtapError: {error}"
            raise
        del reasons[client]

    tensors = dict(net.named_parameters()) | float_buffers(net)
    FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1).start(
        Wiretap(grid, ear),
        ArrayRecord({name: tensor.detach() for name, tensor in tensors.items()}),
        num_rounds=1,
        train_config=ConfigRecord({"part": number}),
    )
    without(reasons, failed, len(leaks))
    return stack([leaks[client] for client in sorted(leaks)]), failed
