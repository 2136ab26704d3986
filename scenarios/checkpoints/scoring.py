"""Scores of points found in trained weights: here they meet the private rows, beside what random points would get."""

from __future__ import annotations

import torch
from torch import Tensor

from fedtap.attackers.checkpoints import vulnerability
from fedtap.attackers.checkpoints.stationary_mmd import STATIONARY_SHARE, unexplainable
from fedtap.scenarios.checkpoints.stationary import Case, TrainedObserved
from fedtap.simulator import scores
from fedtap.simulator.attack import PseudoData
from fedtap.simulator.leaks import Leak
from fedtap.simulator.scenario import Row

NEAR = 0.01
"""Relative distance up to which an example counts as recovered."""


def rows_of_points(case: Case, seed: int, observed: TrainedObserved, found: PseudoData) -> list[Row]:
    """A row for each client: what came back, beside what as many random points would have got.

    Args:
        found: the clients' reconstructions, and any others after them.
    """
    rows = []
    least = unexplainable(observed.sent).tolist()
    for victim, client in enumerate(observed.sent.clients.tolist()):
        truth, labels = case.private(seed, client)
        weights = found.weights[victim]
        apart = scores.matched_distances(found.points[victim], weights, truth)
        many = int((weights >= scores.FAINT).sum())
        random, _ = case.table(seed, max(many, case.examples), "blind", client)
        blind = scores.matched_distances(random, torch.ones(len(random)), truth)
        residual = float(found.objective[victim]) ** 0.5
        rows.append(
            {
                "client": client,
                "recovered": float((apart <= NEAR).double().mean()),
                "distance": float(apart.median()),
                "blind": float((blind <= NEAR).double().mean()),
                "blind_distance": float(blind.median()),
                "residual": residual,
                "explained": residual < STATIONARY_SHARE,
                "left": observed.left[victim],
                "unexplainable": least[victim],
                "layer_rank": _rank(observed.sent, victim),
                "one_label": bool((labels == labels[0]).all()),
                "parameters": sum(parameter.numel() for parameter in observed.sent.network.parameters()),
            }
        )
    return rows


def simulated(case: Case, seed: int, victims: int, found: PseudoData) -> float:
    """Share recovered of the public rows that stood for private ones; their reconstructions come after the clients'."""
    inputs, _ = case.public(seed)
    shares = []
    for victim in range(victims):
        own = inputs[victim * case.examples : (victim + 1) * case.examples]
        points, weights = found.points[victims + victim], found.weights[victims + victim]
        shares.append(float((scores.matched_distances(points, weights, own) <= NEAR).double().mean()))
    return sum(shares) / len(shares)


def scores_without_attack(leak: Leak, inputs: Tensor, labels: Tensor) -> Row:
    """Every score that needs no attack, the mean over the clients: from trained weights and public rows alone."""
    return {
        "equations": float(vulnerability.equations(leak, inputs).mean()),
        "equations_coarse": float(vulnerability.equations(leak, inputs, 1e-3).mean()),
        "entropy_rank": float(vulnerability.entropy_rank(leak, inputs).mean()),
        "conditioning": float(vulnerability.conditioning(leak, inputs, labels).mean()),
    }


def _rank(leak: Leak, victim: int) -> int:
    """Of the first layer's trained weights: singular values above a thousandth of the largest."""
    first = next(tensor for tensor in leak.observed.values() if tensor.dim() == 3)[victim]
    spread = torch.linalg.svdvals(first)
    return int((spread > 1e-3 * spread[0]).sum())
