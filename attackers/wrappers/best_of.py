"""Best of: two attacks on the same victims; of each victim, the reconstruction that better explains the leak.

A wrapper without a paper. The criterion uses nothing but the leak: the distance of the reconstruction's gradient from
the observed one, defended as announced and weighed by the error that the defence leaves. Under a random defence the
nearest reconstruction would be one that fits the noise, so an image prior is added: together they are the posterior
density. More than two attacks are nested: `best_of(best_of(idlg, idlg(adaptive=True)), inverting_gradients)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtap.attackers.parts.adaptive import HARD, informed
from fedtap.attackers.parts.checks import check_fields
from fedtap.attackers.parts.gradients import Match, check_match, relative_distance, squared_distance
from fedtap.simulator.attack import Attack, Images, Reconstruction
from fedtap.simulator.leaks import GradientLeak, Leak, UpdateLeak


@dataclass(frozen=True)
class BestOf(Attack):
    """The more plausible reconstruction of two attacks, and that of `first` where both are equally plausible.

    Starts are drawn from the distribution of `first`.
    """

    leaks = (GradientLeak, UpdateLeak)

    first: Attack
    """The attack whose reconstruction is kept where both are equally plausible."""
    second: Attack
    """The attack whose reconstruction is kept where it is more plausible."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def starts(self) -> int:
        """The larger number of the two attacks' starts."""
        return max(self.first.starts, self.second.starts)

    def accepts(self, leak: Leak) -> None:
        """What both accept, among networks that torch.func can differentiate twice."""
        super().accepts(leak)
        self.first.accepts(leak)
        self.second.accepts(leak)
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        starts = start.reshape(len(leak), self.starts, *start.shape[1:])
        reconstructions, candidates = [], list[Images]()
        for attack in (self.first, self.second):
            reconstruction = attack.reconstruct(leak, starts[:, : attack.starts].flatten(0, 1))
            images = reconstruction.images.detach().clamp(0, 1)
            candidates += reconstruction.candidates or (images,)
            made_by = reconstruction.made_by or (attack.written(),) * len(leak)
            reconstructions.append(
                Reconstruction(images, reconstruction.labels, implausible(leak, images, reconstruction.labels), made_by)
            )
        one, other = reconstructions
        # strictly below: `first` where both are equal
        better = other.objective < one.objective
        return Reconstruction(
            torch.where(better.view(-1, 1, 1, 1, 1), other.images, one.images),
            torch.where(better.view(-1, 1), other.labels, one.labels),
            torch.where(better, other.objective, one.objective),
            tuple(
                theirs if which else ours
                for which, ours, theirs in zip(better.tolist(), one.made_by, other.made_by, strict=True)
            ),
            tuple(candidates),
        )


def implausible(leak: Leak, images: Images, labels: Int[Tensor, "victims batch"]) -> Float[Tensor, "victims"]:
    """Objective of an adaptive attack at any images, one value for each victim: infinite where it is not finite.

    Signs are compared almost without softness, which serves the optimiser alone: an attack that minimised a soft sign
    would otherwise win by the softness and not by the signs.
    """
    known = informed(leak, relative_distance, softness=HARD)
    sound = images.flatten(1).isfinite().all(1)
    images = images.nan_to_num()
    value = Match(leak, known.distance if known else squared_distance)(images, labels)
    if known:
        value = value + known.prior(images)
    return torch.where(sound, value, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
