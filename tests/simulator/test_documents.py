"""Documents as tokens: padded, cut, read from files one at a time, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtap.simulator.data.documents import Documents, concatenated, decoded, encoded, paragraphs, read_documents
from fedtap.simulator.data.texts import WordPieces
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.models.text_model import PAD

WORDS = ("the", "cat", "sat", "on", "a", "mat")
PIECES = WordPieces.learned([" ".join(WORDS)], 100)
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), max_size=6)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, tokens=st.integers(2, 8))
def test_padding_stands_behind_and_nothing_is_lost(texts: list[str], tokens: int) -> None:
    kept = [text for text in texts if len(text.split()) > 1]
    if not kept:
        with pytest.raises(FedtapError, match="no document of two tokens or more"):
            encoded(texts, PIECES, tokens)
        return
    ids = encoded(texts, PIECES, tokens)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(kept), tokens)
    assert [decoded(PIECES, row) for row in ids] == [" ".join(text.split()[:tokens]) for text in kept]
    for row, text in zip(ids.tolist(), kept, strict=True):
        real = min(tokens, len(text.split()))
        assert row[real:] == [PAD] * (tokens - real)
        assert PAD not in row[:real]


def test_texts_are_read_one_at_a_time() -> None:
    held: list[str] = []

    def one_by_one() -> Iterator[str]:
        for number in range(5):
            held.append(f"the cat {number}")
            yield held[-1]

    class Watched(WordPieces):
        def begun(self, text: str, tokens: int) -> list[int]:
            assert text == held[-1]
            assert len(held) <= 5
            return super().begun(text, tokens)

    assert len(encoded(one_by_one(), Watched(PIECES.pieces), 3)) == len(held) == 5


@pytest.mark.parametrize("texts", [[], [""], ["cat"], ["cat", "", "mat"]])
def test_an_empty_corpus_is_refused(texts: list[str]) -> None:
    with pytest.raises(FedtapError, match="holds no document of two tokens or more"):
        encoded(texts, PIECES, 4)


def test_a_very_long_document_is_cut() -> None:
    ids = encoded(["the cat " * 100_000], PIECES, 6)
    assert decoded(PIECES, ids[0]) == "the cat the cat the cat"


def test_stacks_are_joined_and_taken_from() -> None:
    one, other = (
        Documents(encoded([text] * 2, PIECES, 3), torch.tensor([n, n])) for n, text in enumerate(["a cat", "the mat"])
    )
    both = concatenated([one, other])
    assert (len(both), both.labels is not None and both.labels.tolist()) == (4, [0, 0, 1, 1])
    assert torch.equal(both[1:3].ids, torch.cat([one.ids[1:], other.ids[:1]]))
    bare = concatenated([Documents(one.ids), Documents(other.ids)])
    assert bare.labels is None
    assert bare[torch.tensor([0])].labels is None


GOOD = {
    "lines.txt": ("first text\n\n  second text \r\nthird", ["first text", "second text", "third"]),
    "rows.csv": ('1,one text,and more\n2,"quoted, too"\nalone\n', ["one text and more", "quoted, too", "alone"]),
    "lines.jsonl": ('{"text": "one\\ntwo"}\n\n{"text": "three", "label": 1}\n', ["one\ntwo", "three"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_files_of_three_forms_are_read(name: str, tmp_path: Path) -> None:
    content, texts = GOOD[name]
    (tmp_path / name).write_text(content, newline="")
    assert list(read_documents(tmp_path / name)) == texts


BAD = {
    "nul.txt": b"fine\nnot\0fine\n",
    "bytes.txt": b"\xff\xfe\x00\x01",
    "latin.txt": b"caf\xe9\n",
    "quote.csv": b'1,"never closed\n',
    "nul.csv": b"1,a\0b\n",
    "bytes.csv": b"\x80,\x81\n",
    "cut.jsonl": b'{"text": "one"}\n{"text": \n',
    "other.jsonl": b'{"body": "one"}\n',
    "list.jsonl": b"[1, 2]\n",
    "number.jsonl": b"7\n",
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "nul.jsonl": b'{"text": "a\\u0000b"}\n',
    "object.jsonl": b'{"text": {"a": 1}}\n',
    "null.jsonl": b'{"text": null}\n',
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(FedtapError, match=r"cannot be read as a corpus .*give a text in UTF-8") as caught:
        list(read_documents(tmp_path / name))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FedtapError, match="is no file, so no corpus can be read from it"):
        list(read_documents(tmp_path / name))


@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=60), suffix=st.sampled_from(["txt", "csv", "jsonl"]))
def test_any_bytes_are_texts_or_refused(content: bytes, suffix: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"some.{suffix}")
        path.write_bytes(content)
        try:
            texts = list(read_documents(path))
        except FedtapError as error:
            assert "cannot be read as a corpus" in str(error)  # noqa: PT017
        else:
            assert not any("\0" in text for text in texts)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1))
def test_json_lines_come_back_as_they_were_written(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "some.jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        assert list(read_documents(path)) == texts


def test_a_line_without_end_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtap.simulator.data.documents.LONGEST_LINE", 8)
    (tmp_path / "long.txt").write_text("the cat sat on\n")
    assert all(len(text) <= 8 for text in read_documents(tmp_path / "long.txt"))


def test_wikitext_is_cut_into_documents(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(" \n = Title = \n \n one two @-@ three @,@ four five six seven \n a b\n")
    assert list(paragraphs(tmp_path / "wiki.txt", 2)) == ["one two-three,four", "five six", "a b"]
    assert list(paragraphs(tmp_path / "wiki.txt", 3)) == ["one two-three,four five"]
