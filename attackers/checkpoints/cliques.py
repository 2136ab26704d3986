"""Cluster samples by peeling cliques off their similarity graph, and take from each cluster the sample in its middle.

The extraction step of FineXtract (Wu, Zhang, Wu, ICML 2025, https://arxiv.org/abs/2410.03039): two samples are joined
where their cosine is at least φ, the largest clique is taken out again and again, and φ rises from the 25 % quantile of
all pairs' cosines in steps of 0.01 until as many cliques come out as there were private images.

Departs from the paper in which cliques count. At the 25 % quantile three of four pairs are joined, so that a clique
holds samples of several images, and what it leaves of them counts as cliques too: φ would hardly ever rise. Here a
clique counts where it is large enough and a community in the weak sense of Radicchi et al. 2004,
https://arxiv.org/abs/cond-mat/0309488: its samples have more neighbours in it than outside. The released code counts
single samples, and passes over each φ whose cliques are not all listed within 30 s, so what it finds is the machine's.
``cliques(features, many, smallest=1, apart=False)`` is the paper's rule.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import networkx as nx
import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from fedtap.simulator.errors import FedtapError

STRIDES = 100
"""Thresholds in a unit of cosine."""

DIGITS = 6
"""Decimals to which cosines are rounded, so that 1 is a cosine that samples can have."""

COUNTING = 5
"""Samples of the smallest clique that counts: chance joins three that belong to no cluster, hardly five."""

LISTED = 300
"""Maximal cliques that are looked at for one threshold. Nearly separate clusters have fewer; of a denser graph, no
number that can be listed finds more than the greedy clique."""

JOINS = 3_000
"""Edges of a graph above which its cliques are not listed at all, since reading it takes longest; 77 samples that are
all alike have 2,926."""

Samples = list[int]


@dataclass(frozen=True)
class Clusters:
    """As many clusters of samples as were asked for, the largest first; no sample is in two."""

    medoids: Int[Tensor, "found"]
    """Each cluster's sample that is nearest to its mean feature, as an index of samples."""
    members: tuple[tuple[int, ...], ...]
    """Each cluster's samples, of which every two have a cosine of at least the threshold."""
    threshold: float
    """φ, the cosine at which the search ended."""
    capped: bool
    """Whether the search for a largest clique was cut short at any threshold, where the best so far was taken."""


def cliques(
    features: Float[Tensor, "samples features"],
    many: int,
    smallest: int | None = None,
    apart: bool = True,
    seconds: float = 30.0,
) -> Clusters:
    """The cliques that count at the first φ at which there are `many`; where too few count at any φ, those of the first
    φ at which the most do, then the largest others there, and at last single samples split off.

    It is deterministic, and does not depend on the order of the samples, as long as the time suffices.

    Args:
        features: L2-normalised.
        smallest: samples of a clique that counts; by default COUNTING, or a quarter of a cluster's share where that is
            less, but 2 at least.
        apart: whether only communities count.
        seconds: processor time after which the greedy cliques are taken.

    Raises:
        FedtapError: there are fewer samples than clusters, or a feature has no direction.
    """
    _check(features, many, smallest)
    features = torch.nn.functional.normalize(features.detach().double().cpu(), dim=1)
    cosines = features @ features.T
    order = cosines.sum(1).argsort(descending=True, stable=True)  # whatever order the samples came in
    features, cosines = features[order], cosines[order][:, order]
    rounded = cosines.numpy().round(DIGITS)
    least = max(2, min(COUNTING, len(features) // (4 * many))) if smallest is None else smallest
    found, stride, capped = _search(rounded, many, least, apart, time.thread_time() + seconds)
    found = sorted(_split(found, many, cosines), key=len, reverse=True)
    return Clusters(
        medoids=order[[clique[int((features[clique] @ features[clique].mean(0)).argmax())] for clique in found]],
        members=tuple(tuple(sorted(order[clique].tolist())) for clique in found),
        threshold=stride / STRIDES,
        capped=capped,
    )


def _check(features: Float[Tensor, "samples features"], many: int, smallest: int | None) -> None:
    if many < 1 or (smallest is not None and smallest < 1):
        raise FedtapError("No cluster is empty, so there are 1 or more, of 1 or more samples: give larger numbers.")
    if len(features) < many:
        raise FedtapError(
            f"{many:,} images cannot be extracted from {len(features):,} samples, since each is one of them: draw more "
            "samples, 50 for each image."
        )
    lengths = features.detach().double().norm(dim=1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise FedtapError(
            "The feature of a sample is not finite, or 0, so it has no direction to compare: look at the samples, "
            "which may hold NaN, and at the encoder."
        )


def _search(
    cosines: Float64[np.ndarray, "samples samples"], many: int, smallest: int, apart: bool, deadline: float
) -> tuple[list[Samples], int, bool]:
    """Cliques, those that count first; the threshold, in strides; and whether a search was cut short."""
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    start = math.floor(round(STRIDES * float(np.quantile(pairs, 0.25)), DIGITS)) if len(pairs) else STRIDES
    found: list[Samples] = []
    best, capped = start, False
    for stride in range(start, STRIDES + 1):
        graph = _Graph(cosines >= stride / STRIDES, deadline)
        counted = _counted(graph, many, len(found), smallest, apart)
        capped |= graph.capped
        if len(counted) == many:
            return counted, stride, capped
        if len(counted) > len(found):
            best, found = stride, counted
    graph = _Graph(cosines >= best / STRIDES, deadline)
    for clique in found:
        graph.take(clique)
    while len(found) < many and graph.left:
        found.append(graph.take(graph.largest()))
    return found, best, capped | graph.capped


def _counted(graph: _Graph, many: int, before: int, smallest: int, apart: bool) -> list[Samples]:
    """The first `many` cliques that count, of those that are taken out of the graph, the largest first; some of them
    where there can be no more than `before`."""
    found: list[Samples] = []
    while len(found) < many and graph.left:
        if apart and len(found) + graph.near_few() <= before:
            break
        clique = graph.take(graph.largest())
        if len(clique) < smallest:
            break
        if not apart or graph.is_community(clique):
            found.append(clique)
    return found


def _split(found: list[Samples], many: int, cosines: Float[Tensor, "samples samples"]) -> list[Samples]:
    """As many cliques as are asked for: the largest loses the sample that is the least like its others."""
    while len(found) < many:
        clique = max(found, key=len)
        stray = clique[int(cosines[clique][:, clique].sum(1).argmin())]
        clique.remove(stray)
        found.append([stray])
    return found


class _Graph:
    """A graph of samples, from which some are taken away; sets of samples are the bits of whole numbers.

    Args:
        deadline: thread time after which no more cliques are listed.
    """

    def __init__(self, joined: Bool[np.ndarray, "samples samples"], deadline: float) -> None:
        self.joined = joined & ~np.eye(len(joined), dtype=bool)
        rows = np.packbits(self.joined, axis=1, bitorder="little")
        self.near = [int.from_bytes(row.tobytes(), "little") for row in rows]
        self.degrees: list[int] = self.joined.sum(1).tolist()
        self.left = (1 << len(joined)) - 1
        self.budget, self.deadline, self.capped = LISTED, deadline, False

    def take(self, clique: Samples) -> Samples:
        """Take these samples away."""
        self.left &= ~sum(1 << sample for sample in clique)
        return clique

    def is_community(self, clique: Samples) -> bool:
        """Whether its samples have more neighbours in it than outside, among those taken away too.

        With d their degrees: ``sum d - n (n - 1) < n (n - 1)``.
        """
        return sum(self.degrees[sample] for sample in clique) < 2 * len(clique) * (len(clique) - 1)

    def near_few(self) -> int:
        """Samples that could make a clique of the rest a community, which needs one with ``d < 2 (n - 1)``.

        No clique has more samples than a colouring has colours.
        """
        colours, bare = 0, self.left
        while bare:
            colours, free = colours + 1, bare
            while free:
                sample = free & -free
                bare ^= sample
                free &= ~(self.near[sample.bit_length() - 1] | sample)
        return sum(self.degrees[sample] < 2 * (colours - 1) for sample in _ones(self.left))

    def largest(self) -> Samples:
        """The largest clique of what is left, or, if that takes too long, one no smaller than the greedy one."""
        best = self._greedy()
        kept = self._core(len(best))
        if not kept:
            return best
        samples = _ones(kept)
        doubled = sum((self.near[sample] & kept).bit_count() for sample in samples)
        if self.budget <= 0 or doubled > 2 * JOINS or time.thread_time() > self.deadline:
            self.capped = True
            return best
        for clique in nx.find_cliques(self._graph(samples)):
            self.budget -= 1
            if len(clique) > len(best):
                best = clique
            if self.budget <= 0 or time.thread_time() > self.deadline:
                self.capped = True
                break
        return best

    def _graph(self, samples: Samples) -> nx.Graph:
        graph = nx.Graph()
        pairs = np.argwhere(np.triu(self.joined[np.ix_(samples, samples)]))
        graph.add_edges_from(np.array(samples)[pairs].tolist())
        return graph

    def _greedy(self) -> Samples:
        """A maximal clique: one after the other, the sample with the most neighbours among those that are near all."""
        clique, candidates = [], self.left
        while candidates:
            clique.append(max(_ones(candidates), key=lambda sample: (self.near[sample] & candidates).bit_count()))
            candidates &= self.near[clique[-1]]
        return clique

    def _core(self, least: int) -> int:
        """What is left of the graph, each sample of which has `least` neighbours or more: larger cliques are there."""
        kept, before = self.left, 0
        while kept != before:
            before = kept
            kept = sum(1 << sample for sample in _ones(kept) if (self.near[sample] & kept).bit_count() >= least)
        return kept


def _ones(bits: int) -> Samples:
    """The samples of a set."""
    return [sample for sample, bit in enumerate(bin(bits)[:1:-1]) if bit == "1"]
