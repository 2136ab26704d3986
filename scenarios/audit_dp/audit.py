"""An audit of a promise of differential privacy: the target is loaded, audited, and all that was found is written."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtap.scenarios.audit.process import seconds_left
from fedtap.scenarios.audit_dp.auditor import Auditor
from fedtap.scenarios.audit_dp.faults import Fault, faults_of
from fedtap.scenarios.audit_dp.noise import GAUSSIAN
from fedtap.scenarios.audit_dp.page import audit_dp_page
from fedtap.scenarios.audit_dp.promise import Promise, promise_of
from fedtap.scenarios.audit_dp.seeds import of_another_client, seed_everything
from fedtap.scenarios.audit_dp.target import Mechanism, mechanism_named, quiet
from fedtap.simulator.auditing.epsilon_bounds import UNBOUNDED, epsilon_of_distance
from fedtap.simulator.defences.gaussian import sampled_limits
from fedtap.simulator.errors import FedtapError
from fedtap.simulator.files import write_atomically
from fedtap.simulator.run import environment, finite

AUDIT_DP_SCHEMA = 1
"""Version of audit_dp.json."""

RESULT, PAGE = "audit_dp.json", "audit_dp.html"
"""What an audit leaves."""


@dataclass(frozen=True)
class PromiseAuditSettings:
    """What is audited, and against what."""

    target: str
    """Folder of an app, or `module:attribute`."""
    out: Path
    """Folder for RESULT and PAGE."""
    said: Mapping[str, Any]
    """Option of the promise -> value; None where it was not given."""
    alpha: float = 1e-3
    """Probability with which an honest mechanism is refuted, at most."""
    seconds: float = 60.0
    """Time for all of it."""
    started: float = 0.0
    """When that time began, as time.time() tells it; 0 for now."""

    @staticmethod
    def of(text: str) -> PromiseAuditSettings:
        """From JSON, the argument of a process."""
        given = json.loads(text)
        return PromiseAuditSettings(**{**given, "out": Path(given["out"])})


@dataclass
class PromiseAudit:
    """An audit under way."""

    settings: PromiseAuditSettings
    """What is audited."""
    promise: Promise | None = None
    """What is promised, once it is read."""
    auditor: Auditor | None = None
    """The auditor, once it has begun."""
    faults: list[Fault] = field(default_factory=list)
    """What was refuted."""
    notes: list[str] = field(default_factory=list)
    """What has to be known beside."""
    error: str | None = None
    """Why it could not be audited."""
    finished: bool = False
    """Whether nothing more comes."""

    def run(self) -> None:
        """Load, audit, name the faults, write.

        Raises:
            FedtapError: the target cannot be audited.
        """
        try:
            self._audit()
        except FedtapError as error:
            self.error = str(error)
            raise
        finally:
            self.finished = True
            self.write()

    def _audit(self) -> None:
        until = time.monotonic() + max(seconds_left(self.settings.started, self.settings.seconds), 1.0)
        target, said = self.settings.target, self.settings.said
        if Path(target).is_dir():
            from fedtap.scenarios.audit_dp.apps import mechanism_in_app

            mechanism, theirs = mechanism_in_app(Path(target), said), None
        else:
            theirs = None
            if target.partition(":")[0] not in sys.modules:  # another client imports it too, with generators of its own
                theirs = of_another_client(lambda: _first(target, said), self.settings.seconds / 4)
            seed_everything(None)
            mechanism = mechanism_named(target, said)
        self.promise = promise_of(said, mechanism.attributes)
        self.audit(mechanism, until, theirs)

    def audit(self, mechanism: Mechanism, until: float, theirs: np.ndarray | None = None) -> None:
        """Audit a mechanism against the promise that was read."""
        assert self.promise is not None
        self.notes += mechanism.notes
        self.auditor = Auditor(mechanism, self.promise, self.settings.alpha, until, theirs)
        try:
            self.auditor.run()
        finally:
            self.faults = faults_of(self.auditor)

    def document(self) -> dict[str, Any]:
        """What RESULT holds."""
        auditor = self.auditor
        bounds = auditor.bounds() if auditor and auditor.hypotheses else {}
        best = max(bounds.values(), default=0.0)
        return {
            "schema": AUDIT_DP_SCHEMA,
            "target": self.settings.target,
            "promised": self.promise.told() if self.promise else dict(self.settings.said),
            "refuted": [asdict(fault) for fault in self.faults],
            "epsilon_lower_bound": best,
            "epsilon_lower_bound_is_unbounded": best >= UNBOUNDED,
            "lower_bounds": bounds,
            "observations": auditor.observations if auditor else 0,
            "alpha": self.settings.alpha,
            "mechanism": auditor.settings() if auditor and auditor.hypotheses else None,
            "hypotheses": [
                {
                    "hypothesis": one.name,
                    "e_value": math.exp(one.highest),
                    "refuted_at": one.fell or None,
                }
                for one in (auditor.hypotheses if auditor else [])
            ],
            "e_value_needed": math.exp(auditor.threshold) if auditor and auditor.hypotheses else None,
            "history": auditor.history if auditor else [],
            "sigma_found": self._sigma(),
            "composition": self._composition(),
            "notes": self.notes,
            "seconds": self.settings.seconds,
            **environment(torch.device("cpu")),
            "finished": self.finished,
            "error": self.error,
        }

    def _sigma(self) -> float | None:
        if self.auditor is None or not self.auditor.hypotheses:
            return None
        times, squares = self.auditor.residuals.pooled
        return math.sqrt(float(squares.sum()) / (times * float(self.auditor.entries.counts.sum())))

    def _composition(self) -> dict[str, Any] | None:
        """What the accountant says of the noise that is there, over the rounds; None where it is no Gaussian noise."""
        sigma, promise = self._sigma(), self.promise
        if not sigma or not promise or not promise.delta:
            return None
        if self.auditor is None or self.auditor.kind != GAUSSIAN:
            return None
        rounds, pairs = promise.rounds, self.auditor.neighbours
        measured = [self.auditor.residuals.distance(pair.shift) for pair in pairs if pair.shift is not None]
        distance = max(measured, default=(promise.announced or 0.0) / sigma)
        if not 0 < distance < math.inf:
            return None
        told = {
            "noise_multiplier": 1 / distance,
            "epsilon_of_one_round": epsilon_of_distance(distance, promise.delta),
            "epsilon_without_sampling": epsilon_of_distance(math.sqrt(rounds) * distance, promise.delta),
            "promised": promise.epsilon,
        }
        said = f"ε = {told['epsilon_without_sampling']:.4g} over {rounds} round{'s' * (rounds > 1)} without sampling"
        if promise.rate < 1:
            low, high = sampled_limits(1 / distance, promise.rate, rounds, promise.delta)
            told |= {"epsilon_with_sampling": high, "epsilon_with_sampling_at_least": low}
            said += (
                f", and {high:.4g} where each {promise.unit} is in a round with probability {promise.rate:g} (Poisson "
                "sampling, for an observer that does not see who takes part)"
            )
        sentence = (
            f"By the accountant, noise whose σ is {1 / distance:.4g} times the distance of neighbours gives {said}; "
            f"ε = {promise.epsilon:.4g} is promised."
        )
        return told | {"sentence": sentence}

    def write(self) -> None:
        """Write what is known by now.

        Raises:
            FedtapError: the folder cannot be written.
        """
        write_promise_audit(self.settings.out, self.document())


def write_promise_audit(out: Path, document: Mapping[str, Any]) -> None:
    """RESULT and PAGE in this folder.

    Raises:
        FedtapError: the folder cannot be written.
    """
    write_atomically(out / RESULT, json.dumps(finite(document), indent=1, ensure_ascii=False).encode() + b"\n")
    write_atomically(out / PAGE, audit_dp_page(document).encode())


def _first(target: str, said: Mapping[str, Any]) -> np.ndarray:
    """The first releases of this target in this process."""
    mechanism = mechanism_named(target, said)
    promise = promise_of(said, mechanism.attributes)
    with quiet():
        return Auditor(mechanism, promise, 0.5, 0.0).first_releases()
