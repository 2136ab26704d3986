"""Documents as token numbers: of one length, padded at the end, and cut where they are longer."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import is_file
from fedtap.simulator.models.text_model import PAD

LONGEST_LINE = 1 << 20
"""Letters of a document in a file, at most."""


@runtime_checkable
class Vocabulary(Protocol):
    """What turns texts into tokens and back."""

    def begun(self, text: str, tokens: int) -> list[int]:
        """The first tokens of a text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False, repr=False)
class Documents:
    """A stack of documents, and their classes where they have any."""

    ids: Int[Tensor, "documents tokens"]
    labels: Int[Tensor, "documents"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: Tensor | slice) -> Documents:
        """Some of them."""
        return Documents(self.ids[which], None if self.labels is None else self.labels[which])


def concatenated(stacks: Sequence[Documents]) -> Documents:
    """The documents of all of these stacks."""
    labels = [stack.labels for stack in stacks if stack.labels is not None]
    return Documents(torch.cat([stack.ids for stack in stacks]), torch.cat(labels) if labels else None)


def encoded(texts: Iterable[str], vocabulary: Vocabulary, tokens: int) -> Int[Tensor, "documents tokens"]:
    """The first `tokens` tokens of each text, padded with PAD where there are fewer.

    Texts are read one at a time, and of each only its tokens are kept.

    Raises:
        FedtapError: there are no texts, or none with two tokens.
    """
    rows = []
    for text in texts:
        begun = vocabulary.begun(text, tokens)
        if len(begun) > 1:
            rows.append(torch.tensor(begun + [PAD] * (tokens - len(begun)), dtype=torch.int32))
    if not rows:
        raise FedtapError(
            "The corpus holds no document of two tokens or more, so there is nothing to choose from: give a text with "
            "a document a line."
        )
    return torch.stack(rows).long()


def decoded(vocabulary: Vocabulary, ids: Int[Tensor, "tokens"]) -> str:
    """The text of a document, without its padding."""
    return vocabulary.decode(token for token in ids.tolist() if token != PAD)


def read_documents(path: Path) -> Iterator[str]:
    """The texts of a file, one at a time: a line of a text, the `text` of a line of JSON, or what follows the first
    column of a comma-separated row.

    Raises:
        FedtapError: there is no such file, or it holds no texts.
    """
    if not is_file(path):
        raise FedtapError(f"{short(path, 120)} is no file, so no corpus can be read from it: give a text's path.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines: Iterable[str] = (line for line in iter(lambda: file.readline(LONGEST_LINE), ""))
            if path.suffix == ".csv":
                yield from (_text(" ".join(row[1:] or row)) for row in csv.reader(lines, strict=True) if row)
            elif path.suffix == ".jsonl":
                yield from (_text(json.loads(line)["text"]) for line in lines if line.strip())
            else:
                yield from (_text(line).strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FedtapError(
            f"{short(path, 120)} cannot be read as a corpus ({type(error).__name__}: {short(error, 80)}): give a text "
            "in UTF-8 with a document a line, a .csv of rows, or a .jsonl whose lines have a text."
        ) from error


def _text(said: object) -> str:
    if not isinstance(said, str):
        raise TypeError("a document is a text in quotes")
    if "\0" in said:
        raise ValueError("it holds NUL, which no text does")
    return said


def paragraphs(path: Path, words: int) -> Iterator[str]:
    """A raw text as WikiText has it, cut into documents of so many words; headings, `= … =`, are left out.

    Raises:
        FedtapError: it cannot be read.
    """
    for line in read_documents(path):
        if line.startswith("="):
            continue
        parts = iter(line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").split())
        while len(part := list(islice(parts, words))) == words:
            yield " ".join(part)
