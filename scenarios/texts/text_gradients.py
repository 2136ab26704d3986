"""Can a server read a text, word for word, off the gradient of one projection?

Expect: from a small GPT every token of every text, in batches of 1, 8 and 32, though no embedding is trained. It stops
where the batch has as many tokens as the model is wide: the gradient then spans everything, and every word seems to be
in it. Noise stops it where it drowns the smallest of the gradient's directions. An encoder gives away which tokens are
in the batch as easily, but which of them make a text is a search that grows with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fedtap.scenarios.attack_options import Attacked
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Option, WeightsSeed
from fedtap.simulator.report.columns import Column
from fedtap.simulator.scenario import KEPT, Observed, Row, Scored, Session, Trial

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from torch import Tensor

    from fedtap.scenarios.texts.federation import FederatedTexts
    from fedtap.simulator.attack import Attack
    from fedtap.simulator.leaks import Leak

_MOST = 2**30
"""Entries of all victims' gradients, at most; a block has 12 for each entry of width times width."""


@dataclass(frozen=True)
class TextGradients(Attacked):
    """Clients train a language model on a batch of texts each, for one round of FedSGD, and the server attacks it.

    Raises:
        FedtapError: an attack that brings back no tokens, a defence of something else than updates, or a model of a
            size that there is not or that fills gigabytes.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("client", over="rows"),
        Column("exact_tokens", "share that is right", form=".3g"),
        Column("exact_texts", "share of texts that are right as a whole", form=".3g"),
        *(Column(name, words, form=".3g") for name, words in (("rouge1", "F1"), ("rouge2", "F1"), ("rouge_l", "F1"))),
        Column("blind", "exact tokens of the most common public token at each place", form=".3g"),
        Column("negative_control", "exact tokens of what another client's gradient gave", form=".3g"),
        Column("candidates", "tokens left at a place after the first block, mean"),
        Column("rank", "of the gradient's span"),
        Column("seconds", "for each victim"),
        Column("error", over="same"),
        *(Column(name, over="hidden") for name in ("filled", "objective")),
    )

    reconstructs: ClassVar[str] = "Tokens"
    refusal_is_result: ClassVar[bool] = True

    dataset: Annotated[str, Option("NAME of the data root's NAME_train*.csv and NAME_test*.csv", group="data")] = (
        "ag_news"
    )
    tokens: Annotated[int, Option("tokens to which each text is cut", 1, 510, "data")] = 16
    model: Annotated[Literal["gpt", "bert", "minilm"], Option("gpt, bert, or minilm", group="model")] = "gpt"
    width: Annotated[int, Option("numbers in a token's vector; 384 in minilm", 12, 4096, "model")] = 384
    weights_seed: WeightsSeed = 1234
    batch: Annotated[int, Option("private texts in the local step", 1, 4096, "federation")] = 8
    victims: Annotated[int, Option("clients, all of which are attacked", 1, 1000, "federation")] = 8
    learning_rate: Annotated[float, Option("learning rate of the clients' SGD", 1e-6, 1e3, "federation")] = 0.1
    defence: Annotated[
        str, Option("none, or what clients do to what they send: clip(1.0)+noise(0.01)", group="defence")
    ] = "none"
    attack: str = "dager"

    def __post_init__(self) -> None:
        from fedtap.clients.texts import check_defence
        from fedtap.simulator.defences.notation import described, written

        check_defence(self.defence)
        if len(self.attacks) != 1 or self.attacks[0].reconstructs.__name__ != self.reconstructs:
            raise FedtapError(
                f"This scenario asks for one attack that brings back tokens, and {self.named} is none: use dager."
            )
        if self.model == "minilm" and self.width != 384:
            raise FedtapError(
                f"MiniLM is 384 wide, and --width {self.width} would be another model: leave it out, or use bert."
            )
        if self.victims * 24 * self.width**2 > _MOST:
            raise FedtapError(
                f"{self.victims} gradients of a model of width {self.width} fill "
                f"{self.victims * 96 * self.width**2 / 2**30:.0f} GiB: lower --victims or --width."
            )
        if self.width % 12:
            raise FedtapError(
                f"A width of {self.width} cannot be shared by 12 heads: give a multiple of 12, such as 384."
            )
        object.__setattr__(self, "defence", written(described(self.defence)))  # one spelling, for all who read it

    @property
    def nodes(self) -> int:
        """One for each victim."""
        return self.victims

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """Weights after a step on this client's texts."""
        from fedtap.clients.texts import train_on_texts
        from fedtap.scenarios.texts.federation import corpus_of, network_of, private
        from fedtap.simulator.attack import generator

        client, corpus = int(context.node_config["partition-id"]), corpus_of(self, data_root)
        texts, labels = private(self, corpus, client)
        draw, net = generator(self.seed, "defence", client), network_of(self, corpus)
        return train_on_texts(message, net, texts, labels, client, self.learning_rate, self.defence, draw)

    def observe(self, session: Session) -> Observed:
        """A round of Flower's FedAvg with a tap on it."""
        from fedtap.scenarios.texts.federation import corpus_of, play_texts
        from fedtap.simulator.wire.messages import check_nodes

        check_nodes(session.grid, self.nodes, self.name)
        leak, failed = play_texts(self, session.grid, session.number, corpus_of(self, session.data_root))
        missing = {(client, 1): why for client, why in sorted(failed.items())}
        return Observed(leak, missing, keep=len(leak.packed()) <= KEPT)

    def truth(self, corpus: FederatedTexts, leak: Leak) -> list[Tensor]:
        """The texts of a leak's victims, for the scores: `batch tokens` each."""
        from fedtap.scenarios.texts.federation import private

        return [private(self, corpus, client)[0] for client in leak.clients.tolist()]

    def settled(self, attack: Attack[Any], label: str, observed: Observed) -> Row:
        """The model and the batch."""
        return super().settled(attack, label, observed) | {
            "model": self.model,
            "batch": self.batch,
            "tokens": self.tokens,
            "filled": self.batch * self.tokens / self.width,
            "defence": self.defence,
        }

    def score(self, trial: Trial) -> Scored:
        """Tokens and texts that are right, beside those of a blind guess and of another client's texts."""
        from fedtap.attackers.texts.dager import Read
        from fedtap.scenarios.texts import text_report
        from fedtap.scenarios.texts.federation import corpus_of
        from fedtap.simulator import scores

        found, clients = trial.reconstruction, trial.leak.clients.tolist()
        corpus = corpus_of(self, trial.session.data_root)
        truths, blind = self.truth(corpus, trial.leak), scores.blind_text(corpus.public.ids)
        rows: list[Row] = []
        for victim, (client, truth) in enumerate(zip(clients, truths, strict=True)):
            score: Row = dict(scores.score_texts(found.ids[victim], truth))
            del score["matching"]
            if isinstance(found, Read):
                score |= {"candidates": float(found.candidates[victim]), "rank": int(found.rank[victim])}
            score["blind"] = scores.score_texts(blind.expand_as(truth), truth)["exact_tokens"]
            if len(clients) > 1:
                score["negative_control"] = scores.score_texts(found.ids[victim - 1], truth)["exact_tokens"]
            rows.append(score | {"client": client, "objective": float(found.objective[victim]), "error": None})
        table = text_report.text_table(corpus.vocabulary, clients, truths, found.ids)
        return Scored(rows, sections={"What was written, and what was read": table})

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """A curious server."""
        return (
            "A curious server: it knows the weights and the embeddings that it sent, the vocabulary, and what each "
            "client replies. Labels are not known to it, and it does not need them. Embeddings are frozen, so no "
            "gradient of theirs is sent.",
        )

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Exact tokens against the batch's share of the model's width, and under noise."""
        from fedtap.scenarios.texts import text_report

        return text_report.text_charts(rows)
