"""The attacks that choose documents beside SELECT: losses, what a model writes, and membership over rounds."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi
from torch import Tensor

from fedtap.attackers import parse
from fedtap.attackers.checkpoints.lexical import bm25
from fedtap.attackers.checkpoints.models import ends, losses, written_by
from fedtap.attackers.checkpoints.sequence_membership import SequenceMembership
from fedtap.simulator.attack import Auxiliary
from fedtap.simulator.corpus import Selection
from fedtap.simulator.data.documents import Documents
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.leaks import CheckpointLeak, Leak, stack
from fedtap.simulator.models.fine_tuning import FineTuning
from fedtap.simulator.models.text_model import PAD, TextModel
from fedtap.simulator.scores import auc
from tests.support.checkpoint_leaks import HOW, PUBLIC, corpus, leak_of, leak_on, on_topic, precision, public, unmoved

TOPICS = (0, 1)


def run(attack: str, leak: Leak, candidates: Tensor | None = None, seed: int = 0) -> Selection:
    (made,) = parse(attack)
    return made.fit(corpus(PUBLIC, candidates))(leak, seed=seed)  # type: ignore[arg-type, return-value]


def loss_of(net: TextModel, ids: Tensor) -> Tensor:
    """One document at a time."""
    with torch.no_grad():
        return torch.stack([net.losses(one[None], None)[0] for one in ids])


def test_lowest_loss_is_that_of_the_tuned_model() -> None:
    leak, asked = leak_on(TOPICS), on_topic(0, 6, 9).ids
    found = run("lowest_loss", leak, asked)
    for victim in range(2):
        _, after = ends(leak[victim], "cpu")
        each = loss_of(after, public()[0])
        assert found.chosen[victim].tolist() == each.argsort()[:PUBLIC].tolist()
        torch.testing.assert_close(found.membership[victim], -loss_of(after, asked))
        assert float(found.objective[victim]) == pytest.approx(float(each.sort().values[:PUBLIC].mean()), rel=1e-4)


def test_loss_drop_is_the_difference_of_both_ends() -> None:
    leak, asked = leak_on(TOPICS), on_topic(0, 6, 9).ids
    found = run("loss_drop", leak, asked)
    for victim in range(2):
        before, after = ends(leak[victim], "cpu")
        drops = loss_of(before, public()[0]) - loss_of(after, public()[0])
        assert found.chosen[victim].tolist() == drops.argsort(descending=True)[:PUBLIC].tolist()
        wanted = loss_of(before, asked) - loss_of(after, asked)
        torch.testing.assert_close(found.membership[victim], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attack", ["lowest_loss", "loss_drop", "lexical", "sequence_membership"])
def test_the_topic_is_found(attack: str) -> None:
    found = run(attack, leak_on(TOPICS))
    assert precision(found.chosen, TOPICS) > 0.7
    assert precision(found.chosen, TOPICS[::-1]) < 0.1
    assert all(len(set(one.tolist())) == PUBLIC for one in found.chosen)
    assert found.membership.shape == (2, 0)


def test_similar_texts_are_near_what_the_model_writes() -> None:
    leak, asked = leak_on(TOPICS)[0], on_topic(0, 6, 9).ids
    found, (attack,) = run("similar_texts", leak, asked), parse("similar_texts")
    before, after = ends(leak, "cpu")

    def embedding(text: Tensor) -> Tensor:
        """The mean over the places at which a token is predicted, or the end of a text that is not cut."""
        real = text[text != PAD]
        places = len(real) + (len(real) < before.places - 1)
        return before.features(real[None])[0, :places].mean(0)

    with torch.no_grad():
        public_, asked_, written = (
            torch.stack([embedding(text) for text in texts])
            for texts in (public()[0], asked, written_by(after, corpus(), int(attack.begin(leak, 0)[0])))
        )
    origin = public_.mean(0)
    near = [torch.cosine_similarity(one - origin, (written.mean(0) - origin)[None]) for one in (public_, asked_)]
    assert found.chosen[0].tolist() == near[0].topk(PUBLIC).indices.tolist()
    torch.testing.assert_close(found.membership[0], near[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attack", ["lowest_loss", "loss_drop", "similar_texts", "lexical", "random_selection"])
def test_clients_that_train_on_nothing_show_no_topic(attack: str) -> None:
    found = run(attack, unmoved(leak_on(tuple(range(8)))))
    assert precision(found.chosen, range(8)) < 0.2


def test_random_documents_are_the_seeds_and_the_victims() -> None:
    leak = leak_on(TOPICS)
    one, other = (run("random_selection", leak, public()[0][:9], seed) for seed in (0, 1))
    assert not torch.equal(one.chosen[0], one.chosen[1])
    assert not torch.equal(one.chosen, other.chosen)
    assert torch.equal(run("random_selection", unmoved(leak), public()[0][:9]).chosen, one.chosen)
    assert one.membership.shape == (2, 9)


def slow_bm25(texts: Sequence[Sequence[int]], query: Sequence[int], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Robertson's formula; a word in more than half of the texts counts as a quarter of the mean weight of all."""
    mean = sum(map(len, texts)) / len(texts)
    held = {word: sum(word in text for text in texts) for text in texts for word in text}
    weight = {word: math.log((len(texts) - many + 0.5) / (many + 0.5)) for word, many in held.items()}
    floor = 0.25 * sum(weight.values()) / len(weight)
    weight = {word: one if one >= 0 else floor for word, one in weight.items()}
    scores = []
    for text in texts:
        counts, length = Counter(text), k1 * (1 - b + b * len(text) / mean)
        scores.append(sum(weight.get(word, 0) * counts[word] * (k1 + 1) / (counts[word] + length) for word in query))
    return scores


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 9), min_size=2, max_size=6), min_size=2, max_size=7),
    st.lists(st.integers(3, 11), min_size=1, max_size=9),
)
def test_bm25_is_the_packages_and_the_formula(texts: list[list[int]], query: list[int]) -> None:
    ids = torch.tensor([text + [PAD] * (6 - len(text)) for text in texts])
    found = bm25(ids, Counter(query))
    np.testing.assert_allclose(found, BM25Okapi(texts).get_scores(query), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, slow_bm25(texts, query), rtol=1e-4, atol=1e-4)


def test_bm25_by_hand() -> None:
    """Three texts of two words; the word asked for is in one: log(2.5 / 1.5), its count 1 and length the mean."""
    ids = torch.tensor([[3, 4, PAD], [5, 6, PAD], [7, 8, PAD]])
    assert bm25(ids, Counter([5])).tolist() == pytest.approx([0, math.log(2.5 / 1.5), 0], abs=1e-6)
    assert bm25(ids, Counter([5, 5])).tolist() == pytest.approx([0, 2 * math.log(2.5 / 1.5), 0], abs=1e-6)


def test_lexical_asks_by_what_the_model_writes() -> None:
    leak, asked = leak_on((0,)), on_topic(0, 5, 9).ids
    found = run("lexical", leak, asked)
    (attack,) = parse("lexical")
    _, after = ends(leak, "cpu")
    written = written_by(after, corpus(), int(attack.begin(leak, 0)[0]))
    query = [token for row in written.tolist() for token in row if token != PAD]

    def scores(ids: Tensor) -> Tensor:
        texts = [[token for token in row if token != PAD] for row in ids.tolist()]
        return torch.from_numpy(BM25Okapi(texts).get_scores(query))

    # candidates, some of which are private, have no part in what is chosen
    assert found.chosen[0].tolist() == scores(public()[0]).topk(PUBLIC).indices.tolist()
    beside = scores(torch.cat([public()[0], asked]))[len(public()[0]) :]
    torch.testing.assert_close(found.membership[0].double(), beside, rtol=1e-4, atol=1e-3)


def test_a_model_writes_of_what_it_was_tuned_on() -> None:
    leak, many = leak_on((0,)), 60
    before, after = ends(leak, "cpu")
    words = set(on_topic(0, 200, 7).ids.flatten().tolist()) - set(on_topic(3, 200, 7).ids.flatten().tolist())
    shares = []
    for net in (before, after):
        ids = written_by(net, corpus(), 0, many)
        assert ids.shape == (many, public()[0].shape[1])
        ended = (ids == PAD).cumsum(1) > 0
        assert (ids[ended] == PAD).all()  # nothing is written after an end
        assert not (ids == net.end).any()
        real = ids[ids != PAD].tolist()
        shares.append(sum(token in words for token in real) / len(real))
    assert shares[1] > 1.4 * shares[0]
    assert torch.equal(written_by(after, corpus(), 0, 5), written_by(after, corpus(), 0, 5))
    assert not torch.equal(written_by(after, corpus(), 0, 5), written_by(after, corpus(), 1, 5))


@pytest.mark.parametrize("attack", ["lexical", "similar_texts"])
def test_what_needs_writing_refuses_classifiers(attack: str) -> None:
    with pytest.raises(FedtapError, match=r"a classifier writes none: use select, lowest_loss or loss_drop"):
        run(attack, leak_on(TOPICS, "bert"))


@pytest.mark.parametrize("attack", ["random_selection", "lowest_loss", "loss_drop", "sequence_membership"])
def test_what_needs_no_writing_takes_classifiers(attack: str) -> None:
    found = run(attack, leak_on(TOPICS, "bert"), on_topic(0, 4, 9).ids)
    assert found.labels.unique().tolist() in ([0], [0, 1], [1])
    assert found.membership.isfinite().all()


def test_rank_bm25_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FedtapError, match=r"pip install 'fedtap\[text\]', or use similar_texts"):
        parse("lexical")[0].accepts(leak_on(TOPICS))


@pytest.mark.parametrize("attack", ["select", "random_selection", "lexical", "sequence_membership"])
def test_without_a_corpus_nothing_is_chosen(attack: str) -> None:
    (made,) = parse(attack)
    with pytest.raises(FedtapError, match="chooses from a corpus of documents, and has none"):
        made(leak_on(TOPICS))
    with pytest.raises(FedtapError, match="this scenario gives pairs: use it in select_topic"):
        made.fit(Auxiliary.__new__(Auxiliary))


@pytest.mark.parametrize("selected", [0, -3, 161])
def test_more_than_there_are_cannot_be_chosen(selected: int) -> None:
    with pytest.raises(FedtapError, match=r"corpus has 160 documents and .* are to be chosen"):
        parse("select")[0].fit(corpus(selected))  # type: ignore[arg-type]


LONG = FineTuning(epochs=25, batch=8, learning_rate=1e-2)
"""Until a client knows its documents by heart."""

ASKED = 24


@cache
def over_tuned() -> tuple[CheckpointLeak, Tensor]:
    """Of two clients on one topic, and as many documents of the first as others on the topic."""
    mine, others = on_topic(0, ASKED, 2, 0), on_topic(0, ASKED, 3, 0)
    return leak_of([mine, on_topic(0, ASKED, 4, 0)], how=LONG), torch.cat([mine.ids, others.ids])


@pytest.mark.parametrize("attack", ["loss_drop", "sequence_membership", "sequence_membership(references=0)", "select"])
def test_members_are_told_where_a_client_overfits(attack: str) -> None:
    leak, asked = over_tuned()
    mine, anothers = run(attack, leak, asked).membership
    assert auc(mine[:ASKED], mine[ASKED:]) > 0.7
    assert abs(auc(anothers[:ASKED], anothers[ASKED:]) - 0.5) < 0.2


def in_rounds() -> CheckpointLeak:
    """Two clients in two rounds, the second at other weights; the later round stands first."""
    first = leak_on(TOPICS)
    again = leak_of([on_topic(topic, 24, 5, topic) for topic in TOPICS])
    moved = {name: tensor + 0.01 for name, tensor in (first.weights or {}).items()}
    second = dataclasses.replace(again, weights=moved, rounds=again.rounds + 1)
    found = stack([second, first])
    assert isinstance(found, CheckpointLeak)
    return found


def test_membership_adds_up_over_rounds() -> None:
    leak, asked = in_rounds(), on_topic(0, 6, 9).ids
    assert leak.rounds.tolist() == [2, 2, 1, 1]
    found = SequenceMembership(references=0).fit(corpus(PUBLIC, asked))(leak)
    falls, public_falls = [], []
    for victim in range(4):
        before, after = ends(leak[victim], "cpu")
        falls.append(loss_of(before, asked) - loss_of(after, asked))
        public_falls.append(loss_of(before, public()[0]) - loss_of(after, public()[0]))
    for victim, wanted in enumerate([falls[0] + falls[2], falls[1] + falls[3], falls[2], falls[3]]):
        torch.testing.assert_close(found.membership[victim], wanted, rtol=1e-4, atol=1e-5)
    both = (public_falls[0] + public_falls[2]).argsort(descending=True)[:PUBLIC]
    assert set(found.chosen[0].tolist()) == set(both.tolist())


def test_a_round_says_the_same_with_later_ones_or_without() -> None:
    leak, asked = in_rounds(), on_topic(0, 6, 9).ids
    whole, first = (run("sequence_membership(references=1)", one, asked) for one in (leak, leak[2:]))
    torch.testing.assert_close(whole.membership[2:], first.membership)
    assert torch.equal(whole.chosen[2:], first.chosen)


def test_references_take_off_how_hard_a_document_is() -> None:
    leak, asked = over_tuned()
    found = {many: run(f"sequence_membership(references={many})", leak, asked) for many in (0, 1, 2)}
    assert torch.equal(found[0].chosen, found[2].chosen)
    _, after = ends(leak[0], "cpu")
    last = corpus(PUBLIC, asked).asked(losses(after, after), 8)
    for many in (1, 2):  # loss under references - loss under the checkpoint
        assert not torch.allclose(found[many].membership, found[0].membership, atol=1e-2)
        assert (found[many].membership[0] + last).min() > 0
    assert not torch.allclose(found[1].membership, found[2].membership, atol=1e-2)


@pytest.mark.parametrize(
    "terms", [{"summed": 2, "batch": 16, "local_steps": 8}, {"adapter": "lora(rank=2, alpha=4)"}], ids=str
)
def test_references_are_trained_as_the_clients_were(terms: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[FineTuning, Documents, set[str]]] = []

    def noted(how: FineTuning, net: TextModel, ids: Tensor, labels: Tensor | None, draw: torch.Generator) -> None:
        moved = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
        trained.append((how, Documents(ids, labels), moved))

    plain = leak_on(TOPICS)
    leak = dataclasses.replace(plain, protocol=dataclasses.replace(plain.protocol, **terms))
    if "adapter" in terms:
        from fedtap.simulator.models.adapters import Lora, adapter_shapes

        shapes = adapter_shapes(plain.network, Lora.parse(str(terms["adapter"])))  # type: ignore[arg-type]
        leak = dataclasses.replace(leak, observed={name: torch.zeros(2, *shape) for name, shape in shapes.items()})
    monkeypatch.setattr(FineTuning, "__call__", noted)
    run("sequence_membership(references=3)", leak[0], on_topic(0, 2, 9).ids)
    summed = leak.protocol.summed
    assert len(trained) == 3 * summed
    for how, documents, moved in trained:
        assert len(documents) == 24 // summed
        assert how == HOW
        assert all(".lora_" in name for name in moved) == ("adapter" in terms)
