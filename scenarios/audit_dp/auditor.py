"""An auditor: it asks a mechanism for releases of neighbours, and holds every hypothesis against what it gets.

Hypotheses about Gaussian or Laplace noise are tested where the noise that was measured is such noise; what is read of
hidden messages is evidence against every (ε, δ)-differentially private mechanism, whatever its noise is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedtap.scenarios.audit_dp.messages import HiddenMessages
from fedtap.scenarios.audit_dp.noise import FIRST, GAUSSIAN, LAPLACE, NO_NOISE, entries_of, freedom_of, noise_kind_of
from fedtap.scenarios.audit_dp.probes import LONG, AuditInputs, Probe
from fedtap.scenarios.audit_dp.promise import Promise
from fedtap.scenarios.audit_dp.releases import Hypothesis, Neighbours, NoiseResiduals
from fedtap.scenarios.audit_dp.repeats import Repeats
from fedtap.scenarios.audit_dp.seeds import FEW_BITS, same_noise, seeds_of, seeds_seen, standing
from fedtap.scenarios.audit_dp.target import AuditedUpdate, Mechanism, RaisedError, quiet
from fedtap.scenarios.audit_dp.weakest_direction import WeakestDirection
from fedtap.simulator.auditing.allowed import laplace_limit, largest_ratio
from fedtap.simulator.auditing.epsilon_bounds import UNBOUNDED
from fedtap.simulator.auditing.evidence import MOST_EVIDENCE, MeanShift, against_equal
from fedtap.simulator.defences.gaussian import sampled_by
from fedtap.simulator.errors import FedtapError, short

_FEWEST, ENOUGH, _PATIENT = 400, 1500, 12_000
"""Releases after which an audit ends: if something was refuted, if nothing was, and if nothing was and how far
neighbours lie apart can only be found by averaging."""

_TOLERATED = 2e-3
"""Share by which noise may be smaller than it has to be: promises are made with so many digits."""

_INDEPENDENT = 0.25
"""Share of the entries that have to be independent, as far as distances of releases tell."""

_LEARNT = 220
"""Releases from which the direction of least noise is learnt."""


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
        self.sizes: dict[str, int] = {}
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
        self._shifts: dict[str, MeanShift] = {}
        self._last: np.ndarray = np.zeros(0)
        self._messages: dict[str, HiddenMessages] = {}
        self._weakest = WeakestDirection()
        self.ended = ""

    # -- releases ------------------------------------------------------------------------------------------------------

    def release(self, update: AuditedUpdate) -> np.ndarray:
        """One observation, all entries in a row.

        Raises:
            FedtapError: the mechanism raises, or sends another number of entries than before.
        """
        out = self.mechanism.release(update)
        self.observations += 1
        if not self.sizes:
            self.sizes = {key: len(entries) for key, entries in out.items()}
        if list(out) != list(self.sizes) or [len(entries) for entries in out.values()] != list(self.sizes.values()):
            raise FedtapError(
                "The mechanism sends entries of other names or shapes from call to call, which is no release of one "
                "update and may itself tell of the data: send the same tensors every time."
            )
        return np.concatenate(list(out.values())) if self.sizes else np.zeros(0)

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
            self.sizes = {}
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
        while len(first) < FIRST:
            first.append(self.release(self.inputs.absent))
        rows = np.stack(first)
        if not np.isfinite(rows).all():
            raise FedtapError(
                "The mechanism sends numbers that are not finite for an update of zeros: see what it divides by."
            )
        self.entries = entries_of(rows, list(self.sizes), list(self.sizes.values()))
        noisy = self.entries.noisy
        freedom = freedom_of(rows[:, noisy])
        self.kind = noise_kind_of((rows - rows.mean(0))[:, noisy], freedom * len(rows))
        least = (1e-9 * self.promise.length) ** 2
        self.residuals = NoiseResiduals(rows, self.entries, self.kind == LAPLACE, least)
        self.correlated = freedom < _INDEPENDENT * noisy.sum()
        self._repeats = Repeats(rows, noisy, self.residuals.size, freedom, self._draw)
        for row in rows:
            self.largest_norm = max(self.largest_norm, float(np.linalg.norm(row)))
        if self._theirs is not None:
            self._repeats.compare_with(self._theirs, 6)

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
        self.residuals.begin(self.probes)

    def _steady(self) -> bool:
        """Whether the same noise can be drawn twice."""
        with same_noise(1, self.mechanism.generators):
            one = self.release(self.inputs.absent)
        with same_noise(1, self.mechanism.generators):
            other = self.release(self.inputs.absent)
        return bool(np.array_equal(one, other))

    def _apart(self, one: Probe, other: Probe) -> Neighbours:
        """The shift between two inputs, which has to be the same under two draws of the noise."""
        direction = self._unit_direction(other)
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

    def _unit_direction(self, probe: Probe) -> np.ndarray | None:
        return self.inputs.direction(probe, self.sizes)

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
        for key, messages in self._messages.items():
            self._add(f"messages in {key} are not read", "read", messages.log_e)
        self._add("no two releases have the same noise", "repeated", lambda: self._repeats.equal)
        self._add("another client's process has other noise", "shared", lambda: self._repeats.shared)
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
        eased = np.where(self.entries.discrete, 0.0, np.abs(shift)) * (1 - _TOLERATED)
        if self.kind == LAPLACE:
            return self.entries.sums(eased), laplace_limit(eased, *self.promise.alone)
        return self.entries.sums(eased**2), max(self.promise.distance**2, 1e-300)

    def _enough(self, pair: Neighbours) -> Callable[[], float]:
        assert pair.shift is not None
        cost, most = self._cost(pair.shift)
        names = {"absent", pair.one, pair.other}
        return lambda: self.residuals.scale_of(names).against_enough(cost, most)

    def falls_without(self, probe: str, weak: np.ndarray) -> bool:
        """Whether there is too little noise for a probe even if some groups of entries were not sent."""
        pair = next(pair for pair in self.neighbours if pair.other == probe)
        if pair.shift is None:
            return True
        cost, most = self._cost(np.where(weak[self.entries.part], 0.0, pair.shift))
        return self.residuals.scale_of({"absent", pair.one, pair.other}).against_enough(cost, most) >= self.threshold

    def _alike(self, probe: str) -> Callable[[], float]:
        each = 1.0 if self.kind == LAPLACE else 0.5

        rounded = self.entries.sums(self.entries.discrete) > 0

        def ratio(group: int) -> float:
            if rounded[group]:
                return 1e100
            epsilon, delta, rounds = self.promise.alone
            size = each * self.entries.counts[group] * rounds
            return (1 + _TOLERATED) * largest_ratio(size, epsilon, delta, self.promise.rate < 1)

        return lambda: against_equal(self.residuals.at["absent"].scale, self.residuals.at[probe].scale, ratio)

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
        pair = next(pair for pair in self.neighbours if pair.other == "a long update")
        shift = pair.shift if pair.shift is not None else pair.direction
        direction = self._unit_direction(self.probes["a long update"])
        if shift is None or direction is None:
            return
        epsilon, delta, _ = self.promise.alone
        places = {"a whole update": direction != 0, "entries without noise": (direction != 0) & ~self.entries.noisy}
        if places["entries without noise"].sum() == places["a whole update"].sum():
            del places["entries without noise"]
        for key, where in places.items():
            if where.sum() >= 2:
                self._messages[key] = HiddenMessages(where, np.sign(shift[where]), epsilon, delta, self._draw)

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
            if turn * 2 >= _LEARNT and self._weakest.direction is None and self.kind == GAUSSIAN and self.still:
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
        if name == "absent":
            self._repeats.add(row)
            if self._weakest.direction is not None:
                self._weakest.add(row, self.residuals.least)
        elif name in self._shifts:
            self._take_shift(name, row)
        self.residuals.add(name, row, self._shift_of(name) if self.kind == LAPLACE else None)
        if name == "absent":
            self._last = row

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

    def _ask(self) -> None:
        """One message in each place."""
        canary = self.probes["a long update"].update
        for messages in self._messages.values():
            message, signs = messages.drawn()
            row = self.release(self.inputs.signed(canary, signs, self.sizes))
            messages.read(message, row - self.residuals.at["absent"].mean)

    def _learn_direction(self) -> None:
        """The direction of least noise, and how far neighbours lie apart along it."""
        long = self.probes["a long update"]
        signs = self._weakest.learn(
            np.stack(self._repeats.rows), self.entries, self.residuals.size, self._unit_direction(long), self._draw
        )
        if signs is None:
            return
        update = self.inputs.signed(long.update, signs, self.sizes)
        length = math.sqrt(sum(float(t.double().square().sum()) for t in update.values()))
        if not length:
            return
        factor = LONG * self.promise.length / length
        update = {name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in update.items()}
        pair = self._apart(self.probes["absent"], Probe("a direction", update))
        if pair.shift is not None:
            self._weakest.shift = abs(float(pair.shift @ self._weakest.direction)) * self.promise.distances

    def _without_direction(self) -> float:
        cost = (self._weakest.shift * (1 - _TOLERATED)) ** 2
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
        threshold = math.log((2 * self.entries.groups + 2 + len(self._shifts)) / self.alpha)
        found = {}
        if self.kind in (GAUSSIAN, NO_NOISE) and not self.correlated:
            rates = [self._rates(pair, threshold) for pair in self.neighbours if pair.shift is not None]
            rates += [shift.least(threshold) for shift in self._shifts.values()]
            found["gaussian"] = self.promise.epsilon_of(max(rates, default=0.0))
        if self.kind == LAPLACE and not self.promise.delta and not self.correlated:
            least = max(
                (
                    sum(
                        np.abs(pair.shift[self.entries.part == group]).sum()
                        * self.residuals.at["absent"].scale.most(group, threshold)
                        for group in range(self.entries.groups)
                    )
                    for pair in self.neighbours
                    if pair.shift is not None
                ),
                default=0.0,
            )
            found["laplace"] = self.promise.rounds * sampled_by(least, self.promise.rate)
        for messages in (one for one in self._messages.values() if one.asked):
            read = messages.least(math.exp(-threshold), self.promise.alone[1])
            found["messages"] = max(found.get("messages", 0.0), sampled_by(read, self.promise.rate))
        return {name: float(min(max(value, 0.0), UNBOUNDED)) for name, value in found.items()}

    def _rates(self, pair: Neighbours, threshold: float) -> float:
        """μ of one release, at least."""
        assert pair.shift is not None
        squares = self.entries.sums(np.where(self.entries.discrete, 0.0, pair.shift) ** 2)
        scale = self.residuals.at["absent"].scale + self.residuals.at[pair.other].scale
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
            return FIRST + 4 * len(self.inputs.probes()) + 12
        fixed = FIRST + 4 * len(self.probes)
        if self.still or self.kind != GAUSSIAN:
            each = max(int(self.entries.counts.sum()), 1) * 0.3
            return fixed + math.ceil(2 * self.threshold / each) * max(len(self.probes) - 1, 1)
        # a mean of n differences has the deviation √(2/n) σ, and has to pass μσ while it is 2μσ
        return fixed + math.ceil(8 * (2 * self.threshold) / max(self.promise.distance, 1e-6) ** 2)

    def settings(self) -> dict[str, Any]:
        """How the mechanism was called, for audit_dp.json."""
        return {
            "kind": self.mechanism.kind,
            "entries": int(self.entries.counts.sum()),
            "tensors": self.entries.names,
            "examples": self.mechanism.records or None,
            "noise": self.kind,
            "same_noise_can_be_drawn_twice": self.still,
        }
