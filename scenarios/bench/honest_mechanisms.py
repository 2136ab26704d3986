"""How often are honest mechanisms refuted? `python -m fedtap.scenarios.bench.honest_mechanisms AUDITS [OBSERVATIONS]`.

Gaussian noise at ε = 1, 2, 4 and 8 in turn, Laplace noise at ε = 1, and Flower's LocalDpMod at ε = 1 and 4 with its
sensitivity set to the clip: all keep their promise under add/remove. Each is audited at α = 1e-3, so that of 1,000
audits 1 at most is expected to end in a false alarm. The lower bounds on ε are printed beside what is promised.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from flwr.clientapp.mod import LocalDpMod
from torch import Tensor

from fedtap.scenarios.audit_dp.auditor import ENOUGH, Auditor
from fedtap.scenarios.audit_dp.promise import promise_of
from fedtap.scenarios.audit_dp.seeds import seed_everything
from fedtap.scenarios.audit_dp.target import as_mechanism
from fedtap.simulator.defences.accountant import noise_for

_ALPHA, _DELTA = 1e-3, 1e-5


def _gaussian(epsilon: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    sigma = noise_for(epsilon, _DELTA, 1.0)

    def mechanism(update: dict[str, Tensor]) -> dict[str, Tensor]:
        length = float(sum(tensor.double().square().sum() for tensor in update.values())) ** 0.5
        factor = min(1.0, 1 / max(length, 1e-30))
        return {name: factor * tensor + sigma * torch.randn(tensor.shape) for name, tensor in update.items()}

    return mechanism


def _laplace(update: dict[str, Tensor]) -> dict[str, Tensor]:
    length = float(sum(tensor.double().abs().sum() for tensor in update.values()))
    noise = torch.distributions.Laplace(0.0, 1.0)
    factor = min(1.0, 1 / max(length, 1e-30))
    return {name: factor * tensor + noise.sample(tensor.shape) for name, tensor in update.items()}


def _cases() -> Iterator[tuple[str, object, float, float]]:
    """Name, mechanism, ε and δ, again and again."""
    while True:
        for epsilon in (1.0, 2.0, 4.0, 8.0):
            yield f"Gaussian, ε = {epsilon:g}", _gaussian(epsilon), epsilon, _DELTA
        yield "Laplace, ε = 1, δ = 0", _laplace, 1.0, 0.0
        for epsilon in (1.0, 4.0):
            yield f"LocalDpMod, ε = {epsilon:g}", LocalDpMod(1.0, 1.0, epsilon, _DELTA), epsilon, _DELTA


def main() -> None:
    """Audit, and print what was refuted and the bounds."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    audits = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    observations = int(sys.argv[2]) if len(sys.argv) > 2 else ENOUGH
    bounds: dict[str, list[float]] = {}
    alarms, highest, began = 0, -math.inf, time.process_time()
    for number, (name, found, epsilon, delta) in enumerate(islice(_cases(), audits), start=1):
        seed_everything(None)
        said = {"epsilon": epsilon, "delta": delta, "clip": 1.0}
        auditor = Auditor(
            as_mechanism(found, said, name),
            promise_of(said, {}),
            _ALPHA,
            time.monotonic() + 3600,
            observations=observations,
        )
        auditor.run()
        fallen = [one.name for one in auditor.hypotheses if one.fell]
        alarms += bool(fallen)
        highest = max(highest, max(one.highest - auditor.threshold for one in auditor.hypotheses))
        bounds.setdefault(name, []).append(max(auditor.bounds().values(), default=0.0))
        if fallen or not number % 50 or number == audits:
            print(
                f"{number} audits, {alarms} false alarms {fallen or ''}, {time.process_time() - began:.0f} s",
                flush=True,
            )
    print(f"nearest to an alarm: {math.exp(highest):.3g} times the evidence that is needed")
    for name, values in bounds.items():
        print(
            f"  {name}: lower bound {statistics.median(values):.3f} (median of {len(values)}), least {min(values):.3f}"
        )


if __name__ == "__main__":
    main()
