"""The contract of attacks that choose: from a leak of checkpoints and public documents to those like the private ones.

A `Selector` is given a `Corpus` by `fit`, as a `Learner` is given auxiliary pairs, and returns a `Selection`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from fedtap.simulator.attack import Attack, Reconstructed, generator
from fedtap.simulator.data.documents import Vocabulary, decoded, encoded, read_documents
from fedtap.simulator.data.texts import WordPieces
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file, read_tensors, write_atomically
from fedtap.simulator.leaks import CheckpointLeak, Leak
from fedtap.simulator.models.language import LANGUAGE_MODELS, minilm_folder
from fedtap.simulator.models.text_model import TextModel
from fedtap.simulator.progress import progress

_AnySelector = TypeVar("_AnySelector", bound="Selector")

SHARD = 4096
"""Documents after which a pass over the corpus keeps what it has."""

SHOWN = 5
"""Chosen documents that a row quotes."""


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """The attacker's own documents: those that it may choose, and those whose membership it is asked about."""

    ids: Int[Tensor, "documents tokens"]
    """To choose from, padded at the end with PAD."""
    candidates: Int[Tensor, "candidates tokens"]
    """Documents that may be private ones; none is chosen."""
    selected: int
    """How many documents are to be chosen."""
    folder: Path | None = None
    """Where passes over more than one shard keep what is done, so that a run that is killed goes on from there."""
    device: str = "cpu"
    """Where models run."""

    def __len__(self) -> int:
        return len(self.ids)

    def passed(self, name: str, compute: Callable[[Int[Tensor, "some tokens"]], Tensor], batch: int) -> Tensor:
        """What `compute` gives for all documents, some at a time: its rows one below the other, on the CPU.

        Args:
            name: of the pass, by which its shards are found again; it has to name all that `compute` depends on.
            batch: documents that `compute` is given at once.
        """
        done: list[Tensor] = []
        for number, shard in enumerate(progress(torch.split(self.ids, SHARD), "documents")):
            file = None if self.folder is None or len(self) <= SHARD else self._file(name, number, shard)
            if file is not None and is_file(file):
                done.append(read_tensors(file)["values"])
                continue
            with torch.no_grad():
                parts = [compute(some.to(self.device)).cpu() for some in torch.split(shard, batch)]
            done.append(torch.cat(parts))
            if file is not None:
                write_atomically(file, save({"values": done[-1].contiguous()}))
        return torch.cat(done)

    def asked(self, compute: Callable[[Int[Tensor, "some tokens"]], Tensor], batch: int) -> Tensor:
        """What `compute` gives for all candidates."""
        if not len(self.candidates):
            return torch.zeros(0)
        with torch.no_grad():
            parts = [compute(some.to(self.device)).cpu() for some in torch.split(self.candidates, batch)]
        return torch.cat(parts)

    def forget(self) -> None:
        """Remove the shards, of an attack that has ended."""
        for file in sorted(self.folder.glob("pass-*.safetensors")) if self.folder else ():
            file.unlink(missing_ok=True)
        if self.folder:
            with contextlib.suppress(OSError):  # it was never made, or holds something else
                self.folder.rmdir()
                self.folder.parent.rmdir()

    def _file(self, name: str, number: int, shard: Tensor) -> Path:
        assert self.folder is not None
        known = hashlib.blake2b(name.encode() + shard.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
        return self.folder / f"pass-{known}-{number}.safetensors"


@dataclass(frozen=True)
class Selection(Reconstructed):
    """Public documents in the place of a client's, and how likely each candidate is one of its own."""

    chosen: Int[Tensor, "victims selected"]
    """Numbers of documents in the corpus, in the order in which they were chosen."""
    labels: Int[Tensor, "victims selected"]
    """Of a classifier, what the tuned model says they are; 0 otherwise."""
    membership: Float[Tensor, "victims candidates"]
    """Of each candidate, higher where it is likelier a private document; no candidates where nothing is said."""
    objective: Float[Tensor, "victims"]
    texts: tuple[tuple[str, ...], ...] = ()
    """Of each victim, the first documents that were chosen, from a corpus that a person named; empty otherwise."""

    def columns(self, victim: int) -> dict[str, Any]:
        """Columns `selected`, how many documents were chosen, and `chosen`, the first of them."""
        shown = {"chosen": "\n".join(self.texts[victim])} if self.texts else {}
        return {"selected": self.chosen.shape[1], **shown}

    def shapes(self, leak: Leak) -> dict[str, tuple[int, ...]]:
        """Any number of documents and candidates."""
        lead, many = len(leak), self.chosen.shape[1]
        return {
            "chosen": (lead, many),
            "labels": (lead, many),
            "membership": (lead, *self.membership.shape[1:]),
        }


@dataclass(frozen=True)
class Selector(Attack[Selection]):
    """An attack that chooses from a corpus, which `fit` gives it.

    The subclass writes `choose`, for one victim at a time: a checkpoint fills the memory that others share.
    """

    leaks: ClassVar[tuple[type[Leak], ...]] = (CheckpointLeak,)
    reconstructs: ClassVar[type[Reconstructed]] = Selection

    corpus: Corpus | None = field(default=None, kw_only=True, repr=False, compare=False)
    """What it chooses from; None before `fit`."""
    documents: str = field(default="", kw_only=True)
    """PATH of a corpus, a document a line, for a checkpoint that no scenario made; a scenario has its own."""
    many: int = field(default=100, kw_only=True)
    """Documents to choose from `documents`."""

    def __post_init__(self) -> None:
        if type(self.documents) is not str or type(self.many) is not int or self.many < 1:
            raise FedtapError(
                f"{self.name} reads its corpus from a path, documents='corpus.txt', and chooses many documents of it, "
                "a whole number from 1: give these."
            )

    @property
    def needs_auxiliary(self) -> bool:
        """Whether it has no corpus yet."""
        return self.corpus is None and not self.documents

    @property
    def adapts(self) -> bool:
        """False: a corpus is not defended."""
        return False

    def fit(self: _AnySelector, auxiliary: Any, seed: int = 0) -> _AnySelector:
        """This attack with a corpus.

        Raises:
            FedtapError: it has fewer documents than are to be chosen.
        """
        if not isinstance(auxiliary, Corpus):
            raise FedtapError(
                f"{self.name} chooses from a corpus of documents, and this scenario gives pairs: use it in "
                f"select_topic."
            )
        if not 1 <= auxiliary.selected <= len(auxiliary):
            raise FedtapError(
                f"The corpus has {len(auxiliary):,} documents and {auxiliary.selected:,} are to be chosen: lower "
                "--selected, or give a larger corpus."
            )
        return dataclasses.replace(self, corpus=auxiliary)

    def accepts(self, leak: Leak) -> None:
        """Models of texts."""
        super().accepts(leak)
        if not isinstance(leak.network, TextModel):
            raise FedtapError(
                f"{self.name} reads documents by the leak's own model, and {short(leak.protocol.model)!r} is fed none: "
                "attack a checkpoint of a language model, or of a classifier of texts."
            )

    def begin(self, leak: Leak, seed: int) -> Int[Tensor, "victims"]:
        """A seed for each victim."""
        names = zip(leak.clients.tolist(), leak.rounds.tolist(), strict=True)
        return torch.tensor([generator(seed, *name).initial_seed() for name in names])

    def reconstruct(self, leak: Leak, start: Tensor) -> Selection:
        assert isinstance(leak, CheckpointLeak)
        if self.needs_auxiliary:
            raise self.untrained()
        corpus = self._read(leak) if self.corpus is None else self.corpus
        try:
            each = list(self._each(leak, corpus, start))
        except FedtapError:
            corpus.forget()
            raise
        corpus.forget()
        return Selection(
            chosen=torch.stack([one.chosen for one in each]),
            labels=torch.stack([one.labels for one in each]),
            membership=torch.stack([one.membership for one in each]),
            objective=torch.tensor([one.objective for one in each]),
            texts=() if self.corpus is not None else tuple(tuple(_texts(leak, corpus, one.chosen)) for one in each),
        )

    def untrained(self) -> FedtapError:
        """It needs a corpus."""
        return FedtapError(
            f"{self.name} chooses from a corpus of documents, and has none: name a text with a document a line, "
            f"--attack \"{self.name}(documents='corpus.txt')\", or run it in a scenario such as select_topic."
        )

    def _read(self, leak: CheckpointLeak) -> Corpus:
        """The corpus that `documents` names, in the tokens of the leak's model."""
        tokens = leak.protocol.shape[0]
        ids = encoded(read_documents(Path(self.documents)), vocabulary_of(leak.protocol.model), tokens)
        return Corpus(ids, ids[:0], min(self.many, len(ids)), device=str(leak.device))

    def _each(self, leak: CheckpointLeak, corpus: Corpus, start: Tensor) -> Iterator[Chosen]:
        for victim in range(len(leak)):
            yield self.choose(leak[victim], corpus, int(start[victim]))

    def pass_named(self, leak: CheckpointLeak, what: str) -> str:
        """The name of a pass for the one victim of this leak: of what is computed, by whom, and from which tensors."""
        moved = [float(tensor.double().sum()) for tensor in leak.observed.values()]
        return f"{self.written()} {what} {leak.protocol} {leak.clients.tolist()} {leak.rounds.tolist()} {moved}"

    @abstractmethod
    def choose(self, leak: CheckpointLeak, corpus: Corpus, seed: int) -> Chosen:
        """For the one victim of this leak."""


def vocabulary_of(model: str) -> Vocabulary:
    """What the model of a leak cuts texts by.

    Raises:
        FedtapError: it is not known.
    """
    base = model.partition("(")[0]
    if base == "minilm":
        return WordPieces.read(minilm_folder() / "vocab.txt")
    if base in LANGUAGE_MODELS:
        raise FedtapError(
            f"A leak of {short(model)} lacks the vocabulary, which its federation learned from public texts, so no "
            "other text can be cut into its tokens: run the attack in the scenario."
        )
    from fedtap.simulator.models.pretrained import tokenizer

    return tokenizer(model)


def _texts(leak: CheckpointLeak, corpus: Corpus, chosen: Int[Tensor, "selected"]) -> Iterator[str]:
    vocabulary = vocabulary_of(leak.protocol.model)
    for number in chosen[:SHOWN].tolist():
        yield decoded(vocabulary, corpus.ids[number])


@dataclass(frozen=True)
class Chosen:
    """What a selector says of one victim; as in `Selection`, without the victims axis."""

    chosen: Int[Tensor, "selected"]
    labels: Int[Tensor, "selected"]
    membership: Float[Tensor, "candidates"]
    objective: float
