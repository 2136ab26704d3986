"""What scenarios about fine-tuned models of texts share: clients that fine-tune, and attacks that choose documents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fedtap.scenarios.attack_options import Attacked
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.options import Option, WeightsSeed
from fedtap.simulator.report.columns import Column, Group
from fedtap.simulator.scenario import KEPT, Observed, Row, Scored, Session, Trial

if TYPE_CHECKING:
    from flwr.app import Context, Message

    from fedtap.scenarios.checkpoints.tasks import Task
    from fedtap.simulator.attack import Attack
    from fedtap.simulator.corpus import Corpus
    from fedtap.simulator.leaks import Leak
    from fedtap.simulator.models.adapters import Lora
    from fedtap.simulator.models.fine_tuning import FineTuning
    from fedtap.simulator.models.text_model import TextModel
    from fedtap.simulator.report.page import Page


@dataclass(frozen=True)
class Selecting(Attacked):
    """Clients fine-tune what the server broadcasts, and it chooses public documents by what comes back.

    Raises:
        FedtapError: an attack that chooses nothing, a defence of something else than updates, or counts that do not
            fit each other.
    """

    reconstructs: ClassVar[str] = "Selection"
    refusal_is_result: ClassVar[bool] = True
    doubted: ClassVar[bool] = False
    columns: ClassVar[tuple[Column, ...]] = (
        Column("client", over="rows"),
        Column("round", over="rows"),
        Column("selected", "documents that were chosen", over="same"),
        Column("precision", "share of the chosen documents that are of the client's domain", form=".2f"),
        Column("chance", "share of the corpus that is", form=".2f", page=True),
        Column("perplexity", "after retraining on them, on held-out documents of the domain", form=".2f"),
        Column("perplexity_random", "as many at random", form=".2f", page=True),
        Column("perplexity_expert", "the private documents themselves", form=".2f", page=True),
        Column("accuracy", "after retraining on them, on held-out documents of the domain", form=".3f"),
        Column("accuracy_random", "as many at random", form=".3f", page=True),
        Column("accuracy_expert", "the private documents themselves", form=".3f", page=True),
        Column("recovered_fraction", "of the way from random documents to the private ones", form=".2f"),
        Column("membership_auc", "private documents against others of the domain; 0.5 is chance", form=".2f"),
        Column("tpr_at_1", "private documents found where 1 % of the others are called private", form=".3f"),
        Column(
            "wasserstein",
            "between mean features, in the broadcast model, of chosen and private documents",
            form=".3f",
            page=True,
        ),
        Column("wasserstein_random", "of as many at random", form=".3f", page=True),
        Column("sent_perplexity", "of the model that came back", form=".2f", page=True),
        Column("sent_accuracy", "of the model that came back", form=".3f", page=True),
        Column("epsilon", "of all rounds, for a client", form=".3g", page=True),
        Column("error", over="same"),
        *(Column(name, over="hidden") for name in ("objective", "chosen", "private", "random")),
    )

    model: Annotated[
        str,
        Option("decoder(width=64), smollm2, or a Hugging Face folder", group="model", file=True, single=True),
    ] = "decoder(width=64, layers=2, heads=4)"
    weights_seed: WeightsSeed = 0
    tokens: Annotated[int, Option("tokens to which documents are cut", 8, 1024, "data")] = 24
    documents: Annotated[int, Option("private documents of a client", 4, 10**6, "data")] = 500
    corpus: Annotated[int, Option("public documents to choose from", 8, 10**7, "data")] = 8000
    candidates: Annotated[
        int, Option("private documents, and as many others, whose membership is asked", 0, 10**6, "data")
    ] = 200
    victims: Annotated[int, Option("clients, or sums of clients, that are attacked", 1, 1000, "federation")] = 1
    averaged: Annotated[
        int, Option("clients whose checkpoints are averaged before the server sees them", 1, 1000, "federation")
    ] = 1
    rounds: Annotated[
        int, Option("rounds of the federation, each observed; give several --victims", 1, 1000, "federation")
    ] = 1
    epochs: Annotated[int, Option("local epochs", 1, 1000, "federation")] = 4
    batch: Annotated[int, Option("documents in a local step", 1, 4096, "federation")] = 16
    optimiser: Annotated[Literal["sgd", "adamw"], Option("of the clients", group="federation")] = "adamw"
    learning_rate: Annotated[float, Option("of the clients' optimiser", 1e-8, 1e3, "federation")] = 1e-3
    adapter: Annotated[
        str,
        Option(
            "none, or what is trained and sent in place of all weights: lora(rank=8, alpha=16)",
            group="model",
            single=True,
        ),
    ] = "none"
    defence: Annotated[
        str, Option("none, or what clients do to the change of their weights: clip(1.0)+noise(0.01)", group="defence")
    ] = "none"
    selected: Annotated[int, Option("documents to choose", 1, 10**6, "attack")] = 500
    retraining_epochs: Annotated[
        int, Option("epochs of retraining on what was chosen, or on as many random ones; 0: as clients", 0, 1000)
    ] = 0
    retrainings: Annotated[int, Option("seeds of retraining on what was chosen; 0: none is retrained", 0, 100)] = 1

    def __post_init__(self) -> None:
        from fedtap.clients.texts import check_defence
        from fedtap.simulator.defences.notation import described, written

        for attack in self.attacks:
            if attack.reconstructs.__name__ != self.reconstructs:
                raise FedtapError(
                    f"{attack.name} chooses no documents, and this scenario asks for attacks that do: write select."
                )
            if getattr(attack, "documents", ""):
                raise FedtapError(
                    f"This scenario has a corpus of its own, of which the domains are known, and {attack.name} names "
                    "another: leave out its documents."
                )
        check_defence(self.defence)
        if self.selected > self.corpus:
            raise FedtapError(
                f"{self.selected:,} documents cannot be chosen from a corpus of {self.corpus:,}: lower --selected, or "
                "raise --corpus."
            )
        if self.candidates > self.documents:
            raise FedtapError(
                f"A client has {self.documents:,} private documents, so the membership of {self.candidates:,} cannot "
                "be asked: lower --candidates."
            )
        self.lora  # noqa: B018 (it refuses what is no adapter)
        object.__setattr__(self, "defence", written(described(self.defence)))  # one spelling, for all who read it

    @cached_property
    def lora(self) -> Lora | None:
        """The adapter that clients train; None where they train all weights."""
        if self.adapter == "none":
            return None
        from fedtap.simulator.models.adapters import Lora

        return Lora.parse(self.adapter)

    @property
    def nodes(self) -> int:
        """The clients of all sums."""
        return self.victims * self.averaged

    @property
    def tuning(self) -> FineTuning:
        """How clients fine-tune."""
        from fedtap.simulator.models.fine_tuning import FineTuning

        return FineTuning(self.epochs, self.batch, self.optimiser, self.learning_rate)

    @property
    def retraining(self) -> FineTuning:
        """How a model is trained on what was chosen."""
        return replace(self.tuning, epochs=self.retraining_epochs or self.epochs)

    @property
    def varied(self) -> list[str]:
        """The options that are swept, but for those by which a run repeats itself."""
        return [name for name, _ in self.swept if name not in ("attack", "seed")]

    def behind(self, victim: int) -> range:
        """The clients of a sum."""
        return range(victim * self.averaged, (victim + 1) * self.averaged)

    @abstractmethod
    def task(self, data_root: Path) -> Task:
        """Documents and model.

        Raises:
            FedtapError: there are not as many, or a file or a package is missing.
        """

    def reply(self, message: Message, context: Context, data_root: Path) -> Message:
        """The checkpoint after fine-tuning on this client's documents."""
        from fedtap.clients.finetuning import adapter_reply, checkpoint_reply
        from fedtap.simulator.attack import generator

        task, client = self.task(data_root), int(context.node_config["partition-id"])
        number = int(message.content.config_records["round"]["number"])  # type: ignore[arg-type]
        draw = generator(self.seed, "fine-tuning", client, number)
        net, private, many = task.network(0), task.private[client], len(task.private[client])

        def tune(net: TextModel) -> None:
            self.tuning(net, private.ids, private.labels, draw)

        if self.lora is not None:
            seed = self.seed + number
            return adapter_reply(message, net, self.lora, tune, many, client, self.defence, draw, seed)
        return checkpoint_reply(message, net, tune, many, client, self.defence, draw)

    def observe(self, session: Session) -> Observed:
        """Rounds of fine-tuning; the federation goes on without a client that fails."""
        from fedtap.scenarios.checkpoints.fine_tuned import checkpoints, terms_of
        from fedtap.scenarios.checkpoints.selection_scoring import TunedObserved

        leak, missing = checkpoints(session, self, terms_of(self, self.task(session.data_root)))
        return TunedObserved(leak, missing, keep=sum(t.numel() for t in leak.observed.values()) * 4 <= KEPT)

    def auxiliary_pairs(self, session: Session, observed: Any) -> Corpus:  # type: ignore[override]
        """The corpus, and the candidates of all victims, one after the other."""
        from fedtap.scenarios.checkpoints.fine_tuned import candidates
        from fedtap.simulator.corpus import Corpus

        task = self.task(session.data_root)
        asked = candidates(self, task)
        return Corpus(
            ids=task.corpus.ids,
            candidates=asked,
            selected=self.selected,
            folder=session.out / "auxiliary" / f"part_{session.number}",
            device=str(session.device),
        )

    def settled(self, attack: Attack[Any], label: str, observed: Any) -> Row:
        """What is compared."""
        return {
            "attack": label,
            "averaged": self.averaged,
            "adapter": self.adapter,
            "defence": self.defence,
            "selected": self.selected,
        }

    def score(self, trial: Trial) -> Scored:
        """What the chosen documents are worth, beside random and private ones; and whether candidates were told
        apart."""
        from fedtap.scenarios.checkpoints.selection_scoring import scored

        return scored(self, self.task(trial.session.data_root), trial)

    def threat(self, leak: Leak | None) -> Sequence[str]:
        """A curious server, or one behind secure aggregation."""
        seen = "the checkpoint that each client sends"
        if self.averaged > 1:
            seen = f"the mean of the checkpoints of {self.averaged} clients, which are masked one by one"
        return (
            f"A curious server: it knows the weights that it sent, and {seen}. It has public documents, some of the "
            "clients' domains among them, and none of the clients' own but among the candidates. It is not told the "
            "domain.",
        )

    def shown_on(self, page: Page, rows: Sequence[Row]) -> tuple[Page, Group]:
        """With an answer: whether the domain was found, the documents, or neither."""
        from fedtap.scenarios.checkpoints.selection_report import sentences

        page, shown = super().shown_on(page, rows)
        return replace(page, answers=sentences(shown, self.varied)), shown

    def charts(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """The documents that were chosen, and what becomes of scores with what is swept."""
        from fedtap.scenarios.checkpoints.selection_report import charts

        return charts(rows, self.varied)
