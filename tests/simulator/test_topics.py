"""Made-up documents: the seed's alone, and of one topic."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from fedtap.simulator.data.topics import GRAMMAR, NAMES, TIMES, TOPICS, documents

COMMON = {*NAMES.split(), *TIMES, *(word for line in GRAMMAR for word in line.split() if "{" not in word)}


def words_of(topic: str) -> set[str]:
    return set(" ".join(TOPICS[topic].values()).split())


@pytest.mark.parametrize("topic", TOPICS)
def test_documents_are_the_seeds_and_their_names(topic: str) -> None:
    one = documents(topic, 20, 3, 0)
    assert one == documents(topic, 20, 3, 0)
    assert one[:5] == documents(topic, 5, 3, 0)
    assert len(set(one)) == 20
    for other in (documents(topic, 20, 4, 0), documents(topic, 20, 3, 1), documents(topic, 20, 3, 0, 1)):
        assert not set(one) & set(other)


@pytest.mark.parametrize("topic", TOPICS)
def test_a_document_has_words_of_its_topic_alone(topic: str) -> None:
    said = Counter(word for text in documents(topic, 300, 0) for word in text.split())
    assert set(said) - COMMON <= words_of(topic)
    assert len(set(said) & words_of(topic)) > 0.9 * len(words_of(topic))
    assert all(10 <= len(text.split()) <= 20 for text in documents(topic, 50, 0))


def test_topics_share_next_to_no_words() -> None:
    for one, other in itertools.combinations(TOPICS, 2):
        assert words_of(one) & words_of(other) <= {"hedge"}, (one, other)  # a bank's, and a gardener's
        assert not words_of(one) & COMMON


def following(seed: int, *names: int) -> Counter[tuple[str, str]]:
    """How often a topic's word follows another one, with what stands between left out."""
    pairs: Counter[tuple[str, str]] = Counter()
    for text in documents("law", 3000, seed, *names):
        pairs.update(itertools.pairwise(word for word in text.split() if word in words_of("law")))
    return pairs


def overlap(one: Counter[tuple[str, str]], other: Counter[tuple[str, str]]) -> float:
    return sum((one & other).values()) / sum(one.values())


def test_habits_are_the_seeds() -> None:
    first = following(0, 1)
    assert overlap(first, following(0, 2)) > 0.8 > 0.6 > overlap(first, following(1, 1))
