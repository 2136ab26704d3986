"""What a scenario about fine-tuning holds: everybody's documents, and the model that is broadcast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from fedtap.simulator.attack import generator
from fedtap.simulator.corpus import vocabulary_of
from fedtap.simulator.data.documents import Documents, Vocabulary, concatenated, encoded, paragraphs
from fedtap.simulator.data.texts import TextSide, WordPieces, open_texts
from fedtap.simulator.data.topics import TOPICS, documents
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.leaks import Tensors, float_buffers
from fedtap.simulator.models.fine_tuning import FineTuning
from fedtap.simulator.models.language import LANGUAGE_MODELS, build_language
from fedtap.simulator.models.text_model import TextModel

PIECES = 4096
"""Pieces of a vocabulary that is learned from the corpus, at most."""

PRETRAINING = FineTuning(epochs=4, batch=32, learning_rate=3e-3)
"""How a small model is trained before it is broadcast: for a while, on a little of everything."""

PRETRAINED_ON = 100
"""Documents on each topic, on which it is."""

CLASSIFIERS = ("minilm", "bert")
"""Models of texts that predict a label."""

TESTED, CLASSIFIED = 300, 500
"""Documents of a client's domain, on which models of the next token and classifiers are compared."""


@dataclass(frozen=True, eq=False)
class Task:
    """Documents by what they are for, and the model.

    Args:
        corpus: what the attacker chooses from.
        domains: of each of its documents, the number of its domain; clients' are among them.
        domain: client -> its domain.
        private: client -> what it fine-tunes on.
        outside: client -> as many documents of its domain that nobody trains on.
        tested: client -> documents of its domain, on which models are compared.
        pretraining: what a small model is trained on before it is broadcast, none of it in the corpus; None where it
            comes trained.
        outputs: tokens of the vocabulary, or classes.
    """

    vocabulary: Vocabulary
    corpus: Documents
    domains: Int[Tensor, "documents"]
    domain: Mapping[int, int]
    private: Mapping[int, Documents]
    outside: Mapping[int, Documents]
    tested: Mapping[int, Documents]
    pretraining: Documents | None
    model: str
    tokens: int
    outputs: int

    def network(self, seed: int | None = None) -> TextModel:
        """The architecture, with weights that are not trained here; on the meta device without a seed."""
        return text_network(self.model, self.tokens, self.outputs, seed)

    def broadcast(self, seed: int) -> Tensors:
        """The parameters and buffers that the server sends first."""
        return _broadcast(self, seed)


def text_network(name: str, tokens: int, outputs: int, seed: int | None) -> TextModel:
    """A small model of this project, or a pretrained one."""
    if name.partition("(")[0] in LANGUAGE_MODELS:
        return build_language(name, tokens, outputs, seed)
    from fedtap.simulator.models.pretrained import pretrained

    return pretrained(name, seed)


@lru_cache(maxsize=2)
def _broadcast(task: Task, seed: int) -> Tensors:
    net = task.network(seed)
    if task.pretraining is not None:
        PRETRAINING(net, task.pretraining.ids, task.pretraining.labels, generator(seed, "pretraining"))
    return {name: tensor.detach() for name, tensor in (dict(net.named_parameters()) | float_buffers(net)).items()}


@lru_cache(maxsize=2)
def topics(model: str, tokens: int, corpus: int, private: int, clients: int, taken: int, seed: int) -> Task:
    """Made-up documents: each client's are on one of the first `taken` topics, and the corpus is on all eight."""
    if model.partition("(")[0] in CLASSIFIERS:
        raise FedtapError(
            f"{short(model)} sorts texts into classes, and made-up documents have none: use select_ag_news, or --model "
            "decoder."
        )
    names = list(TOPICS)
    on = {client: client % taken for client in range(clients)}
    shares = [len(range(place, corpus, len(names))) for place in range(len(names))]
    public = [documents(topic, many, seed, 0) for topic, many in zip(names, shares, strict=True)]
    vocabulary, pretraining = _vocabulary(model, (text for some in public for text in some)), None
    if model.partition("(")[0] in LANGUAGE_MODELS:
        little = [encoded(documents(topic, PRETRAINED_ON, seed, 1), vocabulary, tokens) for topic in names]
        pretraining = Documents(torch.cat(little))

    def of(client: int, many: int, what: int) -> Documents:
        return Documents(encoded(documents(names[on[client]], many, seed, what, client), vocabulary, tokens))

    return Task(
        vocabulary=vocabulary,
        corpus=concatenated([Documents(encoded(some, vocabulary, tokens)) for some in public]),
        domains=torch.arange(len(names)).repeat_interleave(torch.tensor(shares)),
        domain=on,
        private={client: of(client, private, 2) for client in on},
        outside={client: of(client, private, 3) for client in on},
        tested={client: of(client, TESTED, 4) for client in on},
        pretraining=pretraining,
        model=model,
        tokens=tokens,
        outputs=len(vocabulary),
    )


NEWS, WIKIPEDIA = 0, 1
"""Domains of the corpus of `news`."""


@lru_cache(maxsize=2)
def news(
    data_root: Path, model: str, tokens: int, corpus: int, share: float, private: int, clients: int, seed: int
) -> Task:
    """AG News, and WikiText-2 with some more of it: news that the client does not hold are `share` of the corpus.

    Raises:
        FedtapError: a file is missing, or there are too few news.
    """
    dataset = open_texts("ag_news", data_root)
    mine, others = _shuffled(dataset.auxiliary, seed), _shuffled(dataset.target, seed)
    base, classified = model.partition("(")[0], model.partition("(")[0] in CLASSIFIERS
    mixed, tested = round(share * corpus), CLASSIFIED if classified else TESTED
    if 2 * private * clients > len(mine[0]) or mixed + tested > len(others[0]):
        raise FedtapError(
            f"AG News has {len(mine[0]):,} texts for {clients} clients with {private} private and as many other ones, "
            f"and {len(others[0]):,} for a test and a corpus with {mixed:,} of them: lower --documents or --corpus."
        )
    wiki = list(paragraphs(data_root / "wikitext2_test.txt", tokens))
    wiki += list(paragraphs(data_root / "wikitext2_valid.txt", tokens))
    if len(wiki) < corpus - mixed:
        raise FedtapError(
            f"WikiText-2 has {len(wiki):,} documents of {tokens} words here, and a corpus of {corpus:,} with {share:g} "
            f"of news needs {corpus - mixed:,}: lower --corpus, or raise --share."
        )
    shuffled = torch.randperm(len(wiki), generator=generator(seed, "wikipedia")).tolist()
    order, rest = shuffled[: corpus - mixed], shuffled[corpus - mixed :]
    little = [] if classified else [wiki[at] for at in rest[: PRETRAINED_ON * len(TOPICS)]]
    public = [*others[0][:mixed], *(wiki[at] for at in order)]
    vocabulary = _vocabulary(model, public)

    def of(side: tuple[list[str], Tensor], first: int, many: int) -> Documents:
        ids = encoded(side[0][first : first + many], vocabulary, tokens)
        return Documents(ids, side[1][first : first + many] if classified else None)

    held = range(clients)
    return Task(
        vocabulary=vocabulary,
        corpus=Documents(encoded(public, vocabulary, tokens)),
        domains=torch.cat([torch.full((mixed,), NEWS), torch.full((corpus - mixed,), WIKIPEDIA)]),
        domain=dict.fromkeys(held, NEWS),
        private={client: of(mine, client * private, private) for client in held},
        outside={client: of(mine, (clients + client) * private, private) for client in held},
        tested=dict.fromkeys(held, of(others, mixed, tested)),
        pretraining=Documents(encoded(little, vocabulary, tokens)) if base in LANGUAGE_MODELS and little else None,
        model=model,
        tokens=tokens,
        outputs=dataset.classes if classified else len(vocabulary),
    )


def _vocabulary(model: str, public: Iterable[str]) -> Vocabulary:
    """What a model cuts texts by: its own, or one that is learned from public texts."""
    base = model.partition("(")[0]
    return WordPieces.learned(public, PIECES) if base in LANGUAGE_MODELS and base != "minilm" else vocabulary_of(model)


def _shuffled(side: TextSide, seed: int) -> tuple[list[str], Int[Tensor, "texts"]]:
    """Texts of two words or more, in a random order."""
    kept = [at for at, text in enumerate(side.texts) if len(text.split()) > 1]
    order = [kept[at] for at in torch.randperm(len(kept), generator=generator(seed, "news")).tolist()]
    return [side.texts[at] for at in order], side.labels[order]
