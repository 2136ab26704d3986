"""Which fault it is that makes hypotheses fall, in a sentence that says what to change.

Evidence says that the promise does not hold. Its name is found by what else was measured: the noise's deviation beside
that of formulas that are mistaken for the right one, the norm of long updates after the clip, entries without noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedtap.scenarios.audit_dp.auditor import Auditor
from fedtap.scenarios.audit_dp.noise import LAPLACE, NO_NOISE
from fedtap.scenarios.audit_dp.probes import LONG
from fedtap.scenarios.audit_dp.promise import Promise
from fedtap.scenarios.audit_dp.releases import Hypothesis
from fedtap.scenarios.audit_dp.seeds import FEW_BITS, seeds_of
from fedtap.scenarios.audit_dp.target import MOD
from fedtap.simulator.auditing.allowed import laplace_limit

_NEAR = 0.015
"""Share by which a deviation may differ from a formula's to be taken for it."""

_OVER = 1.05
"""Factor by which a shift passes the clip at least, where the clip is blamed."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    fault: str
    """Its name."""
    sentence: str
    """What it is, and what to change."""
    observations: int
    """Releases after which it was found."""
    e_value: float
    """Evidence; at most one honest mechanism of so many shows so much."""
    found: float | None = None
    """The number that is there: a deviation or a length."""
    needed: float | None = None
    """The number that would be right."""


def faults_of(auditor: Auditor) -> list[Fault]:
    """Every fault that was found, the one with the most evidence first; none where nothing was refuted."""
    fallen = [one for one in auditor.hypotheses if one.fell]
    return _Naming(auditor, fallen).faults() if fallen else []


class _Naming:
    """The fallen hypotheses, each of which is explained once."""

    def __init__(self, auditor: Auditor, fallen: Sequence[Hypothesis]) -> None:
        self.auditor, self.fallen, self.promise = auditor, fallen, auditor.promise
        self.left = list(fallen)
        self.weak = self._weak()

    def faults(self) -> list[Fault]:
        steps: list[Callable[[], Iterator[Fault]]] = [
            self._seeds, self._reused, self._undefended, self._clip,
            self._scale, self._noise, self._direction, self._rest,
        ]  # fmt: skip
        found = [fault for step in steps for fault in step()]
        return sorted(found, key=lambda fault: (fault.observations, -fault.e_value))

    def _take(self, *kinds: str, probes: Sequence[str] | None = None, name: str = "") -> list[Hypothesis]:
        """Hypotheses of these kinds that have fallen, which are explained by this."""
        taken = [
            one
            for one in self.left
            if one.fault in kinds and (probes is None or one.probe in probes) and (not name or name in one.name)
        ]
        self.left = [one for one in self.left if one not in taken]
        return taken

    def _fault(self, name: str, sentence: str, because: Sequence[Hypothesis], **numbers: float) -> Fault:
        because = because or self.fallen
        return Fault(
            name,
            sentence,
            min(one.fell for one in because),
            math.exp(max(one.highest for one in because)),
            **numbers,
        )

    # -- where noise comes from ----------------------------------------------------------------------------------------

    def _seeds(self) -> Iterator[Fault]:
        if shared := self._take("shared"):
            yield self._fault(
                "seed_shared_by_clients",
                "Two clients draw the same noise, since both seed it alike: the difference of their updates has none; "
                "draw noise from the operating system's generator, and share no seed between clients.",
                shared,
            )
        if few := self._take("seed"):
            seeds = {seed for call in self.auditor.seeds for seed in call}
            seeds = seeds or set(seeds_of(self.auditor.mechanism.generators))
            how = f"the one seed {next(iter(seeds))}" if len(seeds) == 1 else f"seeds such as {min(seeds)}"
            yield self._fault(
                "few_bit_seed",
                f"Noise is drawn from seeds of {FEW_BITS} bits or fewer ({how}): whoever tries all of them, or is told "
                "the seed that clients share, takes the noise off; draw noise from the operating system's generator.",
                few,
            )

    def _still(self) -> np.ndarray:
        """Entries whose noise is the same in each call: not zero without a unit, and without variance."""
        center = self.auditor.residuals.center
        still: np.ndarray = (~self.auditor.entries.noisy) & (np.abs(center) > 1e-6 * self.promise.length)
        moved: np.ndarray = still & self._moved()
        return moved

    def _moved(self) -> np.ndarray:
        """Entries that differ between neighbours."""
        moved = np.zeros(len(self.auditor.entries.part), dtype=bool)
        for pair in self.auditor.neighbours:
            if pair.shift is not None:
                moved |= pair.shift != 0
        return moved

    def _reused(self) -> Iterator[Fault]:
        repeated = self._take("repeated")
        still = self._still()
        if repeated or still.any():
            where = "" if repeated or still.all() else f" in {self._names(still)}"
            because = repeated
            if still.any():
                about = self._probes_of(still)
                because = because + self._take("noise", "read", "direction", "scale", probes=[*about, ""])
                if still.sum() > 0.5 * len(still):
                    because = because + self._take("noise", "read", "direction", "scale")
            yield self._fault(
                "noise_reused",
                f"The same noise is used again{where} from call to call, over rounds and clients, so that it cancels "
                "in differences: it is stored, or drawn from a seed that is fixed or shared; draw fresh noise for "
                "every release from the operating system's generator.",
                because,
            )
        elif self.auditor.kind == NO_NOISE and (self._sigmas("a long update") or 0.0) > 1e-6 * self.promise.length:
            because = self._take("noise", "read")
            yield self._fault(
                "scale_depends_on_data",
                "The scale of the noise tells neighbours apart: there is none without an update, and some with one; "
                "draw noise of one constant σ, whatever the update is.",
                because,
            )
        elif self.auditor.kind == NO_NOISE and any(one.fault in ("noise", "read") for one in self.left):
            because = [one for one in self.left if one.fault in ("noise", "read")]
            sigma = self._needed_sigma()
            how = f"add Gaussian noise of σ = {sigma:.4g} to every entry" if sigma else "clip, and add noise"
            if self.auditor.mechanism.kind == MOD:
                how += " (what a strategy adds on the server hides nothing from the server)"
            yield self._fault(
                "no_noise",
                f"No noise is added: the same update is sent the same each time, so ε is infinite; {how}.",
                because,
                found=0.0,
                **({"needed": sigma} if sigma else {}),
            )
            self._keep_clip_alone()

    def _keep_clip_alone(self) -> None:
        """Without noise nothing else about noise is worth a sentence, but a missing clip is."""
        grown = self._grown()
        if grown is None or grown < 0.2 * LONG * self.promise.length:
            self.left = []

    # -- the clip ------------------------------------------------------------------------------------------------------

    def _grown(self) -> float | None:
        """By how much a long update moves the release, where that is more than the clip allows; None where not."""
        length = self._length("a long update")
        allowed = self.promise.length * self.promise.distances
        if self.promise.clip is None and length < 0.2 * LONG * allowed:
            return None
        return length if length > _OVER * allowed else None

    def _length(self, probe: str) -> float:
        """Distance of this probe's release from its neighbour's."""
        pair = next((pair for pair in self.auditor.neighbours if pair.other == probe), None)
        if pair is None:
            return 0.0
        if pair.shift is not None:
            return float(np.linalg.norm(pair.shift[~self.weak[self.auditor.entries.part]]))
        one, other = self.auditor.residuals.at[pair.one], self.auditor.residuals.at[pair.other]
        if not one.count or not other.count or pair.direction is None:
            return 0.0
        along = float((other.mean - one.mean) @ pair.direction)
        spread = float(np.median(self.auditor.residuals.size)) * math.sqrt(1 / one.count + 1 / other.count)
        return max(abs(along) - 4 * spread, 0.0)

    def _clip(self) -> Iterator[Fault]:
        kinds = ("noise", "read", "direction")
        if not any(one.fault in (*kinds, "scale") for one in self.left):
            return
        clip, length = self.promise.clip, self._grown()
        if length is not None and any(one.fault in kinds for one in self.left):
            because = self._take(*kinds)
            allowed = (clip or self.promise.length) * self.promise.distances
            alone = {name: self._length(name) for name in self.auditor.probes if name.endswith(" alone")}
            loose = [name.split()[3] for name, moved in alone.items() if moved > 0.2 * LONG * allowed]
            if length > 0.2 * LONG * allowed or loose:
                where = f" in {_listed(loose)}" if loose and len(loose) < len(self.auditor.inputs.floats) else ""
                named = f"to {clip:g}" if clip else "to a norm that is named, --clip"
                yield self._fault(
                    "clip_skipped",
                    f"Nothing is clipped{where}: an update of norm {LONG * self.promise.length:g} moves what is sent "
                    f"by {length:.4g}, so no noise bounds ε, which is infinite; clip the whole update {named} before "
                    "the noise is added.",
                    because,
                    found=length,
                    needed=allowed,
                )
            else:
                tensors = len(self.auditor.inputs.floats)
                how = (
                    f"each of the {tensors} tensors is clipped by itself, and together they are √{tensors} times as "
                    "long"
                    if abs(length / (math.sqrt(tensors) * allowed) - 1) < 0.02
                    else "the clip is not that of the whole update's L2 norm"
                )
                yield self._fault(
                    "clip_too_long",
                    f"Neighbours lie {length:.4g} apart where the clip allows {allowed:.4g}: {how}; clip the norm of "
                    "all tensors together.",
                    because,
                    found=length,
                    needed=allowed,
                )
        elif clip and self.auditor.largest_norm <= 1.01 * clip and self._vanishing():
            because = self._take(*kinds, "scale")
            yield self._fault(
                "clip_after_noise",
                f"The clip comes after the noise: nothing longer than {clip:g} is ever sent, and a long update drowns "
                "the noise before it is shortened; clip first, then add noise, and clip nothing afterwards.",
                because,
            )

    def _vanishing(self) -> bool:
        """Whether the noise on a long update is less than that on none."""
        own = self._sigmas("a long update")
        return own is not None and own < 0.5 * float(np.sqrt(np.mean(self.auditor.residuals.size**2)))

    def _sigmas(self, probe: str) -> float | None:
        """Deviation of all entries of this probe's releases together."""
        at = self.auditor.residuals.at.get(probe)
        return None if at is None or not at.freedom.sum() else math.sqrt(at.squares.sum() / at.freedom.sum())

    # -- entries -------------------------------------------------------------------------------------------------------

    def _group_sigmas(self) -> np.ndarray:
        times, squares = self.auditor.residuals.pooled
        sigmas: np.ndarray = np.sqrt(squares / (times * self.auditor.entries.counts))
        return sigmas

    def _weak(self) -> np.ndarray:
        """Groups of entries that move with an update, and whose noise is far less than is usual."""
        sigmas, counts = self._group_sigmas(), self.auditor.entries.counts
        usual = float(np.sqrt((sigmas**2 * counts).sum() / counts.sum()))
        moved = np.bincount(self.auditor.entries.part, self._moved(), self.auditor.entries.groups) > 0
        weak = moved & (sigmas < 0.2 * usual)
        return weak if not weak.all() else np.zeros_like(weak)

    def _undefended(self) -> Iterator[Fault]:
        weak = self.weak
        if not weak.any():
            return
        because = self._take("read", name="entries without noise")
        for one in [one for one in self.left if one.fault == "noise"]:
            if not self.auditor.falls_without(one.probe, weak):
                because.append(one)
                self.left.remove(one)
        if not because:
            return
        self._take("direction")
        if not any(one.fault == "noise" for one in self.left):
            self._take("read")
        sigmas = self._group_sigmas()
        without = [self.auditor.entries.names[group] for group in np.nonzero(weak)[0]]
        most, usual = float(sigmas[weak].max()), float(np.median(sigmas[~weak]))
        how = "without any noise" if not most else f"with noise of σ = {most:.2g} where others have {usual:.3g}"
        yield self._fault(
            "undefended_entries",
            f"{_listed(without)} travel{'s' * (len(without) == 1)} {how}: clip and noise every entry that is sent, "
            "buffers, counters and metrics included, or do not send it.",
            because,
            found=most,
            needed=usual,
        )

    def _probes_of(self, entries: np.ndarray) -> list[str]:
        """Probes that are all in tensors of these entries."""
        names = {
            self.auditor.entries.names[group].rpartition(" ")[2] for group in set(self.auditor.entries.part[entries])
        }
        return [name for name, probe in self.auditor.probes.items() if probe.about in names]

    def _names(self, entries: np.ndarray) -> str:
        return _listed([self.auditor.entries.names[group] for group in sorted(set(self.auditor.entries.part[entries]))])

    # -- scale ---------------------------------------------------------------------------------------------------------

    def _scale(self) -> Iterator[Fault]:
        because = self._take("scale")
        if not because:
            return
        worst = max(because, key=lambda one: abs(math.log(max(self._ratio(one.probe), 1e-12))))
        absent, own = self._sigmas("absent") or 0.0, self._sigmas(worst.probe) or 0.0
        if worst.probe.endswith(" examples"):
            mechanism = self.auditor.mechanism
            many = mechanism.records or int(mechanism.template[mechanism.counts[0]])
            what = f"{worst.probe} get noise of σ = {own:.4g} and {many} of {absent:.4g}"
        else:
            what = f"σ = {own:.4g} with {worst.probe} and {absent:.4g} without it"
        yield self._fault(
            "scale_depends_on_data",
            f"The scale of the noise tells neighbours apart: {what}; choose σ, and what sums are divided by, "
            "beforehand as constants, from no batch size, count or norm of the data.",
            because,
            found=own,
            needed=absent,
        )

    def _ratio(self, probe: str) -> float:
        absent, own = self._sigmas("absent"), self._sigmas(probe)
        return own / absent if absent and own else 1e-12

    # -- size of the noise ---------------------------------------------------------------------------------------------

    def _noise(self) -> Iterator[Fault]:
        pure = self._take("pure")
        if pure:
            self._take("noise", "direction")
            yield self._fault(
                "gaussian_at_delta_0",
                "δ = 0 is promised, and no Gaussian noise gives that at any ε: promise a δ such as 1e-5, or add "
                "Laplace noise for the L1 distance of neighbours.",
                pure,
            )
        because = self._take("noise")
        if not because:
            return
        because += self._take("read")
        if self.auditor.kind == LAPLACE:
            yield self._of_laplace(because)
            return
        most = max(self._shortage(one.probe) for one in because if one.probe)
        usual = [one for one in because if one.probe and self._shortage(one.probe) > 0.7 * most]
        worst = next((one for one in usual if one.probe == "a long update"), usual[0])
        distance, sigma = self._distance_and_sigma(worst.probe)
        needed = self.promise.sigma(distance)
        self._take("direction")
        fault, why = self._explained(distance, sigma, needed)
        yield self._fault(
            fault,
            f"{why} Noise of σ = {sigma:.4g} is there, and ε = {self.promise.epsilon:g} at δ = {self.promise.delta:g} "
            f"needs {needed:.4g} for neighbours that lie {distance:.4g} apart"
            + (f" in each of {self.promise.rounds} rounds" if self.promise.rounds > 1 else "")
            + f": use σ = {needed:.4g}.",
            because,
            found=sigma,
            needed=needed,
        )

    def _needed_sigma(self) -> float | None:
        announced = self.promise.announced
        return self.promise.sigma(announced) if announced and self.promise.delta else None

    def _distance_and_sigma(self, probe: str) -> tuple[float, float]:
        """How far neighbours lie apart, and the deviation that the noise has on the way between them."""
        distance = self._length(probe)
        pair = next(pair for pair in self.auditor.neighbours if pair.other == probe)
        sigmas = self._group_sigmas()
        vector = pair.shift if pair.shift is not None else pair.direction
        if vector is None or not distance:
            return distance, float(np.median(sigmas))
        squares = np.bincount(self.auditor.entries.part, vector**2, self.auditor.entries.groups)
        with np.errstate(divide="ignore", invalid="ignore"):
            weighed = np.where(squares > 0, squares / sigmas**2, 0.0).sum()
        sigma = math.sqrt(squares.sum() / weighed) if math.isfinite(weighed) and weighed > 0 else 0.0
        if pair.shift is None and (shift := self.auditor._shifts.get(probe)) is not None and shift.seen:
            distance = abs(shift.along) / shift.seen * math.sqrt(2)
        return distance, sigma

    def _shortage(self, probe: str) -> float:
        distance, sigma = self._distance_and_sigma(probe)
        return distance / max(sigma, 1e-300)

    def _explained(self, distance: float, sigma: float, needed: float) -> tuple[str, str]:
        """The name of the fault and a sentence, by the formula that gives the deviation that is there."""
        matches = sorted(
            (cost, fault, why)
            for cost, value, fault, why in _formulas(self.promise, distance, sigma)
            if self.auditor.still or cost < 1.5  # of averages no odd number is read
            if value and abs(sigma / value - 1) <= _NEAR
        )
        if matches:
            cost, fault, why = matches[0]
            also = [_ALSO[other] for price, other, _ in matches[1:] if other != fault and price < min(1.5, cost + 0.6)]
            more = f" ({_listed(list(dict.fromkeys(also))[:2])} would be the same.)" if also else ""
            return fault, why + more
        share = sigma / needed
        return "noise_too_small", f"The noise is {share:.3g} of what the promise needs."

    def _of_laplace(self, because: Sequence[Hypothesis]) -> Fault:
        def excess(probe: str) -> tuple[float, float, float]:
            pair = next(pair for pair in self.auditor.neighbours if pair.other == probe)
            assert pair.shift is not None
            total = float(np.abs(pair.shift).sum())
            limit = laplace_limit(pair.shift, *self.promise.alone)
            return total / limit, total, limit

        worst = max((one for one in because if one.probe), key=lambda one: excess(one.probe)[0])
        needed, total, _ = excess(worst.probe)
        at = self.auditor.residuals.at["absent"]
        scale = float(at.squares.sum() / max(at.freedom.sum(), 1))
        share, name, why = scale / needed, "noise_too_small", f"The noise is {scale / needed:.3g} of what is needed."
        single = next((excess(one.name)[1] for one in self.auditor.probes.values() if "single" in one.name), total)
        if self.promise.clip and total > 1.5 * single:
            name = "clip_too_long"
            why = f"The clip bounds the L2 norm, and Laplace noise has to hide an L1 distance, which is {total:.4g}."
        elif self.promise.rounds > 1 and abs(share * self.promise.rounds - 1) < _NEAR:
            name, why = "rounds_not_composed", f"The noise is enough for one of the {self.promise.rounds} rounds alone."
        elif self.promise.distances == 2 and abs(share * 2 - 1) < _NEAR:
            name, why = (
                "add_remove_sold_as_replacement",
                "The noise is that of add/remove, and neighbours are replaced.",
            )
        return self._fault(
            name,
            f"{why} Laplace noise of scale {scale:.4g} is there, and ε = {self.promise.epsilon:g} needs {needed:.4g} "
            f"for neighbours whose L1 distance is {total:.4g}: use scale {needed:.4g}.",
            because,
            found=scale,
            needed=needed,
        )

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _direction(self) -> Iterator[Fault]:
        if because := self._take("direction"):
            yield self._fault(
                "noise_correlated",
                "The noise of the entries is not independent: there is a direction in which it is too small, so that "
                "an update along it is seen; draw noise for every entry by itself.",
                because,
            )

    def _rest(self) -> Iterator[Fault]:
        if because := self._take("read"):
            yield self._fault(
                "update_read",
                "Messages hidden in updates are read more often than any mechanism of this ε and δ allows: look at the "
                "clip, at the noise, and at what else is sent.",
                because,
            )


_ALSO = {
    "noise_too_small": "Half of the right noise",
    "rounds_not_composed": "Noise that is enough for one round",
    "add_remove_sold_as_replacement": "Noise for add/remove",
    "classical_formula": "The classical formula's noise",
    "sensitivity_too_small": "Noise for a smaller sensitivity",
    "sensitivity_of_average": "Noise for an average's sensitivity",
}
"""Fault -> the noise that it comes with."""


def _listed(names: Sequence[str]) -> str:
    some = ", ".join(names[:4])
    return some + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _formulas(promise: Promise, distance: float, sigma: float) -> Iterator[tuple[float, float, str, str]]:
    """(cost, σ, fault, sentence) of formulas that are taken for the right one; the cheapest that fits is named.

    The classical formula is σ = Δ √(2 ln(1.25/δ)) / ε, which is proved for ε below 1 alone (Dwork and Roth 2014,
    theorem A.1).
    """
    classical = math.sqrt(2 * math.log(1.25 / promise.delta)) / promise.epsilon

    def exact(length: float, rounds: int) -> float:
        return promise.sigma(length, rounds)

    told = promise.sensitivity
    lengths: list[tuple[float, float, str, str]] = [(0.0, distance, "", "")]
    if promise.distances == 2:
        why = (
            "The noise is that of add/remove, where neighbours lie one clip apart, and the promise is about "
            "replacement, where they lie two apart."
        )
        lengths.append((1.0, distance / 2, "add_remove_sold_as_replacement", why))
    near_half = promise.distances == 2 and told is not None and abs(2 * told / distance - 1) < _NEAR
    if told is not None and told < distance * (1 - _NEAR) and not near_half:
        lengths.append((0.9, told, *_of_sensitivity(promise, told, distance)))
    every = [(0.0, promise.rounds, "", "")]
    if promise.rounds > 1:
        why = f"The noise is enough for one round, and the promise is about all {promise.rounds} rounds together."
        every.append((1.0, 1, "rounds_not_composed", why))
    for length_cost, length, length_fault, length_why in lengths:
        for round_cost, rounds, round_fault, round_why in every:
            for formula in ("exact", "classical"):
                value = exact(length, rounds) if formula == "exact" else classical * length * math.sqrt(rounds)
                cost, fault, why = length_cost + round_cost, length_fault or round_fault, length_why or round_why
                if formula == "classical":
                    cost += 0.55
                    fault = fault or "classical_formula"
                    why = why or (
                        f"The noise is that of the classical formula σ = Δ √(2 ln(1.25/δ)) / ε, which is proved for ε "
                        f"below 1 alone and too small at ε = {promise.epsilon:g}."
                    )
                if cost:
                    yield cost, value, fault, why
                yield cost + 1.2, value / 2, fault or "noise_too_small", why or "The noise is half of what is needed."
    right = exact(distance, promise.rounds)
    yield 1.4, right**2, "noise_too_small", "The variance that is needed was taken for the standard deviation."
    yield 1.4, math.sqrt(right), "noise_too_small", "The root of the standard deviation was taken in its place."
    for rounds in {1, promise.rounds} if sigma > 0 else ():
        for unit in (promise.sigma(1.0, rounds), classical * math.sqrt(rounds)):
            implied = sigma / unit
            if implied < 0.6 * distance / max(promise.distances, 1):
                about = _round_number(implied, promise)
                if about is not None:
                    yield 1.6, sigma, *_of_sensitivity(promise, about, distance)


def _of_sensitivity(promise: Promise, told: float, distance: float) -> tuple[str, str]:
    """The name and the sentence for noise that is scaled to a sensitivity that is not there."""
    clip = promise.clip or promise.length
    count = 2 * clip / told
    whole = count >= 3 and abs(count - round(count)) < 1e-3 * count
    power = abs(math.log10(told / clip) - round(math.log10(told / clip))) < 1e-6
    if whole and not (power and told <= 1e-3 * clip):
        return (
            "sensitivity_of_average",
            f"The noise is for a sensitivity of {told:.4g} = 2 × clip / {round(count)}, that of an average of "
            f"{round(count)} clipped vectors, and here the average itself is clipped, so that one {promise.unit} moves "
            f"it by {distance:.4g}: clip before averaging.",
        )
    return (
        "sensitivity_too_small",
        f"The noise is for a sensitivity of {told:.4g}, and at a clip of {clip:g} neighbours lie {distance:.4g} apart.",
    )


_WRITTEN = (*range(3, 13), 16, 20, 24, 25, 30, 32, 40, 50, 60, 64, 100, 128, 200, 250, 256, 500, 512, 600, 1000, 1024)
"""Numbers of examples that are often written."""


def _round_number(implied: float, promise: Promise) -> float | None:
    """A sensitivity that somebody may have written: a power of ten, or 2 clips over a usual number of examples."""
    power = math.pow(10.0, round(math.log10(implied)))
    if abs(implied / power - 1) < _NEAR:
        return power
    clip = promise.clip or promise.length
    near = min(_WRITTEN, key=lambda count: abs(math.log(2 * clip / count / implied)))
    return 2 * clip / near if abs(2 * clip / near / implied - 1) < 0.004 else None
