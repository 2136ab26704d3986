"""Panel: two attacks on the same victims, and of each victim the guess that better explains what was heard.

A wrapper without a paper. The judge is what an attacker has, never the truth: how far the guess's own gradient is from
the one that was sent, defended as announced and weighed by the error that the defence leaves. Where the defence is
random, a guess that follows the noise is nearest, so what pictures look like counts too: together they are the
posterior. A panel of more is a panel of panels, `panel(panel(idlg, idlg(adaptive=True)), inverting_gradients)`.
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
class Panel(Attack):
    """`first` and `second`, each as it would be alone; `first` where both are alike.

    Starts are drawn as those of `first` are.
    """

    leaks = (GradientLeak, UpdateLeak)

    first: Attack
    second: Attack

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def starts(self) -> int:
        """As many as either wants."""
        return max(self.first.starts, self.second.starts)

    def accepts(self, leak: Leak) -> None:
        """What both accept, of models that can be matched."""
        super().accepts(leak)
        self.first.accepts(leak)
        self.second.accepts(leak)
        check_match(leak)

    def reconstruct(self, leak: Leak, start: Images) -> Reconstruction:
        starts = start.reshape(len(leak), self.starts, *start.shape[1:])
        guesses, candidates = [], list[Images]()
        for attack in (self.first, self.second):
            guess = attack.reconstruct(leak, starts[:, : attack.starts].flatten(0, 1))
            images = guess.images.detach().clamp(0, 1)
            candidates += guess.candidates or (images,)
            made_by = guess.made_by or (attack.written(),) * len(leak)
            guesses.append(Reconstruction(images, guess.labels, implausible(leak, images, guess.labels), made_by))
        one, other = guesses
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
    """What an attack that is aware of the leak's defence minimises, at any guess; infinite if that is not finite.

    A sign is taken as it is, without the softness by which an attack finds its way: whoever follows a soft sign is
    better at that and worse at the signs.
    """
    known = informed(leak, relative_distance, softness=HARD)
    sound = images.flatten(1).isfinite().all(1)
    images = images.nan_to_num()
    value = Match(leak, known.misfit if known else squared_distance)(images, labels)
    if known:
        value = value + known.prior(images)
    return torch.where(sound, value, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
