"""Passes over a corpus: kept in shards, resumed, and the same however many documents go at once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtap.attackers import parse
from fedtap.simulator import corpus as corpus_module
from fedtap.simulator.attack import Attack
from fedtap.simulator.corpus import Corpus, Selection
from fedtap.simulator.errors import FedtapError
from tests.support import checkpoint_leaks
from tests.support.checkpoint_leaks import leak_on, on_topic


def numbered(many: int, folder: Path | None = None) -> Corpus:
    ids = torch.arange(2 * many).view(many, 2)
    return Corpus(ids, ids[:3] + 1000, 1, folder)


def counting(seen: list[int]) -> Callable[[Tensor], Tensor]:
    def compute(ids: Tensor) -> Tensor:
        seen.extend(ids[:, 0].tolist())
        return ids.float() ** 2

    return compute


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SHARD", 4)


def test_a_finished_pass_is_not_computed_again(tmp_path: Path) -> None:
    seen: list[int] = []
    found = numbered(10, tmp_path).passed("squares", counting(seen), 3)
    assert torch.equal(found, numbered(10).ids.float() ** 2)
    assert len(seen) == 10
    assert len(list(tmp_path.iterdir())) == 3
    assert torch.equal(numbered(10, tmp_path).passed("squares", counting(seen), 2), found)
    assert len(seen) == 10


def test_a_pass_that_was_stopped_goes_on_at_its_shard(tmp_path: Path) -> None:
    seen: list[int] = []

    def stops(ids: Tensor) -> Tensor:
        if len(seen) == 8:
            raise KeyboardInterrupt
        return counting(seen)(ids)

    with pytest.raises(KeyboardInterrupt):
        numbered(10, tmp_path).passed("squares", stops, 2)
    assert len(list(tmp_path.iterdir())) == 2
    found = numbered(10, tmp_path).passed("squares", counting(seen), 2)
    assert seen == list(range(0, 20, 2))
    assert torch.equal(found, numbered(10).ids.float() ** 2)


def test_shards_of_another_pass_are_not_taken(tmp_path: Path) -> None:
    seen: list[int] = []
    numbered(10, tmp_path).passed("squares", counting(seen), 4)
    assert float(numbered(10, tmp_path).passed("zeros", lambda ids: 0.0 * ids, 4).abs().max()) == 0
    other = Corpus(numbered(10).ids + 7, numbered(10).ids[:0], 1, tmp_path)
    assert torch.equal(other.passed("squares", counting(seen), 4), other.ids.float() ** 2)
    assert len(seen) == 20


def test_forgetting_removes_shards_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    held = numbered(10, tmp_path)
    held.passed("squares", counting([]), 4)
    held.forget()
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    numbered(10, tmp_path / "absent").forget()
    numbered(10).forget()


@pytest.mark.parametrize("many", [1, 4])
def test_a_single_shard_leaves_no_file(many: int, tmp_path: Path) -> None:
    numbered(many, tmp_path / "folder").passed("squares", counting([]), 3)
    assert not (tmp_path / "folder").exists()


@settings(max_examples=40, deadline=None)
@given(many=st.integers(1, 14), batch=st.integers(1, 20), kept=st.booleans())
def test_documents_at_once_do_not_matter(many: int, batch: int, kept: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        held = numbered(many, Path(folder) if kept else None)
        assert torch.equal(held.passed("squares", counting([]), batch), held.ids.float() ** 2)
        assert torch.equal(held.asked(lambda ids: ids[:, 0].float(), batch), held.candidates[:, 0].float())


def test_where_nothing_is_asked_nothing_is_said() -> None:
    ids = numbered(5).ids
    assert Corpus(ids, ids[:0], 2).asked(lambda ids: ids[:, 0].float(), 2).tolist() == []


def test_a_damaged_shard_is_one_sentence(tmp_path: Path) -> None:
    numbered(10, tmp_path).passed("squares", counting([]), 4)
    sorted(tmp_path.iterdir())[0].write_bytes(b"no tensors")
    with pytest.raises(FedtapError) as caught:
        numbered(10, tmp_path).passed("squares", counting([]), 4)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("selected", [0, 11])
def test_too_many_or_too_few_to_choose_are_refused(selected: int) -> None:
    held = numbered(10)
    with pytest.raises(FedtapError, match=f"corpus has 10 documents and {selected} are to be chosen"):
        parse("loss_drop")[0].fit(Corpus(held.ids, held.candidates, selected))  # type: ignore[arg-type]


SHARDED = ("loss_drop", "similar_texts", "select", "select(rule='greedy')", "select(rule='greedy_batches', batches=2)")


def chosen_by(attack: Attack, folder: Path | None) -> Selection:
    plain = checkpoint_leaks.corpus(6, on_topic(0, 4, 9).ids)
    held = Corpus(plain.ids[::4], plain.candidates, 6, folder)
    return attack.fit(held)(leak_on((0, 1)))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("text", SHARDED)
def test_an_attack_that_is_killed_goes_on_where_it_was(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "SHARD", 16)
    (attack,) = parse(text)
    whole, written = chosen_by(attack, None), corpus_module.write_atomically
    files, folder = list[str](), tmp_path / "shards"
    (tmp_path / "rows.jsonl").touch()

    def stops(path: Path, content: bytes) -> None:
        if len(files) == 4:
            raise KeyboardInterrupt
        files.append(path.name)
        written(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "write_atomically", stops)
        with pytest.raises(KeyboardInterrupt):
            chosen_by(attack, folder)
    before, again = set(files), list[str]()
    assert {file.name for file in tmp_path.rglob("pass-*")} == before
    monkeypatch.setattr(
        corpus_module, "write_atomically", lambda path, content: (again.append(path.name), written(path, content))
    )
    resumed = chosen_by(attack, folder)
    assert not before & set(again)
    assert again
    assert torch.equal(resumed.chosen, whole.chosen)
    torch.testing.assert_close(resumed.membership, whole.membership)
    assert not list(tmp_path.rglob("pass-*"))  # an attack that has ended leaves none
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["rows.jsonl"]
