"""An auditor: it asks a mechanism for releases of neighbours, and holds every hypothesis against what it gets.

Hypotheses about Gaussian or Laplace noise are tested where the noise that was measured is such noise; what is read of
hidden messages is evidence against every (ε, δ)-differentially private mechanism, whatever its noise is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.stats import chi2

from fedtap.scenarios.audit_dp.probes import AuditInputs, Code, Probe, bits_for
from fedtap.scenarios.audit_dp.promise import Promise
from fedtap.scenarios.audit_dp.seeds import FEW_BITS, same_noise, seeds_of, seeds_seen, standing
from fedtap.scenarios.audit_dp.target import AuditedUpdate, Mechanism, RaisedError, quiet
from fedtap.simulator.auditing.allowed import laplace_limit, largest_ratio
from fedtap.simulator.auditing.epsilon_bounds import UNBOUNDED
from fedtap.simulator.auditing.evidence import MOST_EVIDENCE, Guesses, MeanShift, Scale, against_equal
from fedtap.simulator.defences.gaussian import sampled_by
from fedtap.simulator.errors import FedtapError, short
from fedtap.simulator.scores import lower_limit

GAUSSIAN, LAPLACE, NO_NOISE, OTHER_NOISE = "Gaussian", "Laplace", "none", "neither Gaussian nor Laplace"

_FIRST = 24
"""Releases of the same update by which the kind of noise is found, before any is evidence."""

_WEAK = 0.1
"""Entries whose noise has less than this share of their tensor's variance in the first releases are tested apart."""

_FEWEST, ENOUGH, _PATIENT = 400, 1500, 12_000
"""Releases after which an audit ends: if something was refuted, if nothing was, and if nothing was and how far
neighbours lie apart can only be found by averaging."""

_TOLERATED = 2e-3
"""Share by which noise may be smaller than it has to be: promises are made with so many digits."""

_KEPT = 500
"""Releases of the same update that are kept, to be compared with each other."""

_INDEPENDENT = 0.25
"""Share of the entries that have to be independent, as far as distances of releases tell."""

_COMPARED = 256
"""Entries of a release that are compared, at most."""

_SUBSET, _LEARNT = 48, 220
"""Entries in which a direction without noise is sought, and releases from which it is learnt."""

_EQUAL = 1e-12
"""Probability with which two honest releases are so near to each other as those that count as equal, at most."""


@dataclass
class Hypothesis:
    """One thing that the promise implies, and the evidence against it."""

    name: str
    """What is tested, in some words."""
    fault: str
    """What it is called if it falls, before it is looked at more closely."""
    log_e: Callable[[], float]
    """The evidence so far."""
    probe: str = ""
    """Name of the probe that it is about."""
    highest: float = 0.0
    """The most evidence there was."""
    fell: int = 0
    """Releases after which it fell; 0 where it did not."""


@dataclass
class Releases:
    """What one input gave."""

    size: int
    """Entries of a release."""
    groups: int
    """Groups of entries."""
    count: int = 0
    """Releases."""
    mean: np.ndarray = field(init=False)
    """Of all of them."""
    scale: Scale = field(init=False)
    """Evidence on the noise in each group."""
    freedom: np.ndarray = field(init=False)
    """Residuals in each group."""
    squares: np.ndarray = field(init=False)
    """Their sums of squares."""

    def __post_init__(self) -> None:
        self.mean = np.zeros(self.size)
        self.scale = Scale(self.groups)
        self.freedom, self.squares = np.zeros(self.groups), np.zeros(self.groups)


@dataclass(frozen=True)
class Neighbours:
    """How far the means of two neighbours' releases lie apart."""

    one: str
    """Name of a probe, or `absent`."""
    other: str
    """Name of a probe."""
    shift: np.ndarray | None
    """The difference of the means; None where it is no constant that the same noise shows."""
    direction: np.ndarray | None
    """The direction of the difference of the inputs, of length 1, in a release's entries; None where they have none."""


class Auditor:
    """An audit of one mechanism.

    Args:
        mechanism: what is audited.
        promise: what it is held against.
        alpha: probability with which an honest mechanism is refuted, at most.
        until: value of time.monotonic() at which it ends.
        theirs: the first releases of another client's process, one a row; None where there are none.
        observations: releases after which the audit ends where nothing was refuted.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        promise: Promise,
        alpha: float,
        until: float,
        theirs: np.ndarray | None = None,
        observations: int = ENOUGH,
    ) -> None:
        self.mechanism, self.promise, self.alpha, self.until = mechanism, promise, alpha, until
        self.inputs = AuditInputs(mechanism.template, mechanism.records, promise.length, mechanism.counts)
        self.observations = 0
        self.keys: list[str] = []
        self.kind = NO_NOISE
        self.hypotheses: list[Hypothesis] = []
        self.neighbours: list[Neighbours] = []
        self.seeds: list[list[int]] = []
        self.still = False
        self.history: list[dict[str, float]] = []
        self.largest_norm = 0.0
        self._theirs = theirs
        self._enough_releases = observations
        self._draw = np.random.default_rng()
        self._at: dict[str, Releases] = {}
        self._same: list[np.ndarray] = []
        self._equal = self._shared = 0.0
        self._shifts: dict[str, MeanShift] = {}
        self._last: np.ndarray = np.zeros(0)
        self._codes: dict[str, tuple[Code, Guesses, np.ndarray]] = {}
        self._weakest = Scale(1)
        self._weakest_shift = 0.0
        self._weakest_direction: np.ndarray | None = None
        self.ended = ""

    # -- releases ------------------------------------------------------------------------------------------------------

    def release(self, update: AuditedUpdate) -> np.ndarray:
        """One observation, all entries in a row.

        Raises:
            FedtapError: the mechanism raises, or sends another number of entries than before.
        """
        out = self.mechanism.release(update)
        self.observations += 1
        if not self.keys:
            self.keys = list(out)
            self.sizes = [len(out[key]) for key in self.keys]
        if list(out) != self.keys or [len(out[key]) for key in self.keys] != self.sizes:
            raise FedtapError(
                "The mechanism sends entries of other names or shapes from call to call, which is no release of one "
                "update and may itself tell of the data: send the same tensors every time."
            )
        return np.concatenate([out[key] for key in self.keys]) if self.keys else np.zeros(0)

    def first_releases(self) -> np.ndarray:
        """A few releases of the absent unit, one a row; a tiny update stands in where that one cannot be released.

        Raises:
            FedtapError: neither can.
        """
        try:
            rows = [self.release(self.inputs.absent)]
        except RaisedError as error:
            if not isinstance(error.__cause__, ZeroDivisionError):
                raise
            rows = [np.full(1, np.nan)]
        if not np.isfinite(rows[0]).all():  # a clip divides by the length
            self.inputs.absent = self.inputs.along(self.inputs.signs, 1e-9)
            self.keys = []
            rows = [self.release(self.inputs.absent)]
        rows += [self.release(self.inputs.absent) for _ in range(5)]
        return np.stack(rows)

    # -- the audit -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Audit until enough was observed or time is over.

        Raises:
            FedtapError: the mechanism cannot be audited.
        """
        with quiet():
            try:
                self._prepare()
                self._measure()
                self._suppose()
                self._observe()
            except RaisedError as error:
                if not self.observations:
                    raise
                self.ended = str(error)
        self._check()

    def _prepare(self) -> None:
        """The kind of noise, the groups of entries, and seeds."""
        before_them = [standing(one) for one in self.mechanism.generators]
        first = list(self.first_releases())
        used = zip(self.mechanism.generators, before_them, strict=True)
        self.mechanism.generators = [one for one, before in used if standing(one) != before]
        with seeds_seen() as seen:
            for _ in range(6):
                before = len(seen)
                first.append(self.release(self.inputs.absent))
                self.seeds.append(seen[before:])
        while len(first) < _FIRST:
            first.append(self.release(self.inputs.absent))
        rows = np.stack(first)
        if not np.isfinite(rows).all():
            raise FedtapError(
                "The mechanism sends numbers that are not finite for an update of zeros: see what it divides by."
            )
        self.center = rows.mean(0)
        self._group(rows)
        self.freedom = _freedom(rows[:, self.noisy])
        self.kind = _kind((rows - self.center)[:, self.noisy], self.freedom * len(rows))
        self._size = np.sqrt(np.maximum(rows.var(0, ddof=1), 0))
        self.correlated = self.freedom < _INDEPENDENT * self.noisy.sum()
        self._same = list(rows)
        self._compared = np.nonzero(self.noisy)[0]
        if len(self._compared) > _COMPARED:
            self._compared = np.sort(self._draw.choice(self._compared, _COMPARED, replace=False))
        self._reduced = np.zeros((_KEPT, len(self._compared)))
        self._reduced[: len(rows)] = rows[:, self._compared] / np.maximum(self._size[self._compared], 1e-300)
        for row in rows:
            self.largest_norm = max(self.largest_norm, float(np.linalg.norm(row)))
        self._compare_with(rows[:6])

    def _group(self, rows: np.ndarray) -> None:
        """Each tensor is a group of entries; those with less noise than the rest of it are a group of their own."""
        variance = rows.var(0, ddof=1)
        # noise that rounding leaves of a number as long as this one is none
        floor = (1e-12 * np.abs(rows).max(0)) ** 2
        variance = np.where(variance <= floor, 0.0, variance)
        self.part = np.zeros(rows.shape[1], dtype=np.int64)
        self.group_names: list[str] = []
        start = 0
        for key, size in zip(self.keys, self.sizes, strict=True):
            here = slice(start, start + size)
            weak = variance[here] < _WEAK * np.median(variance[here]) if size else np.zeros(0, bool)
            if size and not np.median(variance[here]) and variance[here].any():
                weak = variance[here] == 0
            self.part[here] = len(self.group_names)
            self.group_names.append(key)
            if weak.any() and not weak.all():
                self.part[here] += weak
                self.group_names.append(f"{int(weak.sum())} of the {size} entries of {key}")
            start += size
        self.groups = len(self.group_names)
        self.counts = np.bincount(self.part, minlength=self.groups)
        self.noisy = variance > 0
        # whole numbers, which are rounded after the noise: less or more noise there is no evidence, none at all is
        self.discrete = self.noisy & (rows == np.rint(rows)).all(0)
        self._pooled = _FIRST - 1.0, np.bincount(self.part, rows.var(0, ddof=1) * (_FIRST - 1), self.groups)

    def _compare_with(self, rows: np.ndarray) -> None:
        """Whether another client's process had the same noise."""
        if self._theirs is None or self._theirs.shape != rows.shape:
            return
        noise = np.where(self.noisy, self._size, 0.0)
        if not self.noisy.any():  # noise that is the same in each call, or none at all
            noise = np.abs(rows[0])
        used = noise > 0
        if len(np.unique(rows[0][used])) < _FIRST:  # a few constants, such as a number of examples, are no noise
            return
        for mine in rows:
            for other in self._theirs:
                near = float((((mine - other)[used] / noise[used]) ** 2).sum()) / 2
                self._shared = max(self._shared, _nearness(near, int(used.sum()), self.freedom, len(rows) ** 2))

    def _measure(self) -> None:
        """How far the means of neighbours lie apart: the same noise is drawn for both."""
        absent = Probe("absent", self.inputs.absent, long=False)
        probes = self.inputs.probes()
        self.still = self._steady()
        self.probes = {"absent": absent, **{probe.name: probe for probe in probes}}
        for probe in probes:
            other = absent
            if self.promise.distances == 2 and probe.about not in self.mechanism.template.keys() - set(
                self.inputs.floats
            ):
                other = self.inputs.opposite(probe)
                self.probes[other.name] = other
            self.neighbours.append(self._apart(other, probe))
        if self.promise.adjacency == "add_remove":
            for probe in self.inputs.of_other_sizes():
                self.probes[probe.name] = probe
        for name in self.probes:
            self._at[name] = Releases(len(self.part), self.groups)
        self._at["absent"].count, self._at["absent"].mean = _FIRST, self.center.copy()

    def _steady(self) -> bool:
        """Whether the same noise can be drawn twice."""
        with same_noise(1, self.mechanism.generators):
            one = self.release(self.inputs.absent)
        with same_noise(1, self.mechanism.generators):
            other = self.release(self.inputs.absent)
        return bool(np.array_equal(one, other))

    def _apart(self, one: Probe, other: Probe) -> Neighbours:
        """The shift between two inputs, which has to be the same under two draws of the noise."""
        direction = self._direction(other)
        if not self.still:
            return Neighbours(one.name, other.name, None, direction)
        found = []
        for seed in (2, 3):
            pair = []
            for probe in (one, other):
                with same_noise(seed, self.mechanism.generators):
                    pair.append(self.release(probe.update))
            if not all(np.isfinite(row).all() for row in pair):
                return Neighbours(one.name, other.name, None, direction)
            found.append(pair[1] - pair[0])
        length = float(np.linalg.norm(found[0]))
        rounding = 1e-6 * float(np.linalg.norm(pair[0])) + 1e-12
        additive = float(np.linalg.norm(found[0] - found[1])) <= 1e-4 * length + rounding
        return Neighbours(one.name, other.name, (found[0] + found[1]) / 2 if additive else None, direction)

    def _direction(self, probe: Probe) -> np.ndarray | None:
        """The unit's direction in a release's entries, of which those count that have the name and size of an input."""
        parts = []
        for key, size in zip(self.keys, self.sizes, strict=True):
            tensor = probe.update.get(key)
            if tensor is not None and self.mechanism.records:
                tensor = tensor[-1]
            fits = tensor is not None and tensor.numel() == size
            parts.append(tensor.double().numpy().reshape(-1) if fits and tensor is not None else np.zeros(size))
        whole = np.concatenate(parts)
        length = float(np.linalg.norm(whole))
        return whole / length if length else None

    # -- hypotheses ----------------------------------------------------------------------------------------------------

    def _suppose(self) -> None:
        """What is tested."""
        # where entries share their noise, only one number of each release is tested: that along the weakest direction
        continuous = self.kind in (GAUSSIAN, LAPLACE, NO_NOISE) and not self.correlated
        for pair in self.neighbours:
            name = f"noise enough between {pair.one} and {pair.other}"
            if pair.shift is not None and continuous and float(np.abs(pair.shift).max()) > 0:
                self._add(name, "noise", self._enough(pair), pair.other)
            elif pair.shift is None and continuous and self.kind == GAUSSIAN and pair.direction is not None:
                self._shifts[pair.other] = MeanShift(max(self.promise.distance, 1e-12))
                self._add(name, "noise", self._shifts[pair.other].log_e, pair.other)
        if self.kind in (GAUSSIAN, LAPLACE) and continuous:
            for probe in self.probes:
                if probe != "absent" and (self.kind == GAUSSIAN or self._shift_of(probe) is not None):
                    self._add(f"one scale of the noise for absent and {probe}", "scale", self._alike(probe), probe)
        self._encode()
        for key, (_, guesses, _) in self._codes.items():
            self._add(f"messages in {key} are not read", "read", lambda guesses=guesses: guesses.log_e)  # type: ignore[misc]
        self._add("no two releases have the same noise", "repeated", lambda: self._equal)
        self._add("another client's process has other noise", "shared", lambda: self._shared)
        self._add(f"seeds have more than {FEW_BITS} bits", "seed", self._few_bits)
        if self.kind == GAUSSIAN and self.still:
            self._add("noise in every direction", "direction", self._without_direction)
        if self.kind == GAUSSIAN and not self.promise.delta:
            self._add("noise with lighter tails than Gaussian", "pure", lambda: MOST_EVIDENCE)

    def _add(self, name: str, fault: str, log_e: Callable[[], float], probe: str = "") -> None:
        self.hypotheses.append(Hypothesis(name, fault, log_e, probe))

    def _shift_of(self, probe: str) -> np.ndarray | None:
        return next((pair.shift for pair in self.neighbours if pair.other == probe and pair.one == "absent"), None)

    def _cost(self, shift: np.ndarray) -> tuple[np.ndarray, float]:
        """What `Scale.against_enough` takes: Σ Δ² over each group and μ² for Gaussian noise, Σ|Δ| and ε for Laplace."""
        eased = np.where(self.discrete, 0.0, np.abs(shift)) * (1 - _TOLERATED)
        if self.kind == LAPLACE:
            return np.bincount(self.part, eased, self.groups), laplace_limit(eased, *self.promise.alone)
        return np.bincount(self.part, eased**2, self.groups), max(self.promise.distance**2, 1e-300)

    def _enough(self, pair: Neighbours) -> Callable[[], float]:
        assert pair.shift is not None
        cost, most = self._cost(pair.shift)
        names = {"absent", pair.one, pair.other}
        return lambda: self._scale_at(names).against_enough(cost, most)

    def _scale_at(self, names: Iterable[str]) -> Scale:
        scale = Scale(self.groups)
        for name in names:
            scale = scale + self._at[name].scale
        return scale

    def falls_without(self, probe: str, weak: np.ndarray) -> bool:
        """Whether there is too little noise for a probe even if some groups of entries were not sent."""
        pair = next(pair for pair in self.neighbours if pair.other == probe)
        if pair.shift is None:
            return True
        cost, most = self._cost(np.where(weak[self.part], 0.0, pair.shift))
        return self._scale_at({"absent", pair.one, pair.other}).against_enough(cost, most) >= self.threshold

    def _alike(self, probe: str) -> Callable[[], float]:
        each = 1.0 if self.kind == LAPLACE else 0.5

        rounded = np.bincount(self.part, self.discrete, self.groups) > 0

        def ratio(group: int) -> float:
            if rounded[group]:
                return 1e100
            epsilon, delta, rounds = self.promise.alone
            size = each * self.counts[group] * rounds
            return (1 + _TOLERATED) * largest_ratio(size, epsilon, delta, self.promise.rate < 1)

        return lambda: against_equal(self._at["absent"].scale, self._at[probe].scale, ratio)

    def _few_bits(self) -> float:
        """Seeds of 64 bits would all be this small with probability 2^-32 each."""
        kept = len([seed for seed in seeds_of(self.mechanism.generators) if seed < 2**FEW_BITS])
        if kept:
            return float(kept * FEW_BITS * math.log(2))
        if not all(self.seeds) or not self.seeds:
            return 0.0
        small = [max(call) < 2**FEW_BITS for call in self.seeds]
        return len(small) * FEW_BITS * math.log(2) if all(small) else 0.0

    def _encode(self) -> None:
        """Where messages are hidden: in a whole update, and in entries that have no noise."""
        epsilon, delta, _ = self.promise.alone
        bits = bits_for(epsilon, delta)
        pair = next(pair for pair in self.neighbours if pair.other == "a long update")
        shift = pair.shift if pair.shift is not None else pair.direction
        if shift is None:
            return
        direction = self._direction(self.probes["a long update"])
        if direction is None:
            return
        places = {"a whole update": direction != 0, "entries without noise": (direction != 0) & ~self.noisy}
        for key, where in places.items():
            size = int(where.sum())
            if size < 2 or (key == "entries without noise" and size == int((direction != 0).sum())):
                continue
            code = Code(size, bits, self._draw)
            self._codes[key] = (code, Guesses(code.chance(epsilon, delta)), where)

    # -- observing -----------------------------------------------------------------------------------------------------

    def _observe(self) -> None:
        """Releases of the absent unit and of each probe in turn, with messages between them."""
        names = [name for name in self.probes if name != "absent"]
        order = names if self.still else names + ["a long update"] * len(names)
        turn = 0
        while not self._over():
            for name in self._draw.permutation(order):
                self._take("absent")
                self._take(str(name))
                turn += 1
                if turn % 3 == 0:
                    self._ask()
                if turn % 8 == 0 or turn < 8:
                    self._judge()
            self._judge()
            self._note()
            if turn * 2 >= _LEARNT and self._weakest_direction is None and self.kind == GAUSSIAN and self.still:
                self._learn_direction()

    def _over(self) -> bool:
        enough = self._enough_releases if self.still or self.kind != GAUSSIAN else _PATIENT
        if any(one.fell for one in self.hypotheses):
            enough = _FEWEST
        return self.observations >= enough or time.monotonic() >= self.until

    def _take(self, name: str) -> None:
        """One release of this probe, into the evidence."""
        row = self.release(self.probes[name].update)
        if not np.isfinite(row).all():
            return
        self.largest_norm = max(self.largest_norm, float(np.linalg.norm(row)))
        at = self._at[name]
        if name == "absent":
            self._compare(row)
            if self._weakest_direction is not None:
                self._take_direction(row)
        elif name in self._shifts:
            self._take_shift(name, row)
        if self.kind == LAPLACE:
            self._take_laplace(name, at, row)
        else:
            self._take_gaussian(at, row)
        at.count += 1
        at.mean += (row - at.mean) / at.count
        if name == "absent":
            self._last = row

    def _take_gaussian(self, at: Releases, row: np.ndarray) -> None:
        """Residuals after the mean so far, times √(k / (k + 1)), are independent Gaussian noise (Helmert)."""
        if not at.count:
            return
        rest = (row - at.mean) * math.sqrt(at.count / (at.count + 1))
        rest[np.abs(rest) <= 1e-12 * np.abs(row)] = 0.0  # what rounding leaves of the mean
        squares = np.bincount(self.part, rest**2, self.groups)
        times, all_squares = self._pooled
        common = all_squares / (times * self.counts)
        weight = 4.0
        variance = (at.squares + weight * common) / (at.freedom + weight)
        at.scale.add(self.counts / 2, squares / 2, 1 / np.maximum(variance, self._floor()))
        at.freedom += self.counts
        at.squares += squares
        self._pooled = times + 1, all_squares + squares

    def _take_laplace(self, name: str, at: Releases, row: np.ndarray) -> None:
        shift = np.zeros(len(row)) if name == "absent" else self._shift_of(name)
        if shift is None:
            return
        sizes = np.bincount(self.part, np.abs(row - self._laplace_center() - shift), self.groups)
        common = np.sqrt(self._pooled[1] / (self._pooled[0] * self.counts) / 2)  # of the first releases, b = σ/√2
        weight = 4.0
        scale = (at.squares + weight * common) / (at.freedom + weight)
        at.scale.add(self.counts.astype(float), sizes, 1 / np.maximum(scale, np.sqrt(self._floor())))
        at.freedom += self.counts
        at.squares += sizes

    def _laplace_center(self) -> np.ndarray:
        """The releases' center without a unit: 0 where nothing speaks against it."""
        doubtful = np.abs(self.center) > 7 * self._size / math.sqrt(_FIRST)
        return np.where(doubtful, self.center, 0.0)

    def _floor(self) -> np.ndarray:
        """Variances below this are taken for it."""
        return np.full(self.groups, (1e-9 * self.promise.length) ** 2)

    def _take_shift(self, name: str, row: np.ndarray) -> None:
        pair = next(pair for pair in self.neighbours if pair.other == name)
        other = self._last
        if pair.one != "absent":
            other = self.release(self.probes[pair.one].update)
        if not len(other) or pair.direction is None:
            return
        used = pair.direction != 0
        apart = (row - other)[used] / math.sqrt(2)
        along = float(apart @ pair.direction[used])
        self._shifts[name].add(along, max(float(apart @ apart) - along**2, 0.0), int(used.sum()) - 1)
        self._last = np.zeros(0)

    def _compare(self, row: np.ndarray) -> None:
        """Whether an earlier release of the same update was the same."""
        if len(self._same) >= _KEPT or not self.noisy.any():
            return
        count = len(self._same)
        reduced = row[self._compared] / np.maximum(self._size[self._compared], 1e-300)
        nearest = float(((self._reduced[:count] - reduced) ** 2).sum(1).min()) / 2
        self._reduced[count] = reduced
        self._same.append(row)
        self._equal = max(self._equal, _nearness(nearest, len(reduced), self.freedom, count * (count + 1) // 2))

    def _ask(self) -> None:
        """One message in each place."""
        canary = self.probes["a long update"].update
        for code, guesses, where in self._codes.values():
            message = self._draw.choice([-1.0, 1.0], code.bits)
            signs = np.zeros(len(where))
            signs[where] = code.written(message)
            row = self.release(self._signed(canary, signs))
            pair = next(pair for pair in self.neighbours if pair.other == "a long update")
            shift = pair.shift if pair.shift is not None else pair.direction
            assert shift is not None
            center = self._at["absent"].mean
            read = code.read((row - center)[where], np.sign(shift[where]))
            guesses.add(bool((read == message).all()))

    def _signed(self, canary: AuditedUpdate, signs: np.ndarray) -> AuditedUpdate:
        """The canary with the sign of each entry changed; entries that no release has are zeros."""
        update = {name: tensor.clone() for name, tensor in self.inputs.absent.items()}
        start = 0
        import torch

        for key, size in zip(self.keys, self.sizes, strict=True):
            tensor = canary.get(key)
            if tensor is not None and tensor.is_floating_point():
                unit = tensor[-1] if self.mechanism.records else tensor
                if unit.numel() == size:
                    sign = torch.from_numpy(signs[start : start + size]).reshape(unit.shape).to(unit.dtype)
                    if self.mechanism.records:
                        update[key][-1] = unit * sign
                    else:
                        update[key] = unit * sign
            start += size
        return update

    def _learn_direction(self) -> None:
        """The direction of least noise in some entries of each group, from releases so far."""
        offsets = np.concatenate([np.nonzero(self.part == group)[0] for group in range(self.groups)])
        some = self._draw.permutation(offsets)[: _SUBSET // 3]
        first = [
            np.nonzero(self.part == group)[0][: max(2, _SUBSET // (2 * self.groups))] for group in range(self.groups)
        ]
        chosen = np.unique(np.concatenate([some, *first]))
        direction = self._direction(self.probes["a long update"])
        if direction is not None:
            chosen = chosen[(direction[chosen] != 0) & self.noisy[chosen]]
        if len(chosen) < 2:
            return
        rows = np.stack(self._same)[:, chosen] / self._size[chosen]
        _, vectors = np.linalg.eigh(np.cov(rows.T))
        found = np.zeros(len(self.part))
        found[chosen] = vectors[:, 0] / self._size[chosen]
        found /= np.linalg.norm(found)
        self._weakest_direction = found
        self._weakest_seen = [float(row @ found) for row in self._same]
        canary = self.probes["a long update"].update
        sign = np.zeros(len(found))
        nonzero = direction is not None
        if nonzero:
            assert direction is not None
            sign[chosen] = found[chosen] / direction[chosen]
        update = self._signed(canary, sign)
        length = math.sqrt(sum(float(t.double().square().sum()) for t in update.values()))
        if not length:
            return
        factor = 1000 * self.promise.length / length
        update = {name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in update.items()}
        pair = self._apart(self.probes["absent"], Probe("a direction", update))
        if pair.shift is not None:
            self._weakest_shift = abs(float(pair.shift @ found)) * self.promise.distances

    def _take_direction(self, row: np.ndarray) -> None:
        assert self._weakest_direction is not None
        value, before = float(row @ self._weakest_direction), self._weakest_seen
        mean, count = float(np.mean(before)), len(before)
        variance = max(float(np.var(before, ddof=1)), (1e-9 * self.promise.length) ** 2)
        rest = (value - mean) * math.sqrt(count / (count + 1))
        recent = self._weakest.b[0] * 2, self._weakest.a[0] * 2
        learnt = (recent[0] + 4 * variance) / (recent[1] + 4)
        self._weakest.add(np.array([0.5]), np.array([rest**2 / 2]), np.array([1 / max(learnt, 1e-300)]))
        before.append(value)

    def _without_direction(self) -> float:
        cost = np.array([(self._weakest_shift * (1 - _TOLERATED)) ** 2])
        return self._weakest.against_enough(cost, max(self.promise.distance**2, 1e-300))

    # -- judging -------------------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """Evidence at which one of the hypotheses falls."""
        return math.log(max(len(self.hypotheses), 1) / self.alpha)

    def _judge(self) -> None:
        for one in self.hypotheses:
            if one.fell:
                continue
            value = one.log_e()
            one.highest = max(one.highest, min(value, MOST_EVIDENCE))
            if value >= self.threshold:
                one.fell = self.observations

    def bounds(self) -> dict[str, float]:
        """Lower bounds on ε, which hold together with probability 1 - α."""
        threshold = math.log((2 * self.groups + 2 + len(self._shifts)) / self.alpha)
        found = {}
        if self.kind in (GAUSSIAN, NO_NOISE) and not self.correlated:
            rates = [self._rates(pair, threshold) for pair in self.neighbours if pair.shift is not None]
            rates += [shift.least(threshold) for shift in self._shifts.values()]
            found["gaussian"] = self.promise.epsilon_of(max(rates, default=0.0))
        if self.kind == LAPLACE and not self.promise.delta and not self.correlated:
            least = max(
                (
                    sum(
                        np.abs(pair.shift[self.part == group]).sum() * self._at["absent"].scale.most(group, threshold)
                        for group in range(self.groups)
                    )
                    for pair in self.neighbours
                    if pair.shift is not None
                ),
                default=0.0,
            )
            found["laplace"] = self.promise.rounds * sampled_by(least, self.promise.rate)
        for code, guesses, _ in self._codes.values():
            if guesses.made:
                low = lower_limit(guesses.right, guesses.made, math.exp(-threshold)) - self.promise.alone[1]
                read = math.log(low) + code.bits * math.log(2) if low > 0 else 0.0
                found["messages"] = max(found.get("messages", 0.0), sampled_by(max(read, 0.0), self.promise.rate))
        return {name: float(min(max(value, 0.0), UNBOUNDED)) for name, value in found.items()}

    def _rates(self, pair: Neighbours, threshold: float) -> float:
        """μ of one release, at least."""
        assert pair.shift is not None
        squares = np.bincount(self.part, np.where(self.discrete, 0.0, pair.shift) ** 2, self.groups)
        scale = self._at["absent"].scale + self._at[pair.other].scale
        with np.errstate(over="ignore"):
            return math.sqrt(sum(squares[g] * scale.most(g, threshold) for g in np.nonzero(squares)[0].tolist()))

    def _note(self) -> None:
        """A point of the history; ever fewer of them."""
        apart = 1.15 if self.promise.rate == 1 else 1.6  # the accountant of sampled noise takes seconds
        if self.history and self.observations < apart * self.history[-1]["observations"]:
            return
        best = max(self.bounds().values(), default=0.0)
        self.history.append({"observations": self.observations, "epsilon": best})

    def _check(self) -> None:
        """Refuse to say anything of too few observations.

        Raises:
            FedtapError: no fault could have been found.
        """
        if any(one.fell for one in self.hypotheses):
            return
        needed = self.needed()
        if self.observations < needed:
            why = short(self.ended.removeprefix("The mechanism ").partition(": see")[0] or "time was over", 100)
            raise FedtapError(
                f"{self.observations} observations are too few to say anything ({why}): half the "
                f"noise that is needed would show after about {needed:,}, so allow as many calls or raise --seconds."
            )

    def needed(self) -> int:
        """Observations after which half of the noise that is needed would have been refuted."""
        if not self.hypotheses:
            return _FIRST + 4 * len(self.inputs.probes()) + 12
        fixed = _FIRST + 4 * len(self.probes)
        if self.still or self.kind != GAUSSIAN:
            each = max(int(self.counts.sum()), 1) * 0.3
            return fixed + math.ceil(2 * self.threshold / each) * max(len(self.probes) - 1, 1)
        # a mean of n differences has the deviation √(2/n) σ, and has to pass μσ while it is 2μσ
        return fixed + math.ceil(8 * (2 * self.threshold) / max(self.promise.distance, 1e-6) ** 2)

    def settings(self) -> dict[str, Any]:
        """How the mechanism was called, for audit_dp.json."""
        return {
            "kind": self.mechanism.kind,
            "entries": int(self.counts.sum()),
            "tensors": self.group_names,
            "examples": self.mechanism.records or None,
            "noise": self.kind,
            "same_noise_can_be_drawn_twice": self.still,
        }


def _nearness(near: float, size: int, freedom: float, pairs: int) -> float:
    """Evidence against independence of noise, where the nearest of so many pairs is so near.

    Args:
        near: sum of squares of half the differences, in deviations, over so many entries.
        freedom: how many independent entries are as good as all of a release; the noise of these may be correlated.
    """
    limit, log_chance = _equal_limit(max(int(min(size, freedom / 2)), 1))
    return 0.0 if near * min(freedom / 2 / size, 1.0) > limit else min(-log_chance - math.log(pairs), MOST_EVIDENCE)


def _freedom(rows: np.ndarray) -> float:
    """How many independent entries are as good as these, from the spread of distances between releases (Satterthwaite);
    1 at least."""
    size = rows.std(0, ddof=1)
    if not rows.shape[1] or not (size > 0).any():
        return 1.0
    scaled = rows[:, size > 0] / size[size > 0]
    lengths = (scaled**2).sum(1)
    apart = (lengths[:, None] + lengths - 2 * scaled @ scaled.T)[np.triu_indices(len(rows), 1)]
    spread = float(apart.var())
    return max(min(2 * float(apart.mean()) ** 2 / spread if spread > 0 else math.inf, float(scaled.shape[1])), 1.0)


@lru_cache(maxsize=64)
def _equal_limit(size: int) -> tuple[float, float]:
    """The squared distance below which two releases count as equal, and the logarithm of its probability."""
    limit = min(size / 2, float(chi2.ppf(_EQUAL, size)))
    return limit, max(float(chi2.logcdf(limit, size)), -2 * MOST_EVIDENCE)


def _kind(rest: np.ndarray, independent: float) -> str:
    """The kind of noise of residuals, each entry by its own deviation; one of the four.

    Args:
        independent: how many independent residuals are as good as these.
    """
    size = rest.std(0, ddof=1)
    if not rest.size or not (size > 0).any():
        return NO_NOISE
    values = (rest / size)[:, size > 0].reshape(-1)
    doubt = 6 / math.sqrt(min(len(values), independent))
    flat = float(np.abs(values).mean())  # √(2/π) = 0.798 of Gaussian noise, 1/√2 of Laplace's, 0.866 of uniform noise
    excess = float((values**4).mean()) - 3
    # few releases an entry make its own deviation uncertain: of n the fourth moment is 3 (n - 1) / (n + 1) and not 3
    if abs(flat - 0.798) <= 0.012 + doubt and abs(excess) <= 0.35 + 10 * doubt:
        return GAUSSIAN
    if abs(flat - 0.715) <= 0.02 + doubt and 0.8 - 20 * doubt <= excess <= 4.0 + 20 * doubt:
        return LAPLACE
    return OTHER_NOISE
