"""Can a server read a text, word for word, off the gradient of one projection?

Expect: from a small GPT every token of every text, in batches of 1, 8 and 32, though no embedding is trained. It stops
where the batch has as many tokens as the model is wide: the gradient then spans everything, and every word seems to be
in it. Noise stops it where it drowns the smallest of the gradient's directions. An encoder gives away which tokens are
in the batch as easily, but which of them make a text is a search that grows with the batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Annotated, ClassVar, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from jaxtyping import Int
from torch import Tensor

from fedtap.attackers import parse
from fedtap.attackers.texts.dager import DAGER, Read
from fedtap.clients.texts import check_defence, train_on_texts
from fedtap.scenarios.command.options import Knob
from fedtap.simulator import scores
from fedtap.simulator.attack import Attack, Tokens, generator
from fedtap.simulator.data.texts import Cut, WordPieces, cut, open_texts
from fedtap.simulator.defences.notation import described, written
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.federation.rounds import as_expected
from fedtap.simulator.leaks import Leak, Protocol, float_buffers, stack
from fedtap.simulator.models.language import LANGUAGE_MODELS, LanguageModel, build_language, minilm_folder
from fedtap.simulator.report import curves
from fedtap.simulator.report.folder import Row
from fedtap.simulator.study import Outcome, Study, rows_of_failed, without
from fedtap.simulator.wire.records import reading
from fedtap.simulator.wire.roll import call
from fedtap.simulator.wire.threat_models import hear
from fedtap.simulator.wire.wiretap import Wiretap

VOCABULARY = 16384
"""Pieces learned from the public texts, at most, for a model that has no vocabulary of its own."""

SHOWN = 4
"""Victims, and texts of each, that the page shows."""

MOST = 2**30
"""Entries of all victims' gradients, at most; a block has 12 for each entry of width times width."""

KEPT = 2**28
"""Bytes of a leak up to which a run keeps it."""


def scenario(
    *,
    dataset: Annotated[str, Knob("NAME of the data root's NAME_train*.csv and NAME_test*.csv")] = "ag_news",
    model: Annotated[str, Knob("gpt, bert, or minilm", choices=LANGUAGE_MODELS)] = "gpt",
    batch: Annotated[int, Knob("private texts in the local step", 1, 4096)] = 8,
    tokens: Annotated[int, Knob("tokens to which each text is cut", 1, 510)] = 16,
    width: Annotated[int, Knob("numbers in a token's vector; 384 in minilm", 12, 4096)] = 384,
    victims: Annotated[int, Knob("clients, all of which are attacked", 1, 1000)] = 8,
    learning_rate: Annotated[float, Knob("learning rate of the clients' SGD", 1e-6, 1e3)] = 0.1,
    defence: Annotated[str, Knob("none, or what clients do to what they send: clip(1.0)+noise(0.01)")] = "none",
    attack: Annotated[str, Knob("dager, with settings if need be: dager(rounds=8)", swept=False)] = "dager",
    seed: Annotated[int, Knob("seed of the texts and of all else that is drawn, but for the weights", 0, 2**31)] = 0,
    weights_seed: Annotated[int, Knob("seed of the model's initial weights", 0, 2**31)] = 1234,
) -> TextGradients:
    """One round of FedSGD on texts, and the server reads them."""
    check_defence(defence)
    named = parse(attack)
    if len(named) != 1 or named[0].reconstructs is not Tokens:
        raise FedtapError(
            f"This scenario asks for one attack that brings back tokens, and {attack} is none: use dager."
        )
    if model == "minilm" and width != 384:
        raise FedtapError(f"MiniLM is 384 wide, and --width {width} would be another model: leave it out, or use bert.")
    if victims * 24 * width**2 > MOST:
        raise FedtapError(
            f"{victims} gradients of a model of width {width} fill {victims * 96 * width**2 / 2**30:.0f} GiB: lower "
            "--victims or --width."
        )
    if width % 12:
        raise FedtapError(f"A width of {width} cannot be shared by 12 heads: give a multiple of 12, such as 384.")
    return TextGradients(
        dataset=dataset,
        model=model,
        batch=batch,
        tokens=tokens,
        width=width,
        victims=victims,
        learning_rate=learning_rate,
        defence=written(described(defence)),
        attack=cast(Attack[Tokens], named[0]),
        seed=seed,
        weights_seed=weights_seed,
    )


@dataclass(frozen=True)
class TextGradients(Study):
    """Clients train a language model on a batch of texts each, and the server attacks the gradients."""

    columns: ClassVar[tuple[str, ...]] = (
        "client", "batch", "tokens", "exact_tokens", "exact_texts", "rouge1", "rouge2", "rouge_l", "blind", "stranger",
        "candidates", "rank", "seconds", "error",
    )  # fmt: skip
    legend: ClassVar[str] = (
        "exact: share of tokens, and of whole texts; "
        "rouge: F1; blind: exact tokens of the most common public token at each place; stranger: of what another "
        "client's gradient gave; candidates: tokens left at a place after the first block, mean; rank: of its span"
    )
    threat: ClassVar[str] = (
        "A curious server: it knows the weights and the embeddings that it sent, the vocabulary, and what each client "
        "answers. Labels it is not told, and does not need. Embeddings are frozen, so no gradient of theirs is sent."
    )

    dataset: str = "ag_news"
    model: str = "gpt"
    batch: int = 8
    tokens: int = 16
    width: int = 384
    victims: int = 8
    learning_rate: float = 0.1
    defence: str = "none"
    attack: Attack[Tokens] = field(default_factory=DAGER)
    weights_seed: int = 1234

    @property
    def clients(self) -> int:
        """One for each victim."""
        return self.victims

    def answer(self, order: Message, client: int, data_root: Path) -> Message:
        """Train on this client's texts."""
        side = sides(self, data_root)
        texts, labels = self.private(side.victims, client)
        draw = generator(self.seed, "defence", client)
        return train_on_texts(order, self.network(side), texts, labels, client, self.learning_rate, self.defence, draw)

    def private(self, side: Cut, client: int) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch"]]:
        """The texts that this client holds, and their classes: those of a shuffle, in turns.

        Raises:
            FedtapError: there are not as many.
        """
        if self.victims * self.batch > len(side):
            raise FedtapError(
                f"{self.victims} victims with {self.batch} texts each need {self.victims * self.batch}, and "
                f"{self.dataset} has {len(side)} of {self.tokens} tokens or more: lower --victims, --batch or --tokens."
            )
        order = torch.randperm(len(side), generator=generator(self.seed, "texts"))
        mine = order[client * self.batch : (client + 1) * self.batch]
        return side.ids[mine], side.labels[mine]

    def protocol(self, side: Sides) -> Protocol:
        """The public terms."""
        pieces = len(side.vocabulary)
        sizes = {"gpt": f"(width={self.width})", "bert": f"(vocabulary={pieces}, width={self.width})", "minilm": ""}
        return Protocol(
            model=self.model + sizes[self.model],
            shape=(self.tokens,),
            classes=pieces if self.model == "gpt" else side.classes,
            batch=self.batch,
            learning_rate=self.learning_rate,
            defence=self.defence,
        )

    def network(self, side: Sides) -> LanguageModel:
        """The model with its initial weights."""
        protocol = self.protocol(side)
        return build_language(protocol.model, self.tokens, protocol.classes, self.weights_seed)

    def play(self, grid: Grid, part: int, device: torch.device, data_root: Path) -> Outcome:
        """A round of Flower's FedAvg with a tap on it, and the attack on what was heard."""
        side = sides(self, data_root)
        failed: dict[int, str] = {}
        leak = self.heard(grid, part, side, failed)
        clients = leak.clients.tolist()
        truths = [self.private(side.victims, client)[0] for client in clients]
        common = {
            "model": self.model,
            "batch": self.batch,
            "tokens": self.tokens,
            "filled": self.batch * self.tokens / self.width,
            "defence": self.defence,
        }
        try:
            self.attack.accepts(leak)
        except FedtapError as error:  # it cannot work on such a batch: a result like any other
            unread = failed | {client: str(error) for client in clients}
            return Outcome(rows_of_failed(unread, common))
        began = time.perf_counter()
        guess = self.attack(leak.to(device), seed=self.seed).on_cpu()
        seconds = (time.perf_counter() - began) / len(clients)
        blind = scores.blind_text(side.public.ids)
        rows: list[Row] = rows_of_failed(failed, common)
        for victim, (client, truth) in enumerate(zip(clients, truths, strict=True)):
            score: Row = dict(scores.score_texts(guess.ids[victim], truth))
            del score["matching"]
            if isinstance(guess, Read):
                score |= {"candidates": float(guess.candidates[victim]), "rank": int(guess.rank[victim])}
            score["blind"] = scores.score_texts(blind.expand_as(truth), truth)["exact_tokens"]
            if len(clients) > 1:
                score["stranger"] = scores.score_texts(guess.ids[victim - 1], truth)["exact_tokens"]
            told = {"client": client, "objective": float(guess.objective[victim]), "seconds": seconds, "error": None}
            rows.append(common | score | told)
        page = {"What was written, and what was read": _texts(side.vocabulary, clients, truths, guess.ids)}
        return Outcome(rows, leak if len(leak.packed()) <= KEPT else None, page)

    def heard(self, grid: Grid, part: int, side: Sides, failed: dict[int, str]) -> Leak:
        """The clients' gradients, one stack.

        Args:
            failed: client -> why it sent none, filled in here.

        Raises:
            ClientError: no client sent one.
        """
        net, protocol = self.network(side), self.protocol(side)
        skeleton = build_language(protocol.model, self.tokens, protocol.classes)
        who = call(grid)
        leaks: dict[int, Leak] = {}
        reasons: dict[int, object] = dict.fromkeys(
            range(self.victims), " ".join(who.strangers.values()) or "it did not answer"
        )

        def ear(order: Message, answer: Message) -> None:
            client = who.client(order)
            if answer.has_error():
                reasons[client] = answer.error.reason
                return
            try:
                with reading(client):
                    as_expected(order.content, answer.content, client, skeleton)
                    leaks[client] = hear(order.content, answer.content, protocol, skeleton, client, 1)
            except FedtapError as error:
                reasons[client] = f"FedtapError: {error}"
                raise
            del reasons[client]

        tensors = dict(net.named_parameters()) | float_buffers(net)
        FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1).start(
            Wiretap(grid, ear),
            ArrayRecord({name: tensor.detach() for name, tensor in tensors.items()}),
            num_rounds=1,
            train_config=ConfigRecord({"part": part}),
        )
        without(reasons, failed, len(leaks))
        return stack([leaks[client] for client in sorted(leaks)])

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Exact tokens where the batch fills more and more of the model's width, and under more and more noise."""
        read = [row for row in rows if row.get("exact_tokens") is not None]
        filled = _series("filled", [row for row in read if row["defence"] == "none"])
        alike = [row | {"sigma": _sigma(row["defence"])} for row in read]
        noisy = _series("sigma", [row for row in alike if row["sigma"] is not None])
        charts = {}
        if filled:
            charts["Where it stops"] = curves.share_svg(
                "tokens in the batch for each dimension of the model", filled, limit=1.0
            )
        if noisy:
            charts["Under noise"] = curves.share_svg("standard deviation of the noise on an entry", noisy)
        return charts


def _series(knob: str, rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Model -> (value, exact tokens) of each row; empty where there is but one value."""
    if len({row[knob] for row in rows}) < 2:
        return {}
    return {
        model: [(row[knob], row["exact_tokens"]) for row in rows if row["model"] == model]
        for model in dict.fromkeys(row["model"] for row in rows)
    }


def _sigma(defence: str) -> float | None:
    """Of Gaussian noise and nothing else; 0 where there is no defence."""
    parts = described(defence)
    if not parts:
        return 0.0
    return parts[0]["sigma"] if [part.name for part in parts] == ["noise"] else None


def _texts(
    vocabulary: WordPieces,
    clients: Sequence[int],
    truths: Sequence[Tensor],
    guesses: Int[Tensor, "victims batch tokens"],
) -> str:
    """Some victims' texts beside what was read; wrong tokens are marked."""
    rows = []
    for client, truth, guess in zip(clients, truths[:SHOWN], guesses, strict=False):
        matched = guess[scores.match_texts(guess, truth)]
        for text, found in list(zip(truth.tolist(), matched.tolist(), strict=True))[:SHOWN]:
            pieces = [
                (escape(vocabulary.pieces[token]), token == right) for token, right in zip(found, text, strict=True)
            ]
            marked = " ".join(piece if right else f"<mark>{piece}</mark>" for piece, right in pieces)
            cells = "".join(f"<td class='attack'>{words}</td>" for words in (escape(vocabulary.decode(text)), marked))
            rows.append(f"<tr><td>{client}</td>{cells}</tr>")
    head = "<tr><th>client</th><th>text</th><th>read off its gradient, by tokens</th></tr>"
    return f"<div class='scroll'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


@dataclass(frozen=True, eq=False)
class Sides:
    """What a run needs of its dataset."""

    vocabulary: WordPieces
    classes: int
    public: Cut
    victims: Cut


def sides(study: TextGradients, data_root: Path) -> Sides:
    """The dataset's texts, in the model's vocabulary.

    Raises:
        FedtapError: they cannot be used.
    """
    return _sides(study.dataset, study.model == "minilm", study.tokens, data_root)


@lru_cache(maxsize=4)
def _sides(name: str, pretrained: bool, tokens: int, data_root: Path) -> Sides:
    dataset = open_texts(name, data_root)
    if pretrained:
        vocabulary = WordPieces.read(minilm_folder() / "vocab.txt")
    else:
        vocabulary = WordPieces.learned(dataset.auxiliary.texts, VOCABULARY)
    return Sides(
        vocabulary, dataset.classes, cut(dataset.auxiliary, vocabulary, tokens), cut(dataset.target, vocabulary, tokens)
    )
