"""Word pieces, datasets of texts, and the scores of texts."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtap.simulator.data.texts import END, START, UNKNOWN, WordPieces, cut, open_texts, read_texts, words
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.scores import blind_text, rouge_l, rouge_n, score_texts

TEXTS = ("The cat sat on the mat.", "A dog's café & bar", "the cat, the dog", "naïve <b>bold</b> 3.14")
PIECES = WordPieces.learned(TEXTS, 400)


def test_frequent_words_are_whole_and_others_are_spelled() -> None:
    assert PIECES.pieces[:3] == (UNKNOWN, START, END)
    small = WordPieces((UNKNOWN, START, END, "the", "t", "##h", "##e", "##o"))
    assert [small.pieces[token] for token in small.encode("The tho tx")] == ["the", "t", "##h", "##o", UNKNOWN]
    assert small.decode(small.encode("the tho")) == "the tho"


def test_where_there_is_room_for_some_words_the_most_frequent_have_it() -> None:
    texts = ["ab ab ab ba ba", "aab"]
    letters = len(WordPieces.learned(["a b"], 99).pieces)
    assert WordPieces.learned(texts, letters + 2).pieces[letters:] == ("ab", "ba")


def test_words_are_berts() -> None:
    assert list(words("Café  isn't $5—北京ok\x00")) == ["cafe", "isn", "'", "t", "$", "5", "—", "北", "京", "ok"]


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("abcdegstTC é.'&<>3\t"), max_size=60))
def test_what_is_decoded_is_encoded_alike(text: str) -> None:
    ids = PIECES.encode(text)
    assert all(0 <= token < len(PIECES) for token in ids)
    if PIECES.pieces.index(UNKNOWN) not in ids:
        assert PIECES.encode(PIECES.decode(ids)) == ids
        assert PIECES.decode(ids) == " ".join(words(text))
    assert PIECES.begun(text, 5) == ids[:5]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=80))
def test_any_text_has_tokens(text: str) -> None:
    assert all(0 <= token < len(PIECES) for token in PIECES.encode(text))


def test_a_vocabulary_without_room_for_letters_or_without_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="has no room for"):
        WordPieces.learned(TEXTS, 20)
    (tmp_path / "vocab.txt").write_text("[UNK]\nthe\n")
    with pytest.raises(FedtapError, match=r"it lacks \[CLS\]"):
        WordPieces.read(tmp_path / "vocab.txt")
    with pytest.raises(FedtapError, match="cannot be read as a vocabulary"):
        WordPieces.read(tmp_path / "absent.txt")


def write(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.text(st.characters(codec="utf-8", exclude_characters="\0\r")))))
def test_rows_come_back_as_they_were_written(rows: list[tuple[int, str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "some.csv")
        write(path, [(str(label), text) for label, text in rows])
        if not rows:
            with pytest.raises(FedtapError, match="holds no texts"):
                read_texts(path)
            return
        side = read_texts(path)
    assert list(zip((side.labels + 1).tolist(), side.texts, strict=True)) == rows


BAD = {
    "no class": (b"a text without a class,and more\n", "Row 1 of .* is not a class"),
    "one column": (b"1,fine\n2\n", "Row 2 of .* is not a class"),
    "class 0": (b"0,text\n", "Row 1 of .* is not a class"),
    "huge class": (b"99999999999999999999,text\n", "Row 1 of .* is not a class"),
    "another alphabet's digit": ("²,text\n".encode(), "Row 1 of .* is not a class"),
    "no text": (b"\n\n", "holds no texts"),
    "not UTF-8": (b"1,caf\xe9\n", "cannot be read as texts"),
    "open quotes": (b'1,"never closed\n', "cannot be read as texts"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_none_are_refused(case: str, tmp_path: Path) -> None:
    content, why = BAD[case]
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(FedtapError, match=why):
        read_texts(tmp_path / "bad.csv")


def test_victims_share_no_text_with_the_public_side(tmp_path: Path) -> None:
    write(tmp_path / "news_train_some.csv", [("1", "one text"), ("2", "another")])
    write(tmp_path / "news_test.csv", [("3", "one", "text"), ("1", "a third")])
    dataset = open_texts("news", tmp_path)
    assert dataset.target.texts == ("a third",)
    assert (dataset.classes, dataset.target.labels.tolist()) == (3, [0])
    for name in ("novels", "../news", ""):
        with pytest.raises(FedtapError, match="There is no"):
            open_texts(name, tmp_path)
    write(tmp_path / "same_train.csv", [("1", "one text")])
    write(tmp_path / "same_test.csv", [("1", "one text")])
    with pytest.raises(FedtapError, match="nothing is private"):
        open_texts("same", tmp_path)


def test_short_texts_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "some.csv", [("1", text) for text in TEXTS])
    side = read_texts(tmp_path / "some.csv")
    kept = cut(side, PIECES, 6)
    assert kept.ids.tolist() == [PIECES.encode(text)[:6] for text in TEXTS if len(PIECES.encode(text)) >= 6]
    with pytest.raises(FedtapError, match="lower --tokens"):
        cut(side, PIECES, 100)


TOKENS = st.lists(st.integers(0, 3), max_size=7)


@settings(max_examples=40, deadline=None)
@given(TOKENS, TOKENS)
def test_the_longest_common_subsequence_is_that_of_the_recursion(one: list[int], other: list[int]) -> None:
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        return max(longest(i + 1, j), longest(i, j + 1), (one[i] == other[j]) + longest(i + 1, j + 1))

    total = len(one) + len(other)
    assert rouge_l(one, other) == (2 * longest(0, 0) / total if total else 0.0)


@settings(max_examples=40, deadline=None)
@given(TOKENS, TOKENS, st.integers(1, 3))
def test_common_runs_are_counted_as_often_as_both_have_them(one: list[int], other: list[int], n: int) -> None:
    runs, left = (
        list(zip(*(one[k:] for k in range(n)), strict=False)),
        list(zip(*(other[k:] for k in range(n)), strict=False)),
    )
    total, common = len(runs) + len(left), 0
    for run in runs:
        if run in left:
            left.remove(run)
            common += 1
    assert rouge_n(one, other, n) == (2 * common / total if total else 0.0)


def test_a_batch_of_texts_has_no_order() -> None:
    truth = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]])
    for order in itertools.permutations(range(3)):
        score = score_texts(truth[list(order)], truth)
        assert (score["exact_tokens"], score["exact_texts"], score["rouge2"], score["rouge_l"]) == (1, 1, 1, 1)
        assert [order[place] for place in score["matching"]] == [0, 1, 2]
    half = score_texts(torch.tensor([[2, 1, 3, 4]]), truth[:1])
    assert (half["exact_tokens"], half["exact_texts"], half["rouge1"]) == (0.5, 0, 1)
    assert half["rouge2"] == pytest.approx(1 / 3)
    assert half["rouge_l"] == pytest.approx(3 / 4)


def test_the_blind_guess_is_the_most_common_token_of_each_place() -> None:
    assert blind_text(torch.tensor([[1, 9], [1, 8], [2, 8]])).tolist() == [1, 8]
