"""Texts: a vocabulary of word pieces, and datasets of two sides that share no text, from comma-separated files.

The auxiliary data are the attacker's, and the vocabulary is built from them; the target data are what is attacked.
"""

from __future__ import annotations

import csv
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import StringIO
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.files import read_bytes

UNKNOWN, START, END = "[UNK]", "[CLS]", "[SEP]"
CONTINUED = "##"
"""Prefix of a piece that does not begin a word."""

LARGEST_TEXT_FILE = 1 << 28
"""Bytes of a file of texts."""

LONGEST_WORD = 100
"""Letters of a word beyond which it is unknown, as in BERT."""


@dataclass(frozen=True, repr=False)
class WordPieces:
    """A vocabulary: words are cut into the longest pieces that it has, from their start (as BERT does)."""

    pieces: tuple[str, ...]

    def __repr__(self) -> str:
        return f"WordPieces({len(self)})"

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {piece: number for number, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text, without marks."""
        return list(self._tokens(text))

    def begun(self, text: str, tokens: int) -> list[int]:
        """The first `tokens` of them."""
        return list(islice(self._tokens(text), tokens))

    def decode(self, ids: Iterable[int]) -> str:
        """The words, with a blank before each; lower case, as they were encoded."""
        joined = " ".join(self.pieces[number] for number in ids)
        return joined.replace(f" {CONTINUED}", "").removeprefix(CONTINUED)

    def _tokens(self, text: str) -> Iterator[int]:
        for word in words(text):
            yield from self._cut(word)

    def _cut(self, word: str) -> list[int]:
        found, at = [], 0
        while at < len(word) <= LONGEST_WORD:
            before = CONTINUED if at else ""
            ends = range(len(word), at, -1)
            end = next((end for end in ends if before + word[at:end] in self._numbers), None)
            if end is None:
                break
            found.append(self._numbers[before + word[at:end]])
            at = end
        return found if at == len(word) else [self._numbers[UNKNOWN]]

    @staticmethod
    def read(path: Path) -> WordPieces:
        """A BERT's `vocab.txt`: a piece a line.

        Raises:
            FedtapError: it cannot be read, or lacks the marks.
        """
        try:
            text = read_bytes(path, LARGEST_TEXT_FILE).decode("utf-8").replace("\r\n", "\n")
        except (FedtapError, UnicodeDecodeError) as error:
            raise FedtapError(
                f"{short(path, 100)} cannot be read as a vocabulary ({short(error)}): give a text with a piece a line."
            ) from error
        pieces = tuple(text.removesuffix("\n").split("\n"))
        if missing := {UNKNOWN, START, END} - set(pieces):
            raise FedtapError(
                f"{short(path, 100)} is no vocabulary of word pieces, since it lacks {min(missing)}: give a BERT's."
            )
        return WordPieces(pieces)

    @staticmethod
    def learned(texts: Iterable[str], most: int) -> WordPieces:
        """The texts' letters, and their most frequent words, `most` pieces at the most.

        Raises:
            FedtapError: there is no room for the letters.
        """
        counts = Counter(word for text in texts for word in words(text))
        letters = sorted({letter for word in counts for letter in word})
        pieces = [UNKNOWN, START, END, *letters, *(CONTINUED + letter for letter in letters)]
        if len(pieces) > most:
            raise FedtapError(
                f"The auxiliary texts have {len(letters)} different letters, and a vocabulary of {most} has no room "
                f"for them as words and within words: ask for {len(pieces)} at least."
            )
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        return WordPieces(tuple(islice(dict.fromkeys([*pieces, *frequent]), most)))


def words(text: str) -> Iterator[str]:
    """What stands between blanks, in lower case and without accents; a punctuation mark is a word of its own."""
    word = ""
    for letter in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(letter)
        if kind == "Mn" or (kind[0] == "C" and letter not in "\t\n\r"):
            continue
        apart = _punctuation(letter, kind)
        if apart or letter.isspace():
            if word:
                yield word
            word = ""
            if apart:
                yield letter
        else:
            word += letter
    if word:
        yield word


def _punctuation(letter: str, kind: str) -> bool:
    """Unicode's punctuation, ASCII's symbols, and each Chinese character, as BERT has it."""
    return kind[0] == "P" or (letter.isascii() and kind[0] == "S") or "\u4e00" <= letter <= "\u9fff"


@dataclass(frozen=True, repr=False, eq=False)
class TextSide:
    """Texts and their classes."""

    texts: tuple[str, ...]
    labels: Int64[Tensor, " texts"]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, repr=False, eq=False)
class TextDataset:
    """A dataset of two sides."""

    name: str
    classes: int
    auxiliary: TextSide
    target: TextSide

    def __repr__(self) -> str:
        sides = f"{len(self.auxiliary)} auxiliary, {len(self.target)} target"
        return f"TextDataset({self.name!r}, classes={self.classes}, {sides})"


@dataclass(frozen=True, repr=False, eq=False)
class Cut:
    """The first tokens of those of a side's texts that have as many."""

    ids: Int64[Tensor, "texts tokens"]
    labels: Int64[Tensor, " texts"]

    def __len__(self) -> int:
        return len(self.ids)


def cut(side: TextSide, vocabulary: WordPieces, tokens: int) -> Cut:
    """The side's texts, cut to `tokens` tokens; shorter ones are left out.

    Raises:
        FedtapError: all are shorter.
    """
    begun = [vocabulary.begun(text, tokens) for text in side.texts]
    kept = [number for number, ids in enumerate(begun) if len(ids) == tokens]
    if not kept:
        raise FedtapError(f"No text of {len(side)} has {tokens} tokens, to which all are cut: lower --tokens.")
    return Cut(torch.tensor([begun[number] for number in kept]), side.labels[kept])


SIDE_FILES = {"auxiliary": "train", "target": "test"}
"""Side -> what the name of its file has in it."""


@lru_cache(maxsize=2)
def open_texts(name: str, data_root: Path) -> TextDataset:
    """The texts NAME_train*.csv and NAME_test*.csv in the data root; a row is a class, from 1, and pieces of a text.

    Raises:
        FedtapError: a file is missing or cannot be used, or both sides share a text.
    """
    sides = {}
    for side, part in SIDE_FILES.items():
        found = sorted(data_root.glob(f"{name}_{part}*.csv")) if name.replace("_", "").isalnum() else []
        if not found:
            raise FedtapError(
                f"There is no {name}_{part}*.csv in {data_root}, where the {side} texts come from: put it there, "
                "or name the folder that has it, --data-root."
            )
        sides[side] = read_texts(found[0])
    seen = set(sides["auxiliary"].texts)
    fresh = [number for number, text in enumerate(sides["target"].texts) if text not in seen]
    if not fresh:
        raise FedtapError(
            f"All target texts of {name} are auxiliary data too, so nothing is private: give other files."
        )
    target = TextSide(tuple(sides["target"].texts[number] for number in fresh), sides["target"].labels[fresh])
    classes = 1 + int(max(side.labels.max() for side in sides.values()))
    return TextDataset(name, classes, sides["auxiliary"], target)


def read_texts(path: Path) -> TextSide:
    """The rows of a comma-separated file: a class, from 1, and one or more pieces of a text.

    Raises:
        FedtapError: it cannot be read, or a row is none.
    """
    try:
        lines = StringIO(read_bytes(path, LARGEST_TEXT_FILE).decode("utf-8"), newline="")
        rows: Sequence[list[str]] = [row for row in csv.reader(lines, strict=True) if row]
    except (FedtapError, UnicodeDecodeError, csv.Error) as error:
        raise FedtapError(
            f"{short(path, 100)} cannot be read as texts ({short(error)}): give a comma-separated file in UTF-8."
        ) from error
    if not rows:
        raise FedtapError(f"{short(path, 100)} holds no texts: give a file of rows, each a class from 1 and a text.")
    for number, row in enumerate(rows, 1):
        if not (len(row) > 1 and row[0].isascii() and row[0].isdigit() and 1 <= int(row[0][:9]) < 1000):
            raise FedtapError(
                f"Row {number} of {short(path, 100)} is not a class and a text, but {short(','.join(row), 40)!r}: "
                "begin each row with a whole number from 1."
            )
    return TextSide(tuple(" ".join(row[1:]) for row in rows), torch.tensor([int(row[0]) - 1 for row in rows]))
