"""Clique peeling: planted clusters are found, each step against exhaustive search, and what must fail or end."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import networkx as nx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fedtap.attackers.checkpoints import cliques as module
from fedtap.attackers.checkpoints.cliques import Clusters, cliques
from fedtap.simulator.errors import FedtapError

PAPERS = {"smallest": 1, "apart": False}
"""The paper's rule: any clique counts."""

seeds = st.integers(0, 2**32 - 1)


def noise(samples: int, width: int, seed: int) -> Tensor:
    """Directions that are drawn uniformly."""
    return F.normalize(torch.randn(samples, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def planted(sizes: Sequence[int], background: int, seed: int, width: int = 32) -> tuple[Tensor, Tensor]:
    """Clusters of samples whose cosine is 0.9 in the mean, around random centres, among samples that belong to none.

    Returns:
        the features, in random order, and each sample's cluster, -1 for none.
    """
    centres = noise(len(sizes), width, seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    strays = noise(len(labels), width, seed + 1)
    strays -= (strays * centres[labels]).sum(1, keepdim=True) * centres[labels]
    clustered = 0.9**0.5 * centres[labels] + 0.1**0.5 * F.normalize(strays, dim=1)
    features = torch.cat([clustered, noise(background, width, seed + 2)])
    labels = torch.cat([labels, torch.full((background,), -1)])
    shuffled = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[shuffled], labels[shuffled]


def joined(features: Tensor, threshold: float) -> nx.Graph:
    """The graph, by a plain loop."""
    cosines = (features.double() @ features.double().T).round(decimals=6)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(features)))
    graph.add_edges_from(
        pair for pair in itertools.combinations(range(len(features)), 2) if float(cosines[pair]) >= threshold
    )
    return graph


def largest(graph: nx.Graph) -> list[set[int]]:
    """All of its largest cliques, by trying every set of samples."""
    for size in range(len(graph), 0, -1):
        sets = [set(some) for some in itertools.combinations(graph, size)]
        if found := [some for some in sets if graph.subgraph(some).size() == size * (size - 1) // 2]:
            return found
    return []


def community(graph: nx.Graph, clique: set[int]) -> bool:
    """Radicchi's weak sense: the sum of inner degrees is above that of outer ones."""
    return bool(2 * graph.subgraph(clique).size() > nx.cut_size(graph, clique))


def check(found: Clusters, features: Tensor, many: int) -> None:
    """What holds of every result."""
    assert len(found.medoids) == len(found.members) == many
    together = [sample for clique in found.members for sample in clique]
    assert len(together) == len(set(together))
    assert [len(clique) for clique in found.members] == sorted(map(len, found.members), reverse=True)
    for medoid, clique in zip(found.medoids.tolist(), found.members, strict=True):
        inside = features[list(clique)].double()
        assert float((inside @ inside.T).min()) >= found.threshold - 1e-6 or len(clique) == 1
        distances = (inside - inside.mean(0)).norm(dim=1)
        assert float(distances[clique.index(medoid)]) <= float(distances.min()) + 1e-9


@pytest.mark.parametrize("seed", range(0, 40, 8))
@pytest.mark.parametrize(
    ("sizes", "background"), [([25] * 4, 0), ([15] * 8, 0), ([10, 15, 25, 40], 40), (range(8, 24, 2), 40)], ids=str
)
def test_all_planted_clusters_are_found(sizes: Sequence[int], background: int, seed: int) -> None:
    features, labels = planted(sizes, background, seed)
    found = cliques(features, len(sizes))
    check(found, features, len(sizes))
    assert sorted(labels[found.medoids].tolist()) == list(range(len(sizes)))


def test_the_papers_rule_does_not_find_them() -> None:
    """It stops at the first threshold, where cliques hold samples of several clusters."""
    hits = []
    for seed in range(5):
        features, labels = planted([15] * 8, 40, seed)
        found = cliques(features, 8, smallest=1, apart=False)
        hits.append(len(set(labels[found.medoids].tolist()) - {-1}))
    assert max(hits) < 8


@given(seeds, st.integers(1, 12), st.integers(2, 4), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_each_clique_is_a_largest_of_what_is_left(seed: int, samples: int, width: int, many: int) -> None:
    features = noise(samples, width, seed)
    found = cliques(features, min(many, samples), smallest=1, apart=False)
    graph = joined(features, found.threshold)
    for clique in found.members:
        assert set(clique) in largest(graph)
        graph.remove_nodes_from(clique)


def peeled(graph: nx.Graph, many: int, smallest: int, apart: bool) -> list[set[int]]:
    """The first `many` cliques that count; rejects the example where two are the largest."""
    left, counted = graph.copy(), []
    while len(left) and len(counted) < many:
        clique, *others = largest(left)
        if len(clique) < smallest:
            break
        assume(not others)
        left.remove_nodes_from(clique)
        if not apart or community(graph, clique):
            counted.append(clique)
    return counted


@given(seeds, st.integers(5, 8), st.integers(1, 2), st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_threshold_is_the_first_with_as_many_cliques_as_asked_for(
    seed: int, samples: int, many: int, apart: bool
) -> None:
    features = noise(samples, 3, seed)
    pairs = [float(features[one] @ features[other]) for one, other in itertools.combinations(range(samples), 2)]
    start = int(torch.tensor(pairs).quantile(0.25).mul(100).floor())
    for threshold in range(start, 101):
        counted = peeled(joined(features, threshold / 100), many, 2, apart)
        if len(counted) == many:
            found = cliques(features, many, smallest=2, apart=apart)
            assert found.threshold == threshold / 100
            assert {frozenset(clique) for clique in found.members} == {frozenset(clique) for clique in counted}
            return
    assume(False)


@given(seeds, st.integers(2, 40), st.integers(2, 16), st.integers(1, 5), st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_samples_does_not_matter(seed: int, samples: int, width: int, many: int, papers: bool) -> None:
    many, features = min(many, samples), noise(samples, width, seed)
    options = PAPERS if papers else {}
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    found, shuffled = cliques(features, many, **options), cliques(features[order], many, **options)  # type: ignore[arg-type]
    check(found, features, many)
    assert shuffled.threshold == found.threshold
    assert {frozenset(order[list(clique)].tolist()) for clique in shuffled.members} == set(
        map(frozenset, found.members)
    )
    if min(map(len, found.members)) > 2:  # both samples of a pair are as near to the mean
        assert set(order[shuffled.medoids].tolist()) == set(found.medoids.tolist())


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_communities(seed: int) -> None:
    features, _ = planted([12, 9, 6], 10, seed)
    found = cliques(features, 3)
    graph = joined(features, found.threshold)
    assert all(community(graph, set(clique)) for clique in found.members)


@pytest.mark.parametrize("many", [1, 4])
@pytest.mark.parametrize("width", [2, 8, 128])
def test_samples_without_clusters_still_give_as_many_samples(many: int, width: int) -> None:
    for seed in range(2):
        features = noise(10 * many, width, seed)
        check(cliques(features, many), features, many)


@pytest.mark.parametrize(("samples", "many"), [(1, 1), (2, 1), (2, 2), (5, 5), (9, 4)])
@pytest.mark.parametrize("alike", [True, False])
def test_few_or_identical_samples(samples: int, many: int, alike: bool) -> None:
    features = noise(1, 16, 0).expand(samples, -1) if alike else noise(samples, 16, 0)
    found = cliques(features, many)
    check(found, features, many)
    if alike:
        assert found.threshold == 1.0
        assert [len(clique) for clique in found.members] == [samples - many + 1] + [1] * (many - 1)


def test_separate_clusters_are_searched_to_the_end() -> None:
    features = torch.eye(3).repeat_interleave(torch.tensor([5, 4, 3]), 0)
    found = cliques(features, 3)
    assert (found.members, found.threshold, found.capped) == (
        ((0, 1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11)),
        0.01,
        False,
    )


@pytest.mark.parametrize("papers", [True, False])
def test_a_dense_graph_is_capped_by_count_and_not_by_time(papers: bool) -> None:
    options = PAPERS if papers else {}
    features, begun = noise(400, 512, 0), time.thread_time()
    found = cliques(features, 8, **options)  # type: ignore[arg-type]
    spent = time.thread_time() - begun
    check(found, features, 8)
    assert found.capped
    assert spent < 15  # 0.2 on a quiet core
    again = cliques(features, 8, seconds=float("inf"), **options)  # type: ignore[arg-type]
    assert torch.equal(again.medoids, found.medoids)
    assert (again.members, again.threshold) == (found.members, found.threshold)


@pytest.mark.parametrize(("listed", "seconds"), [(50, float("inf")), (10**9, 0.2), (10**9, 0.0)])
def test_an_endless_listing_ends(listed: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0

    def endless(graph: nx.Graph) -> Iterator[list[int]]:
        nonlocal looked_at
        for node in itertools.cycle(graph):
            looked_at += 1
            yield [node]

    monkeypatch.setattr(module, "LISTED", listed)
    monkeypatch.setattr(nx, "find_cliques", endless)
    features, _ = planted([10, 10, 10], 20, 0, width=8)
    found = cliques(features, 3, seconds=seconds)
    check(found, features, 3)
    assert found.capped
    assert (looked_at > 0) == (seconds > 0)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_the_search_is_no_worse_than_the_greedy_clique(seed: int) -> None:
    features = noise(40, 6, seed)
    greedy, searched = (cliques(features, 1, 1, False, seconds).members[0] for seconds in (0.0, 30.0))
    assert len(greedy) <= len(searched)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_feature_without_a_direction_is_refused(bad: float) -> None:
    features = noise(6, 4, 0)
    features[3] = bad
    with pytest.raises(FedtapError, match="no direction to compare: look at the samples"):
        cliques(features, 2)


def test_fewer_samples_than_clusters_are_refused() -> None:
    with pytest.raises(FedtapError, match=r"4 images cannot be extracted from 3 samples.*draw more"):
        cliques(noise(3, 4, 0), 4)


@pytest.mark.parametrize(("many", "smallest"), [(0, None), (1, 0)])
def test_empty_clusters_are_refused(many: int, smallest: int | None) -> None:
    with pytest.raises(FedtapError, match="No cluster is empty"):
        cliques(noise(3, 4, 0), many, smallest)
